// Converts values between float32 and bfloat16, NHWC: in the library for bfloat16 alone.
#pragma once

#include "base/dcheck.h"
#include "step.h"
#include "base/storage.h"
#include "tile.h"

static RowRange convert_range(const Step& s, long range, long ranges) {
  return RowRange(s.N * s.P * s.Q, 1, range, ranges, 4 * s.K);
}

// Computes y[k] = x[k], and zeros in channels [C, K), which x does not have.
template <class From, class To>
static void convert(const Step& s, const Range& pixels) {
  for (long pixel = pixels.from; pixel < pixels.to; pixel++) {
    const From* const x = reinterpret_cast<const From*>(s.x) + pixel * s.x_pitch;
    To* const y = reinterpret_cast<To*>(s.y) + pixel * s.y_pitch;
    for (long k = 0; k < s.K; k += LANES) {
      store_first(y + k, load_first(x + k, s.C - k), s.K - k);
    }
  }
}

#if defined(RESFUSE_BF16)
static void to_bf16(const Step& s, const Range& pixels) { convert<float, Value>(s, pixels); }
static void to_fp32(const Step& s, const Range& pixels) { convert<Value, float>(s, pixels); }
#else
static void to_bf16(const Step&, const Range&) { __builtin_trap(); }
static void to_fp32(const Step&, const Range&) { __builtin_trap(); }
#endif
