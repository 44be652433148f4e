// The type that values are stored in. The library is compiled once for float32 and, where they are
// asked for, once more for bfloat16 (-DRESFUSE_BF16) and for uint8 (-DRESFUSE_U8; u8.h). All
// arithmetic on bfloat16 is in float32: it is converted by loads, and rounded once by stores, to
// nearest even; NaN stays NaN.
//
// Convolutions take their channels unit by unit, four bytes at a time: a float, four uint8, or a
// pair of bfloat16 whose two products are added to the same sum. AVX512-BF16 has an instruction for that,
// VDPBF16PS: it adds the product of the higher channel first, then that of the lower one, each
// rounded as by a fused multiply-add. Where it is missing (or -DRESFUSE_NO_BF16_DOT), two
// multiply-adds do the same in the same order, so that where the processor fuses them only
// denormal numbers differ, which the instruction takes for zeros.
//
// AMX would be a third form of `multiply_add`, with tiles for accumulators: it needs a Tile of its
// own, on the same packed weights. So for uint8 (TDPBUSD): a tile of 16 units of channels by 16
// output channels is the layout of its second operand.
#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

enum Storage : long { FP32 = 0, BF16 = 1, U8 = 2 };

#if !defined(RESFUSE_BF16) && !defined(RESFUSE_U8)
constexpr Storage STORAGE = FP32;
typedef float Value;
typedef float Unit;
typedef Floats Sum;
typedef float SumInMemory;
#elif defined(RESFUSE_BF16)
constexpr Storage STORAGE = BF16;
struct Value {
  uint16_t bits;
};
struct Unit {
  Value low, high;
};
typedef Floats Sum;
typedef float SumInMemory;
#else
constexpr Storage STORAGE = U8;
struct Value {
  uint8_t bits;
};
struct Unit {
  Value channels[4];
};
typedef Ints Sum;  // of the products of a convolution of values
typedef int SumInMemory;
#endif

constexpr long UNIT = sizeof(Unit) / sizeof(Value);  // channels

// Returns the units of a number of channels; the last one may be partly empty.
static inline long units_of(long channels) { return (channels + UNIT - 1) / UNIT; }

// Returns the floats of scratch memory that so many values take.
static inline long floats_of(long values) { return units_of(values); }

static inline const Unit* as_units(const Value* from) {
  return reinterpret_cast<const Unit*>(from);
}

// A unit of a row of x; `multiply_add` takes it, a sum and weights.
static ALWAYS_INLINE float read(const float* from) { return *from; }

#if defined(RESFUSE_BF16)
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t Pairs __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

#if defined(__AVX512BF16__) && !defined(RESFUSE_NO_BF16_DOT)
#define RESFUSE_BF16_DOT
#endif

static inline Floats widened(Halves halves) {
#if defined(__AVX512F__)  // GCC 12 converts half by half
  const Pairs wide = (Pairs)_mm512_cvtepu16_epi32((__m256i)halves);
#else
  const Pairs wide = __builtin_convertvector(halves, Pairs);
#endif
  return reinterpret_cast<Floats>(wide << 16);
}

static inline Halves rounded(Floats v) {
#if defined(RESFUSE_BF16_DOT)
  return (Halves)_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
#else
  const Pairs bits = reinterpret_cast<Pairs>(v);
  const Pairs nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
  const Pairs both = v == v ? nearest : nan;
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtepi32_epi16((__m512i)both);
#else
  return __builtin_convertvector(both, Halves);
#endif
#endif
}

static inline Floats load(const Value* from) {
  return widened(*reinterpret_cast<const Halves*>(from));
}
static inline void store(Value* to, Floats value) {
  *reinterpret_cast<Halves*>(to) = rounded(value);
}

static inline Floats load_first(const Value* from, long count) {
  if (count >= LANES) return load(from);
  if (count <= 0) return Floats{};
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 first = static_cast<__mmask16>((1u << count) - 1);
  return widened((Halves)_mm256_maskz_loadu_epi16(first, from));
#else
  Halves some = {};
  for (long lane = 0; lane < count; lane++) some[lane] = from[lane].bits;
  return widened(some);
#endif
}
static inline void store_first(Value* to, Floats value, long count) {
  if (count >= LANES) return store(to, value);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 first = static_cast<__mmask16>((1u << count) - 1);
  _mm256_mask_storeu_epi16(to, first, (__m256i)rounded(value));
#else
  const Halves some = rounded(value);
  for (long lane = 0; lane < count; lane++) to[lane].bits = some[lane];
#endif
}

static inline Pairs load(const Unit* from) { return *reinterpret_cast<const Pairs*>(from); }

static ALWAYS_INLINE uint32_t read(const Unit* from) {
  uint32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return pair;
}
// The last unit of an odd number of channels: what lies behind its first is not read.
static ALWAYS_INLINE uint32_t read_first(const Unit* from, long) { return from->low.bits; }

static ALWAYS_INLINE Floats multiply_add(Floats sum, uint32_t x, Pairs w) {
  const Pairs pair = x - Pairs{};
#if defined(RESFUSE_BF16_DOT)
  return reinterpret_cast<Floats>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), (__m512bh)w, (__m512bh)pair));
#else
  const Pairs high = Pairs{} + 0xffff0000u;
  sum = multiply_add(sum, reinterpret_cast<Floats>(pair & high), reinterpret_cast<Floats>(w & high));
  return multiply_add(sum, reinterpret_cast<Floats>(pair << 16), reinterpret_cast<Floats>(w << 16));
#endif
}
#elif defined(RESFUSE_U8)
#include "u8.h"
#else
static ALWAYS_INLINE float read_first(const float* from, long) { return *from; }  // never called
#endif
