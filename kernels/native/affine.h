// Batch norm that no convolution can take in: y = act(x * scale + shift + residual), NHWC.
#pragma once

#include "epilogue.h"
#include "step.h"
#include "tile.h"

static void affine(const Step& s, long t, long threads) {
  const Part pixels(s.N * s.P * s.Q, 1, t, threads);
  for (long pixel = pixels.from; pixel < pixels.to; pixel++) {
    const float* const x = s.x + pixel * s.x_pitch;
    for (long k = 0; k < s.K; k += LANES) {
      finish(s, load(x + k) * load(s.w + k) + load(s.bias + k), pixel, k);
    }
  }
}
