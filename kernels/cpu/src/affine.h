// Computes a batch norm that could not be folded into a convolution: y = act(x * scale + shift +
// residual), NHWC.
#pragma once

#include "epilogue.h"
#include "step.h"
#include "tile.h"

static RowRange affine_range(const Step& s, long range, long ranges) {
  return RowRange(s.N * s.P * s.Q, 1, range, ranges, 4 * s.K);
}

static void affine(const Step& s, const Range& pixels) {
  for (long pixel = pixels.from; pixel < pixels.to; pixel++) {
    const Value* const x = s.x + pixel * s.x_pitch;
    for (long k = 0; k < s.K; k += LANES) {
      Sums<1, 1> y = {{load(x + k) * load(s.w + k) + load(s.bias + k)}};
      epilogue<1, 1>(s, y, pixel, k);
    }
  }
}
