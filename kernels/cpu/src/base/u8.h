// Values stored as uint8, each of which stands for scale * (q - zero point), a scale and a zero
// point for a tensor; and the products of four of them with four int8 weights, added to an int32.
//
// There are three forms of the product, which give the same bits, since no sum overflows (Python
// refuses convolutions that are so deep):
// - VNNI: VPDPBUSD, of AVX-512 or AVX, and USDOT of ARM;
// - by halves (-DRESFUSE_NO_VNNI): even and odd channels one after the other, each widened to 16
//   bits, by VPMADDWD. VPMADDUBSW would need half the instructions, but saturates the sum of two
//   products at 32767: 255 * 127 twice is more;
// - portable (-DRESFUSE_PORTABLE_U8): channel by channel in 32 bits.
//
// What follows the sums is float32 without fused multiply-adds (-ffp-contract=off), so that all
// processors, and the twins in kernels/ops/quantization.py, round alike.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__ARM_FEATURE_MATMUL_INT8)
#include <arm_neon.h>
#endif

#if defined(RESFUSE_PORTABLE_U8)
#define RESFUSE_U8_FORM 0
#elif !defined(RESFUSE_NO_VNNI) && \
    (defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_MATMUL_INT8))
#define RESFUSE_U8_FORM 2
#elif defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__)) || \
    (defined(__SSE2__) && !defined(__AVX__))
#define RESFUSE_U8_FORM 1
#define RESFUSE_U8_BY_HALVES
#else
#define RESFUSE_U8_FORM 0
#endif

typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
typedef uint16_t UnsignedShorts __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

// Units

static inline Words load(const Unit* from) { return *reinterpret_cast<const Words*>(from); }

static ALWAYS_INLINE uint32_t read(const Unit* from) {
  uint32_t unit;
  std::memcpy(&unit, from, sizeof unit);
  return unit;
}
// Of the last unit of a number of channels that is no multiple of four: what lies behind its first
// `count` is not read.
static ALWAYS_INLINE uint32_t read_first(const Unit* from, long count) {
  const Value* const channel = from->channels;
  uint32_t unit = channel[0].bits;
  if (count > 1) unit |= static_cast<uint32_t>(channel[1].bits) << 8;
  if (count > 2) unit |= static_cast<uint32_t>(channel[2].bits) << 16;
  return unit;
}

#if RESFUSE_U8_FORM == 2
static ALWAYS_INLINE Ints multiply_add(Ints sum, uint32_t x, Words w) {
#if defined(__AVX512VNNI__)
  const __m512i values = _mm512_set1_epi32(static_cast<int>(x));
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, values, (__m512i)w);
#elif defined(__AVXVNNI__)
  const __m256i values = _mm256_set1_epi32(static_cast<int>(x));
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, values, (__m256i)w);
#else
  const uint8x16_t values = vreinterpretq_u8_u32(vdupq_n_u32(x));
  return (Ints)vusdotq_s32((int32x4_t)sum, values, (int8x16_t)w);
#endif
}
#elif RESFUSE_U8_FORM == 1
// Between the halves rows are read once more: GCC would keep both halves of all rows in registers,
// of which there are too few.
#define KEEP_ORDER() __asm__ volatile("" ::: "memory")

// Keeps GCC from computing with scalars what has been broadcast, and from adding up products before
// they are added to a sum, for which it stored them all.
template <class Vector>
static ALWAYS_INLINE Vector opaque(Vector v) {
  __asm__("" : "+x"(v));
  return v;
}

// The even (HALF 0) or odd channels of units, in 16 bits.
template <long HALF>
static ALWAYS_INLINE Shorts half_of_values(uint32_t x) {
  const Words units = opaque(x - Words{});
  if constexpr (HALF) return (Shorts)((UnsignedShorts)units >> 8);
#if defined(__AVX2__) && !defined(__AVX512F__)
  // The mask stays in memory: it would be the 17th register, and convolutions of a ResNet-50 take
  // 1.01 to 1.25 times as long where GCC keeps it in one (a Zen 3).
  alignas(4 * LANES) static const uint32_t even[] = {
      0xff00ff, 0xff00ff, 0xff00ff, 0xff00ff, 0xff00ff, 0xff00ff, 0xff00ff, 0xff00ff};
  Shorts values;
  __asm__("vpand %2, %1, %0" : "=x"(values) : "x"(units), "m"(*(const uint32_t(*)[8])even));
  return values;
#else
  return (Shorts)(units & 0x00ff00ffu);
#endif
}
template <long HALF>
static ALWAYS_INLINE Shorts half_of_weights(Words w) {
  const Shorts both = (Shorts)w;
  return (HALF ? both : both << 8) >> 8;
}
static ALWAYS_INLINE Ints multiply_add(Ints sum, Shorts x, Shorts w) {
#if defined(__AVX512BW__)
  return opaque(sum + (Ints)_mm512_madd_epi16((__m512i)x, (__m512i)w));
#elif defined(__AVX2__)
  return opaque(sum + (Ints)_mm256_madd_epi16((__m256i)x, (__m256i)w));
#else
  return opaque(sum + (Ints)_mm_madd_epi16((__m128i)x, (__m128i)w));
#endif
}
#else
static ALWAYS_INLINE Ints multiply_add(Ints sum, uint32_t x, Words w) {
  const Ints weights = (Ints)w;
  UNROLLED for (int i = 0; i < 4; i++) {
    sum += (weights << (24 - 8 * i) >> 24) * static_cast<int>(x >> (8 * i) & 0xff);
  }
  return sum;
}
#endif

// Values

static ALWAYS_INLINE Ints widened(Bytes bytes) {
#if defined(__AVX512F__)  // GCC 12 converts lane by lane
  return (Ints)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
#else
  return __builtin_convertvector(bytes, Ints);
#endif
}
static ALWAYS_INLINE Bytes narrowed(Ints v) {  // of 0..255
#if defined(__AVX512F__)
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
  const __m256i all = (__m256i)v;
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  return (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(words, words));
#else
  return __builtin_convertvector(v, Bytes);
#endif
}

static ALWAYS_INLINE Floats as_floats(Ints v) { return __builtin_convertvector(v, Floats); }

static ALWAYS_INLINE Ints load_ints(const Value* from) {
  return widened(*reinterpret_cast<const Bytes*>(from));
}
static ALWAYS_INLINE Ints load_first_ints(const Value* from, long count) {
  if (count >= LANES) return load_ints(from);
  Bytes some = {};
  for (long lane = 0; lane < count; lane++) some[lane] = from[lane].bits;
  return widened(some);
}
// The numbers that are stored, not those that they stand for.
static ALWAYS_INLINE Floats load(const Value* from) { return as_floats(load_ints(from)); }
static ALWAYS_INLINE Floats load_first(const Value* from, long count) {
  return as_floats(load_first_ints(from, count));
}

// Real numbers as they are stored: v * inverse_scale, rounded to the nearest and halfway to the
// even, plus the zero point, clipped to 0..255. NaN becomes the zero point.
struct Quantizer {
  Floats inverse_scale, least, largest;
  Ints zero;

  static constexpr float TO_INTEGER = 12582912;  // 1.5 * 2^23: bits of a sum with it end in an integer
  static constexpr int BITS_OF_IT = 0x4B400000;

  ALWAYS_INLINE Quantizer(float inverse_scale, long zero_point)
      : inverse_scale(broadcast(inverse_scale)),
        least(broadcast(static_cast<float>(-zero_point))),
        largest(broadcast(static_cast<float>(255 - zero_point))),
        zero(static_cast<int>(zero_point) - BITS_OF_IT - Ints{}) {}

  ALWAYS_INLINE Ints operator()(Floats v) const {
    const Floats scaled = v * inverse_scale;
    const Floats number = (Floats)((Ints)scaled & (scaled == scaled));
    const Floats clipped = at_most(largest, at_least(least, number));
    return (Ints)(clipped + TO_INTEGER) + zero;
  }
};

// Stores numbers in 0..255.
static ALWAYS_INLINE void store(Value* to, Ints v) {
  *reinterpret_cast<Bytes*>(to) = narrowed(v);
}
static ALWAYS_INLINE void store_first(Value* to, Ints v, long count) {
  if (count >= LANES) return store(to, v);
  const Bytes some = narrowed(v);
  for (long lane = 0; lane < count; lane++) to[lane].bits = some[lane];
}
