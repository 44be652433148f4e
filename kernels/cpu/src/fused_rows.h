// A convolution and what alone reads it through windows (a stem's max-pool, a bottleneck's 3x3), a
// strip of the reader's rows at a time: what lies between is never whole.
//
// The rows that a strip reads lie in the thread's scratch memory; those that the next one reads,
// too, are moved to its start.
#pragma once

#include <cstring>

#include "fused_chain.h"
#include "pool.h"

static void reader_in(const Step& s, const Part& rows, float* scratch) {
  if (s.kind == MAX_POOL) return max_pool_in(s, rows);
  first_in(s, Part(rows.from * s.Q, rows.to * s.Q), scratch);
}

// The rows of the convolution that are in a thread's scratch memory, of all images' as if one lay
// below the other, and the reader's row that reads on from them.
struct Strip {
  long first = 0, last = 0, next = -1;
};

// A thread's range, of the reader's rows.
struct StripsRange {
  Part rows;
  Cut cut;

  StripsRange(const Step* steps, long range, long ranges)
      : rows(steps[1].N * steps[1].P, 1, range, ranges),
        cut(strips(steps[1]), 1, static_cast<double>(steps->Q) * rows.count() *
                                     steps[1].stride_h * steps->K * steps->R * steps->S *
                                     (steps->C / steps->groups)) {}

  // Where the strip that begins at a row ends: each image has its own.
  long end(const Step& reader, long from) const {
    return least(least(from + reader.rows, rows.to), (from / reader.P + 1) * reader.P);
  }

  Part piece(const Step& reader, long i) const {
    const Part wanted = cut.block(i);
    long from = rows.from, strip = 0;
    for (; strip < wanted.from; strip++) from = end(reader, from);
    long to = from;
    for (; strip < wanted.to; strip++) to = end(reader, to);
    return Part(from, to);
  }

 private:
  long strips(const Step& reader) const {
    long count = 0;
    for (long from = rows.from; from < rows.to; from = end(reader, from)) count++;
    return count;
  }
};

static void strips_piece(const Step* steps, long range, long ranges, long piece, int slot,
                         Strip& there) {
  Step conv = steps[0], reader = steps[1];
  float* const own = conv.scratch + slot * conv.scratch_pitch;
  float* const local = own + conv.y_local;
  const long line = conv.Q * conv.y_pitch, reach = (reader.R - 1) * reader.dilation_h + 1;
  const StripsRange all(steps, range, ranges);
  const Part rows = all.piece(reader, piece);
  if (there.next != rows.from) there = Strip{};
  for (long from = rows.from, to; from < rows.to; from = to) {
    const long image = from / reader.P, above = image * conv.P;
    to = all.end(reader, from);
    const long top = from % reader.P * reader.stride_h - reader.pad_h;
    const long bottom = (to - 1) % reader.P * reader.stride_h - reader.pad_h + reach;
    const long needed = above + (top < 0 ? 0 : top), end = above + least(bottom, conv.P);
    const long kept = there.last > needed ? there.last - needed : 0;
    if (kept) {
      std::memmove(local, local + (needed - there.first) * line, kept * line * sizeof(float));
    }
    conv.y = local - needed * line;  // row 0 would lie before it: steps count from the first of all
    reader.x = conv.y;
    first_in(conv, Part((needed + kept) * conv.Q, end * conv.Q), own);
    reader_in(reader, Part(from, to), reader.scratch + slot * reader.scratch_pitch);
    there = {needed, end, to};
  }
}
