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

// How many values y's elements take: 4 where they are float32 in the library for uint8.
static ALWAYS_INLINE long y_values(const Step& s) {
  return STORAGE == U8 && s.y_fp32 ? static_cast<long>(sizeof(float)) : 1;
}
static ALWAYS_INLINE Value* place_in_y(const Step& s, long pixel, long k) {
  return s.y + (pixel * s.y_pitch + k) * y_values(s);
}

#if defined(RESFUSE_U8)
// What a residual's values stand for.
struct Residual {
  Floats zero, scale;
  ALWAYS_INLINE explicit Residual(const Step& s)
      : zero(broadcast(static_cast<float>(s.residual_zero))), scale(broadcast(s.residual_scale)) {}
  ALWAYS_INLINE Floats operator()(Floats v) const { return (v - zero) * scale; }
};
#else
struct Residual {
  ALWAYS_INLINE explicit Residual(const Step&) {}
  ALWAYS_INLINE Floats operator()(Floats v) const { return v; }
};
#endif

template <long M, long N>
static ALWAYS_INLINE void add_residual(const Step& s, Sums<M, N>& sums, long pixel, long k,
                                       long last) {
  const Residual real(s);
  UNROLLED for (long m = 0; m < M; m++) {
    const Value* const from = s.residual + (pixel + m) * s.residual_pitch + k;
    UNROLLED for (long n = 0; n + 1 < N; n++) sums[m][n] += real(load(from + n * LANES));
    sums[m][N - 1] += real(load_first(from + (N - 1) * LANES, last));
  }
}

template <long M, long N, class To, class Of>
static ALWAYS_INLINE void store_tile(const Sums<M, N>& sums, To* to, long pitch, long last,
                                     const Of& stored) {
  UNROLLED for (long m = 0; m < M; m++, to += pitch) {
    UNROLLED for (long n = 0; n + 1 < N; n++) store(to + n * LANES, stored(sums[m][n]));
    store_first(to + (N - 1) * LANES, stored(sums[m][N - 1]), last);
  }
}

template <long M, long N>
static ALWAYS_INLINE void store_results(const Step& s, const Sums<M, N>& sums, long pixel, long k,
                                        long last) {
  Value* const to = place_in_y(s, pixel, k);
  const auto same = [](Floats v) ALWAYS_INLINE_LAMBDA { return v; };
#if defined(RESFUSE_U8)
  if (!s.y_fp32) {
    store_tile<M, N>(sums, to, s.y_pitch, last, Quantizer(s.y_inverse_scale, s.y_zero));
  } else {
    store_tile<M, N>(sums, reinterpret_cast<float*>(to), s.y_pitch, last, same);
  }
#else
  store_tile<M, N>(sums, to, s.y_pitch, last, same);
#endif
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
  store_results<M, N>(s, sums, pixel, k, last);
}

// Returns whether a vector that ends at channel `to` is the last one of all or, of groups with
// `unstored`, of one.
static inline bool ends_group(const Step& s, long to) {
  if (is_convolution(s) && groups_apart(s) > 1) return (to - s.unstored) % (s.K / s.groups) == 0;
  return to == s.K;
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
  DCHECK(0 <= k && k + (N - 1) * LANES < s.K);
  if (s.unstored && ends_group(s, k + N * LANES)) {
    Sums<M, N> copy;  // as in map_by_call
    UNROLLED for (long m = 0; m < M; m++) {
      UNROLLED for (long n = 0; n < N; n++) copy[m][n] = sums[m][n];
    }
    finish_tail<M, N>(s, copy, pixel, k);
  } else {
    finish<M, N>(s, sums, pixel, k, LANES);
  }
}

// The same for the sums of a convolution's products: of uint8 integers, with the bias still to be
// added.
#if !defined(RESFUSE_U8)
template <long M, long N>
static ALWAYS_INLINE void epilogue_of_sums(const Step& s, Sums<M, N>& sums, long pixel, long k) {
  epilogue<M, N>(s, sums, pixel, k);
}
#else
template <long M, long N, class OfSum>
static ALWAYS_INLINE void epilogue_of_scaled(const Step& s, const OfSum& number, long pixel,
                                             long k) {
  Sums<M, N> real;
  UNROLLED for (long n = 0; n < N; n++) {
    const Floats scale = load(s.scale + k + n * LANES), bias = load(s.bias + k + n * LANES);
    UNROLLED for (long m = 0; m < M; m++) real[m][n] = number(m, n) * scale + bias;
  }
  epilogue<M, N>(s, real, pixel, k);
}
template <long M, long N>
static ALWAYS_INLINE void epilogue_of_sums(const Step& s, const Ints (&sums)[M][N], long pixel,
                                           long k) {
  const auto number = [&](long m, long n) ALWAYS_INLINE_LAMBDA { return as_floats(sums[m][n]); };
  epilogue_of_scaled<M, N>(s, number, pixel, k);
}
template <long M, long N>  // integers in float32, of grouped convolutions
static ALWAYS_INLINE void epilogue_of_sums(const Step& s, const Sums<M, N>& sums, long pixel,
                                           long k) {
  const auto number = [&](long m, long n) ALWAYS_INLINE_LAMBDA { return sums[m][n]; };
  epilogue_of_scaled<M, N>(s, number, pixel, k);
}
#endif
