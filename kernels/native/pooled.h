// A convolution and the max-pool that alone reads it (a network's stem), a strip of the pool's rows
// at a time: the convolution's output, the largest value of many a network, is never whole.
//
// The second step's block is the rows of a strip. The rows of the convolution that a strip reads lie
// in the thread's scratch memory; those that the next one reads, too, are moved to its start.
#pragma once

#include <cstring>

#include "chain.h"
#include "pool.h"

static void pooled(const Step* steps, long t, long threads) {
  Step conv = steps[0], pool = steps[1];
  float* const scratch = conv.scratch + t * conv.scratch_pitch;
  float* const local = scratch + conv.y_local;
  const long line = conv.Q * conv.y_pitch, reach = (pool.R - 1) * pool.dilation_h + 1;
  const Part rows(pool.N * pool.P, 1, t, threads);
  long first = 0, last = 0;  // rows that are there, of all images' as if one lay below the other
  for (long from = rows.from, to; from < rows.to; from = to) {
    const long image = from / pool.P, above = image * conv.P;
    to = least(least(from + pool.block, rows.to), (image + 1) * pool.P);
    const long top = from % pool.P * pool.stride_h - pool.pad_h;
    const long bottom = (to - 1) % pool.P * pool.stride_h - pool.pad_h + reach;
    const long needed = above + (top < 0 ? 0 : top), end = above + least(bottom, conv.P);
    const long kept = last > needed ? last - needed : 0;
    if (kept) std::memmove(local, local + (needed - first) * line, kept * line * sizeof(float));
    conv.y = local - needed * line;  // row 0 would lie before it: steps count from the first of all
    pool.x = conv.y;
    first_in(conv, Part((needed + kept) * conv.Q, end * conv.Q), scratch);
    max_pool_in(pool, Part(from, to));
    first = needed, last = end;
  }
}
