// A convolution and what alone reads it through windows (a stem's max-pool, a bottleneck's 3x3), a
// strip of the reader's rows at a time: what lies between is never whole.
//
// The rows that a strip reads lie in the thread's scratch memory; those that the next one reads,
// too, are moved to its start.
#pragma once

#include <cstring>

#include "fused_chain.h"
#include "pool.h"

static void run_reader(const Step& s, const Range& rows, float* scratch) {
  if (s.kind == MAX_POOL) return max_pool(s, rows);
  run_first(s, Range(rows.from * s.Q, rows.to * s.Q), scratch);
}

// The rows of the convolution that are in a thread's scratch memory, of all images' as if one lay
// below the other, and the reader's row that reads on from them.
struct RowCache {
  long first = 0, last = 0, next = -1;
};

// A thread's range, of the reader's rows.
struct FusedRowsRange {
  Range rows;
  Partition partition;

  FusedRowsRange(const Step* steps, long range, long ranges)
      : rows(steps[1].N * steps[1].P, 1, range, ranges),
        partition(strips(steps[1]), 1, static_cast<double>(steps->Q) * rows.count() *
                                     steps[1].stride_h * steps->K * steps->R * steps->S *
                                     (steps->C / steps->groups)) {}

  // Where the strip that begins at a row ends: each image has its own.
  long end(const Step& reader, long from) const {
    return min(min(from + reader.rows, rows.to), (from / reader.P + 1) * reader.P);
  }

  Range piece(const Step& reader, long i) const {
    const Range wanted = partition.block(i);
    long from = rows.from, strip = 0;
    for (; strip < wanted.from; strip++) from = end(reader, from);
    long to = from;
    for (; strip < wanted.to; strip++) to = end(reader, to);
    return Range(from, to);
  }

 private:
  long strips(const Step& reader) const {
    long count = 0;
    for (long from = rows.from; from < rows.to; from = end(reader, from)) count++;
    return count;
  }
};

static void fused_rows_piece(const Step* steps, long range, long ranges, long piece, int slot,
                         RowCache& cached) {
  Step conv = steps[0], reader = steps[1];
  float* const own = conv.scratch + slot * conv.scratch_pitch;
  float* const local = own + conv.y_local;
  const long line = conv.Q * conv.y_pitch, reach = (reader.R - 1) * reader.dilation_h + 1;
  const FusedRowsRange own_range(steps, range, ranges);
  const Range rows = own_range.piece(reader, piece);
  if (cached.next != rows.from) cached = RowCache{};
  for (long from = rows.from, to; from < rows.to; from = to) {
    const long image = from / reader.P, above = image * conv.P;
    to = own_range.end(reader, from);
    const long top = from % reader.P * reader.stride_h - reader.pad_h;
    const long bottom = (to - 1) % reader.P * reader.stride_h - reader.pad_h + reach;
    const long needed = above + (top < 0 ? 0 : top), end = above + min(bottom, conv.P);
    const long kept = cached.last > needed ? cached.last - needed : 0;
    if (kept) {
      std::memmove(local, local + (needed - cached.first) * line, kept * line * sizeof(float));
    }
    conv.y = local - needed * line;  // row 0 would lie before it: steps count from the first of all
    reader.x = conv.y;
    run_first(conv, Range((needed + kept) * conv.Q, end * conv.Q), own);
    run_reader(reader, Range(from, to), reader.scratch + slot * reader.scratch_pitch);
    cached = {needed, end, to};
  }
}
