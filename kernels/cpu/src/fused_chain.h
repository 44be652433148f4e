// A convolution and 1x1 ones behind it, a block of pixels at a time: what one writes the next reads
// from the caches, and nobody waits for the other threads in between.
//
// The first step's block is everybody's. What only the chain reads is local: it lies in the
// thread's scratch memory, where the next block's will be.
#pragma once

#include "conv_direct.h"
#include "conv_grouped.h"
#include "step.h"
#include "conv3x3_winograd.h"

// Where the first step's unit number `unit` begins: a pixel, or in Winograd's form a row of tiles.
static inline long first_pixel(const Step& s, long unit) {
  if (s.kind != WINOGRAD) return unit;
  const long down = (s.P + 1) / 2, row = unit / ((s.Q + 1) / 2);
  return (row / down * s.P + row % down * 2) * s.Q;
}

static void run_first(const Step& s, const Range& part, float* scratch) {
  switch (s.kind) {
    case DIRECT: conv_direct(s, part, Range(0, direct_panels(s)), scratch); break;
    case WINOGRAD: conv3x3_winograd(s, part, Range(0, winograd_panels(s)), scratch); break;
    default: conv_grouped(s, part); break;
  }
}

// A thread's range: of the first step's units, in whole pixels or rows of tiles, block by block.
struct FusedChainRange {
  Range units;
  Partition partition;

  FusedChainRange(const Step* steps, long range, long ranges)
      : units(unit_count(*steps), steps->kind == WINOGRAD ? (steps->Q + 1) / 2 : MR, range, ranges),
        partition(units.blocks(steps->block), 1,
                  multiplications(steps) * units.count() / unit_count(*steps)) {}

 private:
  static long unit_count(const Step& first) {
    return first.kind == WINOGRAD ? winograd_tiles(first) : first.N * first.P * first.Q;
  }

  static double multiplications(const Step* steps) {
    double sum = 0;
    for (long i = 0; i <= steps->joined; i++) {
      const Step& s = steps[i];
      sum += static_cast<double>(s.N * s.P * s.Q) * s.K * s.R * s.S * (s.C / s.groups);
    }
    return sum;
  }
};

static void fused_chain_piece(const Step* steps, long range, long ranges, long piece, int slot) {
  const Step& first = steps[0];
  const FusedChainRange own(steps, range, ranges);
  const Range units = own.units.of(own.partition.block(piece), first.block);
  for (long from = units.from; from < units.to; from += first.block) {
    const long to = min(from + first.block, units.to);
    const Range pixels(first_pixel(first, from), first_pixel(first, to));
    for (long i = 0; i <= first.joined; i++) {
      Step s = steps[i];
      float* const scratch = s.scratch + slot * s.scratch_pitch;
      // pixel 0 would lie before it: steps count from the first pixel of all
      if (s.x_local) s.x = scratch + s.x_local - pixels.from * s.x_pitch;
      if (s.residual_local) {
        s.residual = scratch + s.residual_local - pixels.from * s.residual_pitch;
      }
      if (s.y_local) s.y = scratch + s.y_local - pixels.from * s.y_pitch;
      if (i == 0) {
        run_first(s, Range(from, to), scratch);
      } else {
        conv_direct(s, pixels, Range(0, direct_panels(s)), scratch);
      }
    }
  }
}
