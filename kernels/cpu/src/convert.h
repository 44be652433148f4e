// Converts values between float32 and bfloat16 or uint8, NHWC: in the libraries for those alone.
#pragma once

#include "base/dcheck.h"
#include "step.h"
#include "base/storage.h"
#include "tile.h"

static RowRange convert_range(const Step& s, long range, long ranges) {
  return RowRange(s.N * s.P * s.Q, 1, range, ranges, 4 * s.K);
}

// Computes y[k] = x[k], and zeros in channels [C, K), which x does not have; `converted` is called
// with vectors of x's channels, the last of which has zeros behind `count`.
template <class From, class To, class Converted>
static void convert(const Step& s, const Range& pixels, const Converted& converted) {
  for (long pixel = pixels.from; pixel < pixels.to; pixel++) {
    const From* const x = reinterpret_cast<const From*>(s.x) + pixel * s.x_pitch;
    To* const y = reinterpret_cast<To*>(s.y) + pixel * s.y_pitch;
    for (long k = 0; k < s.K; k += LANES) {
      store_first(y + k, converted(load_first(x + k, s.C - k), s.C - k), s.K - k);
    }
  }
}

#if defined(RESFUSE_U8)
constexpr long PIXELS_OF_IMAGE = 64;

// Of pixels of a few channels, one right behind the other, as images have them: whole vectors of
// values are converted, and then shared out to pixels.
static void image_to_u8(const Step& s, const Range& pixels, const Quantizer& stored) {
  Value all[(PIXELS_OF_IMAGE + 1) * LANES];
  const uint32_t taken = s.C < UNIT ? (1u << 8 * s.C) - 1 : ~0u;
  const uint32_t behind = static_cast<uint32_t>(s.y_zero) * 0x01010101u & ~taken;
  for (long from = pixels.from; from < pixels.to; from += PIXELS_OF_IMAGE) {
    const long count = min(PIXELS_OF_IMAGE, pixels.to - from), values = count * s.C;
    const float* const x = reinterpret_cast<const float*>(s.x) + from * s.C;
    for (long i = 0; i < values; i += LANES) {
      store(all + i, stored(load_first(x + i, values - i)));
    }
    Value* y = s.y + from * s.y_pitch;
    for (long i = 0; i < count; i++, y += s.y_pitch) {
      if (s.K == UNIT) {
        const uint32_t unit = (read(as_units(all + i * s.C)) & taken) | behind;
        std::memcpy(y, &unit, sizeof unit);
      } else {
        for (long k = 0; k < s.K; k++) y[k].bits = k < s.C ? all[i * s.C + k].bits : s.y_zero;
      }
    }
  }
}

static void to_u8(const Step& s, const Range& pixels) {
  const Quantizer stored(s.y_inverse_scale, s.y_zero);
  if (s.x_pitch == s.C && s.C < LANES) return image_to_u8(s, pixels, stored);
  // a real zero behind x's channels becomes the zero point
  const auto converted = [&](Floats v, long) ALWAYS_INLINE_LAMBDA { return stored(v); };
  convert<float, Value>(s, pixels, converted);
}

static void to_fp32(const Step& s, const Range& pixels) {
  convert<Value, float>(s, pixels, [&](Floats v, long count) ALWAYS_INLINE_LAMBDA {
    Floats real = (v - static_cast<float>(s.x_zero)) * s.x_scale;
    for (long lane = count < 0 ? 0 : count; lane < LANES; lane++) real[lane] = 0;
    return real;
  });
}

static void to_bf16(const Step&, const Range&) { __builtin_trap(); }
#elif defined(RESFUSE_BF16)
static void to_bf16(const Step& s, const Range& pixels) {
  convert<float, Value>(s, pixels, [](Floats v, long) ALWAYS_INLINE_LAMBDA { return v; });
}
static void to_fp32(const Step& s, const Range& pixels) {
  convert<Value, float>(s, pixels, [](Floats v, long) ALWAYS_INLINE_LAMBDA { return v; });
}
static void to_u8(const Step&, const Range&) { __builtin_trap(); }
#else
static void to_bf16(const Step&, const Range&) { __builtin_trap(); }
static void to_fp32(const Step&, const Range&) { __builtin_trap(); }
static void to_u8(const Step&, const Range&) { __builtin_trap(); }
#endif
