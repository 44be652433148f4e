// The vector of floats that this processor's registers hold, in GCC's and clang's vector extension:
// AVX-512, AVX2, SSE and NEON from one source.
#pragma once

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

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int Ints __attribute__((vector_size(4 * LANES)));

#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

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
// The first `count` lanes, and zeros in the others.
static inline Floats load_first(const float* from, long count) {
  if (count >= LANES) return load(from);
  Floats some = {};
  for (long lane = 0; lane < count; lane++) some[lane] = from[lane];
  return some;
}
static inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }
static inline Floats broadcast(float value) { return value - Floats{}; }

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
