// Ranges of pixels, rows and panels, and how the range of a thread is divided into pieces that
// other threads can take over.
#pragma once

static inline long min(long a, long b) { return a < b ? a : b; }

// [from, to)
struct Range {
  long from, to;
  Range(long from, long to) : from(from), to(to) {}

  // The share of `count` that thread `t` of `threads` gets, in whole multiples of `unit`.
  Range(long count, long unit, long t, long threads) {
    long units = (count + unit - 1) / unit;
    from = units * t / threads * unit;
    to = min(count, units * (t + 1) / threads * unit);
  }

  long count() const { return to - from; }
  long blocks(long size) const { return (count() + size - 1) / size; }

  // The part of this range that its blocks [blocks.from, blocks.to), each of `size`, cover.
  Range of(const Range& blocks, long size = 1) const {
    return Range(from + blocks.from * size, min(to, from + blocks.to * size));
  }
};

// Enough pieces for the other threads to take over the work of one that is descheduled.
constexpr long PIECES_PER_RANGE = 16;
constexpr double MIN_PIECE_MULTIPLICATIONS = 1 << 20;  // some 10 us

// Divides a thread's range of a step into pieces of whole blocks or, where there are fewer blocks
// than pieces are wanted, each block into groups of panels.

struct Partition {
  long blocks, panel_groups, pieces;

  Partition(long blocks, long panels, double multiplications) : blocks(blocks), panel_groups(1) {
    const double enough = multiplications / MIN_PIECE_MULTIPLICATIONS;
    const long wanted = enough < 1                  ? 1
                        : enough < PIECES_PER_RANGE ? static_cast<long>(enough)
                                                    : PIECES_PER_RANGE;
    if (0 < blocks && blocks < wanted) panel_groups = min(panels, (wanted + blocks - 1) / blocks);
    pieces = blocks < wanted ? blocks * panel_groups : min(blocks, wanted);
  }

  // The blocks of piece `i`, and its panels.
  Range block(long i) const {
    return panel_groups > 1 ? Range(i / panel_groups, i / panel_groups + 1)
                            : Range(blocks, 1, i, pieces);
  }
  Range panels(long panels, long i) const {
    return Range(panels, 1, i % panel_groups, panel_groups);
  }
};

// A thread's range of rows, pixels or vectors, all of which take the same time.
struct RowRange {
  Range range;
  Partition partition;

  RowRange(long count, long unit, long thread, long threads, double multiplications_of_each)
      : range(count, unit, thread, threads),
        partition(range.blocks(unit), 1, range.count() * multiplications_of_each),
        unit_(unit) {}

  Range piece(long i) const { return range.of(partition.block(i), unit_); }

 private:
  long unit_;
};
