// The GEMM micro-kernel: a tile of MR rows (pixels) by NR columns (output channels) in registers.
// Tiles at an edge are smaller: M rows by N vectors.
#pragma once

#include "base/dcheck.h"
#include "base/range.h"
#include "base/storage.h"
#include "base/vectors.h"
#include "step.h"

constexpr long CACHE_LINE = 16;  // floats, or units
constexpr long KC = 128;         // units of a slice: KC x NR weights fill a first-level cache
constexpr long K_UNROLL = 4;     // units per iteration, to amortise the loop's overhead

// What the next tile reads and writes, prefetched spread over this tile's products: a burst of
// prefetches would fill the buffers that this tile's loads need. To prefetch y as well as a
// residual that lies elsewhere makes wide 1x1 convolutions 1.02 to 1.14 times faster than the
// residual alone (timed in turns, two cores).
struct Prefetch {
  long x = 0;                                    // units from this tile's rows to the next's, or 0
  const Value *y = nullptr, *residual = nullptr;  // or null; no residual where it is y itself
  long y_pitch = 0, residual_pitch = 0;
};

template <class Number>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef Floats type;
};
template <>
struct VectorOf<int> {
  typedef Ints type;
};

// `Number` is float or, of the products of uint8, int.
template <long M, long N, class Number = float>
struct Tile {
  typedef typename VectorOf<Number>::type Vector;
  Vector acc[M][N];

  static constexpr long rows = M, columns = N * LANES;

  ALWAYS_INLINE void init(const Number* first) {
    UNROLLED for (long m = 0; m < M; m++) {
      UNROLLED for (long n = 0; n < N; n++) acc[m][n] = first ? load(first + n * LANES) : Vector{};
    }
  }

  // Partial sums are M rows of NR. Each slice of channels is summed up by itself and then added to
  // them: a single long sum is further from fp64 (1.5e-6 against 2.6e-7 for a 3x3 of 512 channels).
  ALWAYS_INLINE void accumulate_partial(const Number* from) {
    UNROLLED for (long m = 0; m < M; m++) {
      UNROLLED for (long n = 0; n < N; n++) acc[m][n] += load(from + m * NR + n * LANES);
    }
  }

  ALWAYS_INLINE void save_partial(Number* to) const {
    UNROLLED for (long m = 0; m < M; m++) {
      UNROLLED for (long n = 0; n < N; n++) store(to + m * NR + n * LANES, acc[m][n]);
    }
  }

  // acc += x[m][0..depth) @ w[0..depth)[N * LANES]; returns the end of those weights. Of `next_w`
  // (may be null) a cache line is prefetched for each unit of a whole iteration.
  // `Element` and `Weight` are both a float or, in direct convolutions, a Unit of channels; or a
  // float and a Value, in Winograd's.
  template <class Element, class Weight>
  ALWAYS_INLINE const Weight* accumulate(const Element* const* x, const Weight* w, long depth,
                                         const Weight* next_w, const Prefetch& next) {
    const Element* row[M];
    UNROLLED for (long m = 0; m < M; m++) row[m] = x[m];
    Accumulators<Tile> tile = *this;
    for (long from = 0; from < depth; from += CACHE_LINE) {
      if (next.x) {
        UNROLLED for (long m = 0; m < M; m++) __builtin_prefetch(row[m] + from + next.x, 0, 3);
      }
      if (next.y && UNIT * from < columns) {
        UNROLLED for (long m = 0; m < M; m++) {
          __builtin_prefetch(next.y + m * next.y_pitch + UNIT * from, 1, 3);
        }
      }
      if (next.residual && UNIT * from < columns) {
        UNROLLED for (long m = 0; m < M; m++) {
          __builtin_prefetch(next.residual + m * next.residual_pitch + UNIT * from, 0, 3);
        }
      }
      const long to = from + CACHE_LINE < depth ? from + CACHE_LINE : depth;
      long c = from;
      for (; c + K_UNROLL <= to; c += K_UNROLL, w += K_UNROLL * columns) {
        if (next_w) {
          UNROLLED for (long i = 0; i < K_UNROLL; i++) {
            __builtin_prefetch(next_w + i * CACHE_LINE, 0, 2);
          }
          next_w += K_UNROLL * CACHE_LINE;
        }
        UNROLLED for (long i = 0; i < K_UNROLL; i++) {
          tile.accumulate_unit(row, c + i, w + i * columns);
        }
      }
      for (; c < to; c++, w += columns) tile.accumulate_unit(row, c, w);
    }
    *this = tile;
    return w;
  }

  // acc += row[m][c] @ w[N * LANES]
  template <class Element, class Weight>
  ALWAYS_INLINE void accumulate_unit(const Element* const* row, long c, const Weight* w) {
    accumulate_read(w, [&](long m) ALWAYS_INLINE_LAMBDA { return read(row[m] + c); });
  }

  // The same for the first `count` channels of a unit: what lies behind them in a row is not read.
  // Returns the end of its weights.
  template <class Element>
  ALWAYS_INLINE const Element* accumulate_first(const Element* const* row, long c,
                                                const Element* w, long count) {
    accumulate_read(w, [&](long m) ALWAYS_INLINE_LAMBDA { return read_first(row[m] + c, count); });
    return w + columns;
  }

#if defined(RESFUSE_U8_BY_HALVES)
  // The products of the even (HALF 0) or odd channels of a unit: all at once would need 19
  // registers of AVX2's 16.
  template <long HALF, class OfRow>
  ALWAYS_INLINE void accumulate_half(const Unit* w, const OfRow& of_row) {
    Shorts weight[N];
    UNROLLED for (long n = 0; n < N; n++) weight[n] = half_of_weights<HALF>(load(w + n * LANES));
    UNROLLED for (long m = 0; m < M; m++) {
      const Shorts x = half_of_values<HALF>(of_row(m));
      UNROLLED for (long n = 0; n < N; n++) acc[m][n] = multiply_add(acc[m][n], x, weight[n]);
    }
  }
#endif

  // acc += of_row(m) @ w[N * LANES]
  template <class Weight, class OfRow>
  ALWAYS_INLINE void accumulate_read(const Weight* w, const OfRow& of_row) {
#if defined(RESFUSE_U8_BY_HALVES)
    if constexpr (sizeof(Weight) == sizeof(Unit)) {
      accumulate_half<0>(w, of_row);
      KEEP_ORDER();
      accumulate_half<1>(w, of_row);
    } else
#endif
    {
      decltype(load(w)) weight[N];
      UNROLLED for (long n = 0; n < N; n++) weight[n] = load(w + n * LANES);
      UNROLLED for (long m = 0; m < M; m++) {
        UNROLLED for (long n = 0; n < N; n++) {
          acc[m][n] = multiply_add(acc[m][n], of_row(m), weight[n]);
        }
      }
    }
  }
};

// Returns the output channels of a group, in whole vectors.
static inline long vectors_of_group(const Step& s) { return whole_vectors(s.K / s.groups); }

// Returns the panels of up to NR output channels of a group.
static inline long group_panels(const Step& s) { return (vectors_of_group(s) + NR - 1) / NR; }

// A panel of output channels [k, k + width), whole vectors, of one group; panels are numbered one
// group after another. `before` is the sum of the widths of those before it.
struct Panel {
  long group, k, width, before;

  Panel(const Step& s, long number) : group(number / group_panels(s)) {
    const long first = number % group_panels(s) * NR;
    k = group * (s.K / s.groups) + first;
    width = min(NR, vectors_of_group(s) - first);
    before = group * vectors_of_group(s) + first;
  }
};

// The weights of the next slice, which the tiles of this one prefetch into the second-level cache.
template <class Element>
class WeightPrefetch {
  const Element* next_;
  const Element* const end_;

 public:
  WeightPrefetch(const Element* from, long count) : next_(from), end_(from + count) {}

  // Returns where a tile prefetches `depth` lines from; null once all have been.
  const Element* take(long depth) {
    const Element* const from = next_ < end_ ? next_ : nullptr;
    next_ += depth * CACHE_LINE;
    return from;
  }
};

// Calls `body.template operator()<M, N>(row)` for tiles that cover rows [from, to), with N fixed.
template <long N, class Body>
static inline void for_each_tile(long from, long to, const Body& body) {
  long row = from;
  for (; row + MR <= to; row += MR) body.template operator()<MR, N>(row);
  switch (to - row) {
    case 1: body.template operator()<1, N>(row); break;
    case 2: body.template operator()<2, N>(row); break;
    case 3: body.template operator()<3, N>(row); break;
    case 4: body.template operator()<4, N>(row); break;
    case 5: body.template operator()<5, N>(row); break;
  }
}

// Calls for_each_tile with N = channels / LANES, at most NR_VECTORS.
template <class Body>
static inline void for_each_tile_of_width(long channels, long from, long to, const Body& body) {
  DCHECK(0 < channels && channels <= NR && channels % LANES == 0);
  switch (channels / LANES) {
    case 1: for_each_tile<1>(from, to, body); break;
    case 2: for_each_tile<2>(from, to, body); break;
    case 3:
      if constexpr (NR_VECTORS >= 3) for_each_tile<3>(from, to, body);
      break;
    case 4:
      if constexpr (NR_VECTORS >= 4) for_each_tile<4>(from, to, body);
      break;
  }
}
