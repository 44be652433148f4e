// The epilogue of a convolution, on a vector of output channels: residual, activation and store.
#pragma once

#include "dcheck.h"
#include "step.h"
#include "vectors.h"

// Comparisons are written so that NaN stays NaN.
static inline Floats activate(const Step& s, Floats v, long k) {
  switch (s.activation) {
    case RELU:
      return v < 0 ? Floats{} : v;
    case RELU6:
      v = v < 0 ? Floats{} : v;
      return v > 6 ? broadcast(6) : v;
    case HARDSWISH: {
      Floats gate = v + 3;
      gate = gate < 0 ? Floats{} : gate;
      gate = gate > 6 ? broadcast(6) : gate;
      return v * gate / 6;
    }
    case SLOPE:
      return v < 0 ? v * load(s.slope + k) : v;
    default:
      return v;
  }
}

static inline void epilogue(const Step& s, Floats v, long pixel, long k) {
  DCHECK(0 <= pixel && pixel < s.N * s.P * s.Q && 0 <= k && k < s.K && k % LANES == 0);
  if (!s.residual) {
    v = activate(s, v, k);
  } else {
    Floats residual = load(s.residual + pixel * s.residual_pitch + k);
    v = s.residual_last ? activate(s, v, k) + residual : activate(s, v + residual, k);
  }
  store(s.y + pixel * s.y_pitch + k, v);
}
