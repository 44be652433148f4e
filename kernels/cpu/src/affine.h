// Computes a batch norm that could not be folded into a convolution: y = act(x * w + bias +
// residual), NHWC, of the real numbers that values in uint8 stand for.
#pragma once

#include "epilogue.h"
#include "step.h"
#include "tile.h"

static RowRange affine_range(const Step& s, long range, long ranges) {
  return RowRange(s.N * s.P * s.Q, 1, range, ranges, 4 * s.K);
}

#if defined(RESFUSE_U8)
static ALWAYS_INLINE Floats real_input(const Step& s, const Value* from) {
  return (load(from) - static_cast<float>(s.x_zero)) * s.x_scale;
}
#else
static ALWAYS_INLINE Floats real_input(const Step&, const Value* from) { return load(from); }
#endif

static void affine(const Step& s, const Range& pixels) {
  for (long pixel = pixels.from; pixel < pixels.to; pixel++) {
    const Value* const x = s.x + pixel * s.x_pitch;
    for (long k = 0; k < s.K; k += LANES) {
      Sums<1, 1> y = {{real_input(s, x + k) * load(s.w + k) + load(s.bias + k)}};
      epilogue<1, 1>(s, y, pixel, k);
    }
  }
}
