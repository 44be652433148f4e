// A convolution and what alone reads it through windows (a stem's max-pool, a bottleneck's 3x3), a
// strip of the reader's rows at a time: what lies between is never whole.
//
// The rows that a strip reads lie in the thread's scratch memory; those that the next one reads,
// too, are moved to its start.
#pragma once

#include <cstring>

#include "chain.h"
#include "pool.h"

static void reader_in(const Step& s, const Part& rows, float* scratch) {
  if (s.kind == MAX_POOL) return max_pool_in(s, rows);
  first_in(s, Part(rows.from * s.Q, rows.to * s.Q), scratch);
}

static void strips(const Step* steps, long t, long threads) {
  Step conv = steps[0], reader = steps[1];
  float* const local = conv.scratch + t * conv.scratch_pitch + conv.y_local;
  const long line = conv.Q * conv.y_pitch, reach = (reader.R - 1) * reader.dilation_h + 1;
  const Part rows(reader.N * reader.P, 1, t, threads);
  long first = 0, last = 0;  // rows that are there, of all images' as if one lay below the other
  for (long from = rows.from, to; from < rows.to; from = to) {
    const long image = from / reader.P, above = image * conv.P;
    to = least(least(from + reader.rows, rows.to), (image + 1) * reader.P);
    const long top = from % reader.P * reader.stride_h - reader.pad_h;
    const long bottom = (to - 1) % reader.P * reader.stride_h - reader.pad_h + reach;
    const long needed = above + (top < 0 ? 0 : top), end = above + least(bottom, conv.P);
    const long kept = last > needed ? last - needed : 0;
    if (kept) std::memmove(local, local + (needed - first) * line, kept * line * sizeof(float));
    conv.y = local - needed * line;  // row 0 would lie before it: steps count from the first of all
    reader.x = conv.y;
    first_in(conv, Part((needed + kept) * conv.Q, end * conv.Q),
             conv.scratch + t * conv.scratch_pitch);
    reader_in(reader, Part(from, to), reader.scratch + t * reader.scratch_pitch);
    first = needed, last = end;
  }
}
