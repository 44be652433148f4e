// Batch norm that no convolution can take in: y = act(x * scale + shift + residual), NHWC.
#pragma once

#include "epilogue.h"
#include "step.h"
#include "tile.h"

static Rows affine_range(const Step& s, long range, long ranges) {
  return Rows(s.N * s.P * s.Q, 1, range, ranges, 4 * s.K);
}

static void affine_in(const Step& s, const Part& pixels) {
  for (long pixel = pixels.from; pixel < pixels.to; pixel++) {
    const float* const x = s.x + pixel * s.x_pitch;
    for (long k = 0; k < s.K; k += LANES) {
      finish(s, load(x + k) * load(s.w + k) + load(s.bias + k), pixel, k);
    }
  }
}
