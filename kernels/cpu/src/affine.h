// Computes a batch norm that could not be folded into a convolution: y = act(x * w + bias +
// residual), NHWC, of the real numbers that values in uint8 stand for.
#pragma once

#include <cmath>

#include "epilogue.h"
#include "step.h"
#include "tile.h"

static RowRange affine_range(const Step& s, long range, long ranges) {
  return RowRange(s.N * s.P * s.Q, 1, range, ranges, 4 * s.K);
}

// What x stands for, times w plus bias. Of uint8 each operation is rounded, as its twin does.
static ALWAYS_INLINE Floats scaled(const Step& s, const Value* x, Floats w, Floats bias) {
#if defined(RESFUSE_U8)
  return (load(x) - static_cast<float>(s.x_zero)) * s.x_scale * w + bias;
#else
  return multiply_add(bias, load(x), w);
#endif
}

static void affine(const Step& s, const Range& pixels) {
  for (long pixel = pixels.from; pixel < pixels.to; pixel++) {
    const Value* const x = s.x + pixel * s.x_pitch;
    for (long k = 0; k < s.K; k += LANES) {
      Sums<1, 1> y = {{scaled(s, x + k, load(s.w + k), load(s.bias + k))}};
      epilogue<1, 1>(s, y, pixel, k);
    }
  }
}

// A batch norm's scale and shift, in double precision and rounded once. Where variance and eps may
// cancel, as torch rounds their sum. Null: a weight of ones, a bias of zeros.
static void scale_and_shift(const float* mean, const float* variance, const float* weight,
                            const float* bias, double eps, long channels, float* scale,
                            float* shift) {
  for (long k = 0; k < channels; k++) {
    const double exact = variance[k] + eps, rounded = variance[k] + static_cast<float>(eps);
    const double factor =
        (weight ? weight[k] : 1.0) / std::sqrt(variance[k] > 0 ? exact : rounded);
    scale[k] = static_cast<float>(factor);
    shift[k] = static_cast<float>((bias ? bias[k] : 0.0) - mean[k] * factor);
  }
}
