// Sums over splits of the channels, and softmax over them, NHWC: the attention of ResNeSts and
// SKNets. Of `groups` splits of K channels, split g of a pixel is x[g * K .. g * K + K).
//
//   SPLIT_SUM      y[k] = the sum over g of x[g * K + k] * gate[g * K + k], without a gate of x alone
//   SPLIT_SOFTMAX  y[g * K + k] = e^x[g * K + k] / the sum over h of e^x[h * K + k]
//
// A gate is a pixel for each image. The product with it, `groups` times as large as the sum, never
// exists. There is neither in uint8.
#pragma once

#include "base/sigmoid.h"
#include "step.h"
#include "tile.h"

static RowRange split_range(const Step& s, long range, long ranges) {
  const double products = s.kind == SPLIT_SUM ? 4 : 32;
  return RowRange(s.N * s.P * s.Q, 1, range, ranges, products * s.groups * s.K);
}

#if defined(RESFUSE_U8)
static void split_sum(const Step&, const Range&) { __builtin_trap(); }
static void split_softmax(const Step&, const Range&) { __builtin_trap(); }
#else
template <bool GATED>
static ALWAYS_INLINE Floats sum_of_splits(const Step& s, const Value* x, const Value* gate,
                                          long count) {
  Floats sum = {};
  for (long g = 0; g < s.groups; g++) {
    const Floats v = load_first(x + g * s.K, count);
    sum = GATED ? multiply_add(sum, v, load_first(gate + g * s.K, count)) : sum + v;
  }
  return sum;
}

template <bool GATED>
static void sums_of_splits(const Step& s, const Range& pixels) {
  for (long pixel = pixels.from; pixel < pixels.to; pixel++) {
    const Value* const x = s.x + pixel * s.x_pitch;
    const Value* const gate = GATED ? s.gate + pixel / (s.P * s.Q) * s.gate_pitch : nullptr;
    Value* const y = s.y + pixel * s.y_pitch;
    long k = 0;
    for (; k + LANES <= s.K; k += LANES) {
      store(y + k, sum_of_splits<GATED>(s, x + k, gate + k, LANES));
    }
    if (k < s.K) store(y + k, sum_of_splits<GATED>(s, x + k, gate + k, s.K - k));
  }
}

static void split_sum(const Step& s, const Range& pixels) {
  s.gate ? sums_of_splits<true>(s, pixels) : sums_of_splits<false>(s, pixels);
}

// Splits need not begin at whole vectors, so that of each the last one is loaded and stored in part.
static void split_softmax(const Step& s, const Range& pixels) {
  for (long pixel = pixels.from; pixel < pixels.to; pixel++) {
    for (long k = 0; k < s.K; k += LANES) {
      const Value* const x = s.x + pixel * s.x_pitch + k;
      Value* const y = s.y + pixel * s.y_pitch + k;
      const long count = s.K - k;
      Floats most = broadcast(-__builtin_inff()), sum = {};
      for (long g = 0; g < s.groups; g++) {
        const Floats v = load_first(x + g * s.K, count);
        most = ((v > most) | (v != v)) ? v : most;  // NaN stays NaN
      }
      const auto power = [&](long g) ALWAYS_INLINE_LAMBDA {
        return exponential(load_first(x + g * s.K, count) - most);
      };
      for (long g = 0; g < s.groups; g++) sum += power(g);
      for (long g = 0; g < s.groups; g++) store_first(y + g * s.K, power(g) / sum, count);
    }
  }
}
#endif
