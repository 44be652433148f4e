// Pooling over windows, the mean over each map, and single pixels picked from a map, NHWC.
#pragma once

#include <cstring>

#include "epilogue.h"
#include "step.h"
#include "tile.h"

// The largest of vectors of values, NaN among them.
#if defined(RESFUSE_U8)
template <long COUNT>
struct Largest {
  typedef uint8_t Vector __attribute__((vector_size(COUNT), aligned(1), may_alias));
  Vector most = {};
  ALWAYS_INLINE void take(const Value* from) {
    const Vector value = *reinterpret_cast<const Vector*>(from);
    most = value > most ? value : most;
  }
  ALWAYS_INLINE void store_to(Value* to) const { *reinterpret_cast<Vector*>(to) = most; }
};
#else
template <long>
struct Largest {
  Floats most = broadcast(-__builtin_inff());
  ALWAYS_INLINE void take(const Value* from) {
    const Floats value = load(from);
    most = ((value > most) | (value != value)) ? value : most;  // NaN stays NaN
  }
  ALWAYS_INLINE void store_to(Value* to) const { store(to, most); }
};
#endif

// Returns the largest values of COUNT channels from `image` on of a window whose corner is at
// [top, left].
template <long COUNT>
static ALWAYS_INLINE Largest<COUNT> largest_of(const Step& s, const Value* image, long top,
                                               long left) {
  Largest<COUNT> all;
  for (long r = 0; r < s.R; r++) {
    const long h = top + r * s.dilation_h;
    if (h < 0 || h >= s.H) continue;
    for (long tap = 0; tap < s.S; tap++) {
      const long w = left + tap * s.dilation_w;
      if (w < 0 || w >= s.W) continue;
      all.take(image + (h * s.W + w) * s.x_pitch);
    }
  }
  return all;
}

static void max_pool(const Step& s, const Range& rows) {
  for (long row = rows.from; row < rows.to; row++) {
    const long top = row % s.P * s.stride_h - s.pad_h;
    const Value* const image = s.x + row / s.P * s.H * s.W * s.x_pitch;
    for (long q = 0; q < s.Q; q++) {
      const long left = q * s.stride_w - s.pad_w;
      Value* const y = s.y + (row * s.Q + q) * s.y_pitch;
      long k = 0;
      if constexpr (UNIT > 2) {
        for (; k + UNIT * LANES <= s.K; k += UNIT * LANES) {
          largest_of<UNIT * LANES>(s, image + k, top, left).store_to(y + k);
        }
      }
      for (; k < s.K; k += LANES) largest_of<LANES>(s, image + k, top, left).store_to(y + k);
    }
  }
}

// A thread's range of rows of y, whose pixels read windows of R x S.
static RowRange pool_range(const Step& s, long range, long ranges) {
  const double window = s.kind == PICK ? 1 : s.R * s.S;
  return RowRange(s.N * s.P, 1, range, ranges, 4 * window * s.Q * s.K);
}

// A thread's range of vectors of channels.
static RowRange mean_range(const Step& s, long range, long ranges) {
  const long vectors = (s.K + LANES - 1) / LANES;
  return RowRange(s.N * vectors, 1, range, ranges, 4.0 * LANES * s.H * s.W);
}

// What is added up of a vector of values, and what so many of them, divided by `count`, stand for.
#if defined(RESFUSE_U8)
static ALWAYS_INLINE Ints summand(const Value* from) { return load_ints(from); }
static ALWAYS_INLINE Floats real_sum(const Step& s, Ints sum, long values, Floats count) {
  return as_floats(sum - static_cast<int>(values * s.x_zero)) / count * s.x_scale;
}
#else
static ALWAYS_INLINE Floats summand(const Value* from) { return load(from); }
static ALWAYS_INLINE Floats real_sum(const Step&, Floats sum, long, Floats count) {
  return sum / count;
}
#endif

static void global_mean(const Step& s, const Range& part) {
  const long vectors = (s.K + LANES - 1) / LANES, pixels = s.H * s.W;
  for (long i = part.from; i < part.to; i++) {
    const long image = i / vectors, k = i % vectors * LANES;
    const Value* x = s.x + image * pixels * s.x_pitch + k;
    Sum sum[4] = {};
    for (long pixel = 0; pixel < pixels; pixel++) sum[pixel % 4] += summand(x + pixel * s.x_pitch);
    const Sum all = sum[0] + sum[1] + (sum[2] + sum[3]);
    const Sums<1, 1> mean = {{real_sum(s, all, pixels, broadcast(pixels))}};
    store_results<1, 1>(s, mean, image, k, LANES);
  }
}

// Computes the sum of each window divided by w[p] * slope[q], which Python computes from how
// windows at the edge count.
static void average_pool(const Step& s, const Range& rows) {
  for (long row = rows.from; row < rows.to; row++) {
    const long top = row % s.P * s.stride_h - s.pad_h;
    const long first = top < 0 ? 0 : top, last = min(top + s.R, s.H);
    const Value* const image = s.x + row / s.P * s.H * s.W * s.x_pitch;
    for (long q = 0; q < s.Q; q++) {
      const long left = q * s.stride_w - s.pad_w;
      const long from = left < 0 ? 0 : left, to = min(left + s.S, s.W);
      const Floats count = broadcast(s.w[row % s.P] * s.slope[q]);
      const long values = (last - first) * (to - from);
      for (long k = 0; k < s.K; k += LANES) {
        Sum sum = {};
        for (long h = first; h < last; h++) {
          for (long w = from; w < to; w++) sum += summand(image + (h * s.W + w) * s.x_pitch + k);
        }
        const Sums<1, 1> mean = {{real_sum(s, sum, values, count)}};
        store_results<1, 1>(s, mean, row * s.Q + q, k, LANES);
      }
    }
  }
}

// Computes y[p, q, k] = x[w[p], slope[q], k], or with a table of channels x[w[p], slope[q], bias[k]];
// zeros in channels [C, K), and where w[p] or slope[q] is -1: of uint8 x's zero points.
static void pick(const Step& s, const Range& rows) {
#if defined(RESFUSE_U8)
  const Value zero = {static_cast<uint8_t>(s.x_zero)};
#else
  const Value zero = {};
#endif
  for (long row = rows.from; row < rows.to; row++) {
    const long picked = static_cast<long>(s.w[row % s.P]), h = row / s.P * s.H + picked;
    for (long q = 0; q < s.Q; q++) {
      Value* const y = s.y + (row * s.Q + q) * s.y_pitch;
      if (picked < 0 || s.slope[q] < 0) {
        for (long k = 0; k < whole_vectors(s.K); k++) y[k] = zero;
        continue;
      }
      const Value* const x = s.x + (h * s.W + static_cast<long>(s.slope[q])) * s.x_pitch;
      if (s.bias) {
        for (long k = 0; k < s.C; k++) y[k] = x[static_cast<long>(s.bias[k])];
        for (long k = s.C; k < whole_vectors(s.K); k++) y[k] = zero;
      } else {
#if defined(RESFUSE_U8)
        const long copied = min(s.C, s.K);
        std::memcpy(y, x, copied);
        std::memset(y + copied, zero.bits, whole_vectors(s.K) - copied);
#else
        for (long k = 0; k < s.K; k += LANES) store(y + k, load_first(x + k, s.C - k));
#endif
      }
    }
  }
}
