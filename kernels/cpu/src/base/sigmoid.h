// exp, sigmoid and SiLU of vectors. Of all floats sigmoid is off by at most 1.3e-7 (2 units in the
// last place, but 1e-38 below -87), SiLU by as much of its argument (tests/kernels/cpu).
#pragma once

#include <initializer_list>

#include "vectors.h"

typedef unsigned Bits __attribute__((vector_size(4 * LANES)));

// e^v as 2^n e^r, |r| <= ln 2 / 2: the polynomial of Cephes' expf (Moshier, 1989). Infinite from
// 88.4 on, zero below -87.7; NaN stays NaN.
static ALWAYS_INLINE Floats exponential(Floats v) {
  constexpr float LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  constexpr float TO_INTEGER = 12582912;  // 1.5 * 2^23: the bits of a sum with it end in an integer
  v = at_most(broadcast(89), at_least(broadcast(-88), v));
  const Floats shifted = multiply_add(broadcast(TO_INTEGER), LOG2_E, v), n = shifted - TO_INTEGER;
  const Floats r = multiply_add(multiply_add(v, -LN2_HIGH, n), -LN2_LOW, n);
  Floats p = multiply_add(broadcast(1.3981999507e-3f), 1.9875691500e-4f, r);
  for (const float coefficient : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                  5.0000001201e-1f}) {
    p = multiply_add(broadcast(coefficient), p, r);
  }
  p = multiply_add(r, p, r * r) + 1;
  const Bits power = (reinterpret_cast<Bits>(shifted) << 23) + 0x3F800000u;
  return p * reinterpret_cast<Floats>(power);
}

// Both replace `count` vectors, out of line, once for all kernels.
__attribute__((noinline)) static void sigmoid(Floats* v, long count) {
  for (long i = 0; i < count; i++) v[i] = 1 / (1 + exponential(-v[i]));
}
__attribute__((noinline)) static void silu(Floats* v, long count) {
  for (long i = 0; i < count; i++) v[i] = v[i] / (1 + exponential(-v[i]));
}
