// A convolution and 1x1 ones behind it, a block of pixels at a time: what one writes the next reads
// from the caches, and nobody waits for the other threads in between.
//
// The first step's block is everybody's. What only the chain reads is local: it lies in the
// thread's scratch memory, where the next block's will be.
#pragma once

#include "direct.h"
#include "grouped.h"
#include "step.h"
#include "winograd.h"

// Where the first step's unit number `unit` begins: a pixel, or in Winograd's form a row of tiles.
static inline long first_pixel(const Step& s, long unit) {
  if (s.kind != WINOGRAD) return unit;
  const long down = (s.P + 1) / 2, row = unit / ((s.Q + 1) / 2);
  return (row / down * s.P + row % down * 2) * s.Q;
}

static void first_in(const Step& s, const Part& part, float* scratch) {
  switch (s.kind) {
    case DIRECT: direct_in(s, part, Part(0, direct_panels(s)), scratch); break;
    case WINOGRAD: winograd_in(s, part, Part(0, winograd_panels(s)), scratch); break;
    default: grouped_in(s, part); break;
  }
}

static void chain(const Step* steps, long t, long threads) {
  const Step& first = steps[0];
  const bool in_tiles = first.kind == WINOGRAD;
  const long units = in_tiles ? winograd_tiles(first) : first.N * first.P * first.Q;
  const Part all(units, in_tiles ? (first.Q + 1) / 2 : PIXELS, t, threads);
  for (long from = all.from; from < all.to; from += first.block) {
    const long to = least(from + first.block, all.to);
    const Part pixels(first_pixel(first, from), first_pixel(first, to));
    for (long i = 0; i <= first.joined; i++) {
      Step s = steps[i];
      float* const scratch = s.scratch + t * s.scratch_pitch;
      // pixel 0 would lie before it: steps count from the first pixel of all
      if (s.x_local) s.x = scratch + s.x_local - pixels.from * s.x_pitch;
      if (s.residual_local) s.residual = scratch + s.residual_local - pixels.from * s.residual_pitch;
      if (s.y_local) s.y = scratch + s.y_local - pixels.from * s.y_pitch;
      if (i == 0) {
        first_in(s, Part(from, to), scratch);
      } else {
        direct_in(s, pixels, Part(0, direct_panels(s)), scratch);
      }
    }
  }
}
