// A tile of a matrix product in registers: M rows (pixels) by N vectors (output channels).
#pragma once

#include "vectors.h"

constexpr long LINE = 16;    // floats of a cache line
constexpr long DEPTH = 128;  // channels whose weights, times PANEL, fill a first-level cache
constexpr long TOGETHER = 4;  // channels of an iteration, which shares its counting among them

// What the next tile will read and write, fetched while this one computes: a burst of prefetches
// would fill the buffers that this one's loads need. Wide 1x1s with a residual elsewhere take 0.88 to
// 0.98 of the time they take with the residual fetched alone (in turns, two cores).
struct Next {
  long x = 0;                                    // floats from this tile's rows, 0: nothing
  const float *y = nullptr, *residual = nullptr;  // null: nothing, or what y is written over
  long y_pitch = 0, residual_pitch = 0;
};

template <long M, long N>
struct Tile {
  Floats sum[M][N];

  static constexpr long rows = M, columns = N * LANES;

  inline void start(const float* bias) {
    UNROLLED for (long m = 0; m < M; m++) {
      UNROLLED for (long n = 0; n < N; n++) sum[m][n] = bias ? load(bias + n * LANES) : Floats{};
    }
  }

  // Sums that were put away, M rows of PANEL. Each slice is summed up by itself and then added: one
  // long sum is several times as far from fp64 (1.5e-6 for 2.6e-7, a 3x3 of 512 channels).
  inline void plus(const float* from) {
    UNROLLED for (long m = 0; m < M; m++) {
      UNROLLED for (long n = 0; n < N; n++) sum[m][n] += load(from + m * PANEL + n * LANES);
    }
  }

  inline void put_away(float* to) const {
    UNROLLED for (long m = 0; m < M; m++) {
      UNROLLED for (long n = 0; n < N; n++) store(to + m * PANEL + n * LANES, sum[m][n]);
    }
  }

  // sum += x[m][0..depth) @ w[0..depth)[N * LANES]; returns where the weights go on. `ahead` (may be
  // null) is fetched, a line for each channel of a whole iteration.
  inline const float* add(const float* const* x, const float* w, long depth, const float* ahead,
                          const Next& next) {
    const float* row[M];
    UNROLLED for (long m = 0; m < M; m++) row[m] = x[m];
    Held<Tile> held = *this;
    for (long from = 0; from < depth; from += LINE) {
      if (next.x) {
        UNROLLED for (long m = 0; m < M; m++) __builtin_prefetch(row[m] + from + next.x, 0, 3);
      }
      if (next.y && from < columns) {
        UNROLLED for (long m = 0; m < M; m++) {
          __builtin_prefetch(next.y + m * next.y_pitch + from, 1, 3);
        }
      }
      if (next.residual && from < columns) {
        UNROLLED for (long m = 0; m < M; m++) {
          __builtin_prefetch(next.residual + m * next.residual_pitch + from, 0, 3);
        }
      }
      const long to = from + LINE < depth ? from + LINE : depth;
      long c = from;
      for (; c + TOGETHER <= to; c += TOGETHER, w += TOGETHER * columns) {
        if (ahead) {
          UNROLLED for (long i = 0; i < TOGETHER; i++) __builtin_prefetch(ahead + i * LINE, 0, 2);
          ahead += TOGETHER * LINE;
        }
        UNROLLED for (long i = 0; i < TOGETHER; i++) held.add(row, c + i, w + i * columns);
      }
      for (; c < to; c++, w += columns) held.add(row, c, w);
    }
    *this = held;
    return w;
  }

  // sum += row[m][c] @ w[N * LANES]
  inline void add(const float* const* row, long c, const float* w) {
    Floats weight[N];
    UNROLLED for (long n = 0; n < N; n++) weight[n] = load(w + n * LANES);
    UNROLLED for (long m = 0; m < M; m++) {
      UNROLLED for (long n = 0; n < N; n++) sum[m][n] += row[m][c] * weight[n];
    }
  }
};

// Weights that are wanted next, and are fetched into the second-level cache by the tiles before.
class Ahead {
  const float* next_;
  const float* const end_;

 public:
  Ahead(const float* from, long floats) : next_(from), end_(from + floats) {}

  // Where a tile fetches `depth` lines from; null once all are fetched.
  const float* take(long depth) {
    const float* const from = next_ < end_ ? next_ : nullptr;
    next_ += depth * LINE;
    return from;
  }
};

// Calls `body.template operator()<M, N>(row)` for tiles that cover rows [from, to), N fixed.
template <long N, class Body>
static inline void each_tile(long from, long to, const Body& body) {
  long row = from;
  for (; row + PIXELS <= to; row += PIXELS) body.template operator()<PIXELS, N>(row);
  switch (to - row) {
    case 1: body.template operator()<1, N>(row); break;
    case 2: body.template operator()<2, N>(row); break;
    case 3: body.template operator()<3, N>(row); break;
    case 4: body.template operator()<4, N>(row); break;
    case 5: body.template operator()<5, N>(row); break;
  }
}

// The same with as many vectors as `channels` has, at most VECTORS.
template <class Body>
static inline void each_tile_of(long channels, long from, long to, const Body& body) {
  switch (channels / LANES) {
    case 1: each_tile<1>(from, to, body); break;
    case 2: each_tile<2>(from, to, body); break;
    case 3:
      if constexpr (VECTORS >= 3) each_tile<3>(from, to, body);
      break;
    case 4:
      if constexpr (VECTORS >= 4) each_tile<4>(from, to, body);
      break;
  }
}

static inline long least(long a, long b) { return a < b ? a : b; }

// The part of `count` that thread `t` of `threads` gets, in whole multiples of `unit`.
struct Part {
  long from, to;
  Part(long from, long to) : from(from), to(to) {}
  Part(long count, long unit, long t, long threads) {
    long units = (count + unit - 1) / unit;
    from = units * t / threads * unit;
    to = least(count, units * (t + 1) / threads * unit);
  }

  long count() const { return to - from; }
  long blocks(long size) const { return (count() + size - 1) / size; }
  // Some of its blocks of `size`.
  Part of(const Part& blocks, long size = 1) const {
    return Part(from + blocks.from * size, least(to, from + blocks.to * size));
  }
};

// How a thread's range of a step is cut: into pieces of whole blocks, or of one block's panels.
constexpr long PIECES = 16;           // enough for others to take over from a thread that halts
constexpr double SMALLEST = 1 << 20;  // multiplications of a piece: some 10 us

struct Cut {
  long blocks, groups, pieces;

  Cut(long blocks, long panels, double multiplications) : blocks(blocks), groups(1) {
    const double enough = multiplications / SMALLEST;
    const long wanted = enough < 1 ? 1 : enough < PIECES ? static_cast<long>(enough) : PIECES;
    if (0 < blocks && blocks < wanted) groups = least(panels, (wanted + blocks - 1) / blocks);
    pieces = blocks < wanted ? blocks * groups : least(blocks, wanted);
  }

  // The blocks, and the panels, of piece `i`.
  Part block(long i) const {
    return groups > 1 ? Part(i / groups, i / groups + 1) : Part(blocks, 1, i, pieces);
  }
  Part panels(long panels, long i) const { return Part(panels, 1, i % groups, groups); }
};

// A thread's range of rows, pixels or vectors that are all alike.
struct Rows {
  Part all;
  Cut cut;

  Rows(long count, long unit, long range, long ranges, double multiplications_of_each)
      : all(count, unit, range, ranges),
        cut(all.blocks(unit), 1, all.count() * multiplications_of_each),
        unit_(unit) {}

  Part piece(long i) const { return all.of(cut.block(i), unit_); }

 private:
  long unit_;
};
