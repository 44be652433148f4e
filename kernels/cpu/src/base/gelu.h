// GELU of vectors, x times the normal distribution's share below x, and its form by tanh
// (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016). Of all floats both are off by at
// most 2.5e-7 of their argument, and of those above -5 by at most 3e-6 of the result: 1 + erf and
// 1 + tanh in float32, which cancel, by up to a third (tests/kernels/cpu/test_native_sigmoid.py).
#pragma once

#include "sigmoid.h"

// The normal distribution's share beyond |v|: e^(-v^2 / 2) t q(t), t = 1 / (1 + 0.4 |v| / sqrt(2)).
// The polynomial q was fitted to erfc's scaled form by iterated least squares, within 5.9e-8.
static ALWAYS_INLINE Floats normal_tail(Floats v) {
  constexpr float SLOPE_OF_T = 0.4f * 0.70710678f;
  const Floats t = 1 / multiply_add(broadcast(1), SLOPE_OF_T, v < 0 ? -v : v);
  Floats q = multiply_add(broadcast(-0.136496335f), 0.040475402f, t);
  for (const float coefficient : {0.075993598f, 0.097226486f, 0.073269702f, 0.19619739f,
                                  0.20115884f, 0.22654696f, 0.22562803f}) {
    q = multiply_add(broadcast(coefficient), q, t);
  }
  return exponential(-0.5f * v * v) * (0.5f * t * q);
}

// Both replace `count` vectors, out of line, once for all kernels.
__attribute__((noinline)) static void gelu(Floats* v, long count) {
  for (long i = 0; i < count; i++) {
    const Floats tail = normal_tail(v[i]);
    v[i] *= v[i] < 0 ? tail : 1 - tail;
  }
}
// 0.5 (1 + tanh u) is sigmoid(2 u).
__attribute__((noinline)) static void gelu_tanh(Floats* v, long count) {
  constexpr float TWICE_ROOT = 1.59576912f, CUBE = 0.044715f;  // 2 sqrt(2 / pi)
  for (long i = 0; i < count; i++) {
    const Floats u = TWICE_ROOT * v[i] * multiply_add(broadcast(1), CUBE * v[i], v[i]);
    v[i] = v[i] / (1 + exponential(-u));
  }
}
