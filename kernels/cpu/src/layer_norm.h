// Normalises the channels of each pixel: y = (x - mean) / sqrt(variance + eps) * w + bias, NHWC.
// Sums are float32. There is none in uint8. The variance is of differences from the mean, and what
// rounding has left of the mean in them is taken out of both, so that a large mean costs no digits.
#pragma once

#include <cmath>

#include "step.h"
#include "tile.h"

static RowRange layer_norm_range(const Step& s, long range, long ranges) {
  return RowRange(s.N * s.P * s.Q, 1, range, ranges, 12 * s.K);
}

#if defined(RESFUSE_U8)
static void layer_norm(const Step&, const Range&) { __builtin_trap(); }
#else
static ALWAYS_INLINE float sum_of_lanes(Floats v) {
  for (long half = LANES / 2; half > 0; half /= 2) {
    for (long lane = 0; lane < half; lane++) v[lane] += v[lane + half];
  }
  return v[0];
}

// The lanes of v that are among the first `count`, and zeros in the others.
static ALWAYS_INLINE Floats first_lanes(Floats v, long count) {
  for (long lane = count; lane < LANES; lane++) v[lane] = 0;
  return v;
}

// Calls take(vector of x, i) for each vector of a pixel's channels, with zeros behind the last one.
template <class Take>
static ALWAYS_INLINE void each_vector(const Value* x, long channels, const Take& take) {
  long k = 0;
  for (; k + LANES <= channels; k += LANES) take(load(x + k), LANES, k);
  if (k < channels) take(load_first(x + k, channels - k), channels - k, k);
}

static void layer_norm(const Step& s, const Range& pixels) {
  const float share = 1 / static_cast<float>(s.K);  // shares: no sum overflows
  for (long pixel = pixels.from; pixel < pixels.to; pixel++) {
    const Value* const x = s.x + pixel * s.x_pitch;
    Value* const y = s.y + pixel * s.y_pitch;
    Floats sum[4] = {};
    each_vector(x, s.K, [&](Floats v, long, long k) ALWAYS_INLINE_LAMBDA {
      Floats& part = sum[k / LANES % 4];
      part = multiply_add(part, share, v);
    });
    const float mean = sum_of_lanes(sum[0] + sum[1] + (sum[2] + sum[3]));
    Floats rest[2] = {}, squares[2] = {};
    each_vector(x, s.K, [&](Floats v, long count, long k) ALWAYS_INLINE_LAMBDA {
      const Floats d = count < LANES ? first_lanes(v - mean, count) : v - mean;
      rest[k / LANES % 2] += d;
      Floats& square = squares[k / LANES % 2];
      square = multiply_add(square, d, d);
    });
    const float left = sum_of_lanes(rest[0] + rest[1]) * share;
    const float spread = sum_of_lanes(squares[0] + squares[1]) * share;
    const float variance = spread < HUGE_VALF ? spread - left * left : spread;
    const float scale = 1 / std::sqrt((variance < 0 ? 0 : variance) + s.eps);
    each_vector(x, s.K, [&](Floats v, long, long k) ALWAYS_INLINE_LAMBDA {
      store(y + k, multiply_add(load(s.bias + k), (v - mean - left) * scale, load(s.w + k)));
    });
  }
}
#endif
