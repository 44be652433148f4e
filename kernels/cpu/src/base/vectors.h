// The vector of floats that this processor's registers hold, in GCC's and clang's vector extension:
// AVX-512, AVX2, SSE and NEON from one source.
#pragma once

#if defined(__SSE__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr long LANES = 16;
#elif defined(__AVX__)
constexpr long LANES = 8;
#else
constexpr long LANES = 4;
#endif

// A register tile: MR rows (pixels) by NR columns (output channels). MR x NR_VECTORS accumulators,
// NR_VECTORS weights and a pixel's value must fit into the registers (32 with AVX-512 and NEON, 16
// with AVX2).
constexpr long MR = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr long NR_VECTORS = 4;
#else
constexpr long NR_VECTORS = 2;
#endif
constexpr long NR = NR_VECTORS * LANES;

// Channels rounded up to whole vectors.
static inline long whole_vectors(long channels) { return (channels + LANES - 1) / LANES * LANES; }

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int Ints __attribute__((vector_size(4 * LANES)));
typedef int IntsInMemory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

// GCC leaves some of a tile's functions out of line, and there it keeps the accumulators in memory:
// a store for each product. 1x1 convolutions to 32 channels then ran at 0.4 of their speed.
#define ALWAYS_INLINE __attribute__((always_inline)) inline
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

// The accumulators of a loop: a local copy under clang, which keeps in memory what has an address
// (convolutions took three times as long), a reference under GCC, which keeps them in registers.
#if defined(__clang__)
template <class T>
using Accumulators = T;
#else
template <class T>
using Accumulators = T&;
#endif

static inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
static inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }
static inline Ints load(const int* from) { return *reinterpret_cast<const IntsInMemory*>(from); }
static inline void store(int* to, Ints value) { *reinterpret_cast<IntsInMemory*>(to) = value; }

#if defined(__AVX__) && !defined(__AVX512F__)
// Ones in the first `count` lanes.
static inline __m256i first_lanes(long count) {
  static const int mask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + LANES - count));
}
#endif

// The first `count` lanes, none if it is negative, and zeros in the others: no memory behind them is
// touched.
static inline Floats load_first(const float* from, long count) {
  if (count >= LANES) return load(from);
  if (count <= 0) return Floats{};
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
#elif defined(__AVX__)
  return reinterpret_cast<Floats>(_mm256_maskload_ps(from, first_lanes(count)));
#else
  Floats some = {};
  for (long lane = 0; lane < count; lane++) some[lane] = from[lane];
  return some;
#endif
}
static inline void store_first(float* to, Floats value, long count) {
  if (count >= LANES) return store(to, value);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1),
                        reinterpret_cast<__m512>(value));
#elif defined(__AVX__)
  _mm256_maskstore_ps(to, first_lanes(count), reinterpret_cast<__m256>(value));
#else
  for (long lane = 0; lane < count; lane++) to[lane] = value[lane];
#endif
}
static inline Floats broadcast(float value) { return value - Floats{}; }

// sum + a * b, rounded once where the processor can. The compiler is not to decide
// (-ffp-contract=off): GCC fused in some instances of a kernel and not in others, and the bits of a
// grouped convolution depended on the number of threads.
static ALWAYS_INLINE Floats multiply_add(Floats sum, Floats a, Floats b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a),
                                                  reinterpret_cast<__m512>(b),
                                                  reinterpret_cast<__m512>(sum)));
#elif defined(__FMA__)
  return reinterpret_cast<Floats>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a),
                                                  reinterpret_cast<__m256>(b),
                                                  reinterpret_cast<__m256>(sum)));
#elif defined(__aarch64__)
  return reinterpret_cast<Floats>(vfmaq_f32(reinterpret_cast<float32x4_t>(sum),
                                            reinterpret_cast<float32x4_t>(a),
                                            reinterpret_cast<float32x4_t>(b)));
#else
  return sum + a * b;
#endif
}
static ALWAYS_INLINE Floats multiply_add(Floats sum, float a, Floats b) {
  return multiply_add(sum, broadcast(a), b);
}

// The larger and the smaller of a limit and v; v where it is NaN, and where both are zeros. x86's
// instructions return their second operand then, which compilers do not trust the comparison to be.
static inline Floats at_least(Floats limit, Floats v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_max_ps(reinterpret_cast<__m512>(limit), reinterpret_cast<__m512>(v)));
#elif defined(__AVX__)
  return reinterpret_cast<Floats>(
      _mm256_max_ps(reinterpret_cast<__m256>(limit), reinterpret_cast<__m256>(v)));
#elif defined(__SSE__)
  return reinterpret_cast<Floats>(
      _mm_max_ps(reinterpret_cast<__m128>(limit), reinterpret_cast<__m128>(v)));
#else
  return v < limit ? limit : v;
#endif
}
static inline Floats at_most(Floats limit, Floats v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_min_ps(reinterpret_cast<__m512>(limit), reinterpret_cast<__m512>(v)));
#elif defined(__AVX__)
  return reinterpret_cast<Floats>(
      _mm256_min_ps(reinterpret_cast<__m256>(limit), reinterpret_cast<__m256>(v)));
#elif defined(__SSE__)
  return reinterpret_cast<Floats>(
      _mm_min_ps(reinterpret_cast<__m128>(limit), reinterpret_cast<__m128>(v)));
#else
  return v > limit ? limit : v;
#endif
}

// Lane j of the result is lane lanes[j] of `from`. GCC has an operation for that; clang has one for
// constant lanes only, which it makes of the loop where they turn out to be constant.
static inline Floats shuffle(Floats from, Ints lanes) {
#if defined(__clang__)
  Floats to;
  UNROLLED for (long lane = 0; lane < LANES; lane++) to[lane] = from[lanes[lane]];
  return to;
#else
  return __builtin_shuffle(from, lanes);
#endif
}
