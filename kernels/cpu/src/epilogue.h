// The epilogue of a convolution, on a tile of sums: residual, activation and store. What it depends
// on is asked once a tile.
#pragma once

#include "base/dcheck.h"
#include "step.h"
#include "base/gelu.h"
#include "base/sigmoid.h"
#include "base/storage.h"
#include "base/vectors.h"

// M pixels, one after another, by N vectors of output channels.
template <long M, long N>
using Sums = Floats[M][N];

template <long M, long N>
static ALWAYS_INLINE void add_residual(const Step& s, Sums<M, N>& sums, long pixel, long k,
                                       long last) {
  UNROLLED for (long m = 0; m < M; m++) {
    const Value* const from = s.residual + (pixel + m) * s.residual_pitch + k;
    UNROLLED for (long n = 0; n + 1 < N; n++) sums[m][n] += load(from + n * LANES);
    sums[m][N - 1] += load_first(from + (N - 1) * LANES, last);
  }
}

template <long M, long N, class Function>
static ALWAYS_INLINE void map(Sums<M, N>& sums, const Function& function) {
  UNROLLED for (long m = 0; m < M; m++) {
    UNROLLED for (long n = 0; n < N; n++) sums[m][n] = function(sums[m][n], n);
  }
}

// Of an activation that calls a function: what a call can reach lies in memory, and these sums are
// in registers.
template <long M, long N, class Function>
static ALWAYS_INLINE void map_by_call(Sums<M, N>& sums, const Function& function) {
  Sums<M, N> copy;
  UNROLLED for (long m = 0; m < M; m++) {
    UNROLLED for (long n = 0; n < N; n++) copy[m][n] = sums[m][n];
  }
  function(&copy[0][0], M * N);
  UNROLLED for (long m = 0; m < M; m++) {
    UNROLLED for (long n = 0; n < N; n++) sums[m][n] = copy[m][n];
  }
}

// NaN stays NaN.
template <long M, long N>
static ALWAYS_INLINE void activate(const Step& s, Sums<M, N>& sums, long k) {
  const auto relu = [](Floats v, long) ALWAYS_INLINE_LAMBDA { return at_least(Floats{}, v); };
  const auto relu6 = [&](Floats v, long n) ALWAYS_INLINE_LAMBDA {
    return at_most(broadcast(6), relu(v, n));
  };
  switch (s.activation) {
    case IDENTITY: break;
    case RELU: map(sums, relu); break;
    case RELU6: map(sums, relu6); break;
    case HARDSWISH:
      map(sums, [&](Floats v, long n) ALWAYS_INLINE_LAMBDA { return v * relu6(v + 3, n) / 6; });
      break;
    case HARDSIGMOID:
      map(sums, [&](Floats v, long n) ALWAYS_INLINE_LAMBDA { return relu6(v + 3, n) / 6; });
      break;
    case SILU: map_by_call<M, N>(sums, silu); break;
    case SIGMOID: map_by_call<M, N>(sums, sigmoid); break;
    case GELU: map_by_call<M, N>(sums, gelu); break;
    case GELU_TANH: map_by_call<M, N>(sums, gelu_tanh); break;
    case SLOPE:
      map(sums, [&](Floats v, long n) ALWAYS_INLINE_LAMBDA {
        return v < 0 ? v * load(s.slope + k + n * LANES) : v;
      });
      break;
  }
}

// `last` channels of the last vector exist.
template <long M, long N>
static ALWAYS_INLINE void finish(const Step& s, Sums<M, N>& sums, long pixel, long k, long last) {
  if (s.residual && !s.residual_last) add_residual<M, N>(s, sums, pixel, k, last);
  activate<M, N>(s, sums, k);
  if (s.residual && s.residual_last) add_residual<M, N>(s, sums, pixel, k, last);
  UNROLLED for (long m = 0; m < M; m++) {
    Value* const to = s.y + (pixel + m) * s.y_pitch + k;
    UNROLLED for (long n = 0; n + 1 < N; n++) store(to + n * LANES, sums[m][n]);
    store_first(to + (N - 1) * LANES, sums[m][N - 1], last);
  }
}

// Out of line, once for all kernels.
template <long M, long N>
__attribute__((noinline)) static void finish_tail(const Step& s, Sums<M, N>& sums, long pixel,
                                                  long k) {
  finish<M, N>(s, sums, pixel, k, LANES - s.unstored);
}

// Stores the results of pixels from `pixel` on and output channels from `k` on.
template <long M, long N>
static ALWAYS_INLINE void epilogue(const Step& s, Sums<M, N>& sums, long pixel, long k) {
  DCHECK(0 <= pixel && pixel + M <= s.N * s.P * s.Q);
  DCHECK(0 <= k && k % LANES == 0 && k + (N - 1) * LANES < s.K);
  if (s.unstored && k + N * LANES == s.K) {
    Sums<M, N> copy;  // as in map_by_call
    UNROLLED for (long m = 0; m < M; m++) {
      UNROLLED for (long n = 0; n < N; n++) copy[m][n] = sums[m][n];
    }
    finish_tail<M, N>(s, copy, pixel, k);
  } else {
    finish<M, N>(s, sums, pixel, k, LANES);
  }
}
