// Computes a convolution and the 1x1 convolutions behind it a block of pixels at a time, so that
// each reads from the caches what the one before has written, and threads do not wait for each
// other.
//
// A value that only the chain reads is local: a block of it lies in the thread's scratch memory,
// where the next block's overwrites it.
#pragma once

#include "conv3x3_winograd.h"
#include "conv_direct.h"
#include "conv_grouped.h"
#include "base/dcheck.h"
#include "step.h"

// A row of 2x2 tiles.
static inline long tiles_across(const Step& s) { return (s.Q + 1) / 2; }

// The pixel where the first step's unit number `unit` begins: units are pixels or, of WINOGRAD,
// tiles.
static inline long first_pixel(const Step& s, long unit) {
  if (s.kind != WINOGRAD) return unit;
  const long down = (s.P + 1) / 2, row = unit / tiles_across(s);
  return (row / down * s.P + row % down * 2) * s.Q;
}

// The most pixels in a block of the chain whose first step is `first`.
static inline long chain_pixels(const Step& first) {
  if (first.kind != WINOGRAD) return first.block;
  return first.block / tiles_across(first) * 2 * first.Q;  // whole rows of tiles
}

// A step of a fused run whose local values are those of pixels from `pixel` on: steps count pixels
// from the first of the batch, which would lie before a block's memory.
static inline Step with_local_values(Step s, float* scratch, long pixel) {
  const auto at = [&](long offset, long pitch) {
    return reinterpret_cast<Value*>(scratch + offset) - pixel * pitch;
  };
  if (s.x_local >= 0) s.x = at(s.x_local, s.x_pitch);
  if (s.residual_local >= 0) s.residual = at(s.residual_local, s.residual_pitch);
  if (s.y_local >= 0) s.y = at(s.y_local, s.y_pitch);
  return s;
}

static void run_first(const Step& s, const Range& units, float* scratch) {
  switch (s.kind) {
    case DIRECT: conv_direct(s, units, Range(0, direct_panels(s)), scratch); break;
    case WINOGRAD: conv3x3_winograd(s, units, Range(0, winograd_panels(s)), scratch); break;
    default: conv_grouped(s, units); break;
  }
}

// A thread's range of the first step's units, in whole tiles of MR pixels or rows of 2x2 tiles.
struct FusedChainRange {
  Range units;
  Partition partition;

  FusedChainRange(const Step* chain, long range, long ranges)
      : units(unit_count(chain[1]), chain[1].kind == WINOGRAD ? tiles_across(chain[1]) : MR, range,
              ranges),
        partition(units.blocks(chain[1].block), 1,
                  multiplications(chain) * units.count() / unit_count(chain[1])) {}

 private:
  static long unit_count(const Step& first) {
    return first.kind == WINOGRAD ? winograd_tiles(first) : first.N * first.P * first.Q;
  }

  static double multiplications(const Step* chain) {
    double sum = 0;
    for (long i = 1; i <= chain->length; i++) {
      const Step& s = chain[i];
      sum += static_cast<double>(s.N * s.P * s.Q) * s.K * s.R * s.S * (s.C / s.groups);
    }
    return sum;
  }
};

static void fused_chain_piece(const Step* chain, long range, long ranges, long piece, int slot) {
  DCHECK(chain->kind == CHAIN && chain->length > 0);
  float* const scratch = chain->scratch + slot * chain->scratch_pitch;
  const Step& first = chain[1];
  const FusedChainRange own(chain, range, ranges);
  const Range units = own.units.of(own.partition.block(piece), first.block);
  for (long from = units.from; from < units.to; from += first.block) {
    const long to = min(from + first.block, units.to);
    const Range pixels(first_pixel(first, from), first_pixel(first, to));
    DCHECK(pixels.count() <= chain_pixels(first));
    for (long i = 1; i <= chain->length; i++) {
      const Step s = with_local_values(chain[i], scratch, pixels.from);
      if (i == 1) {
        run_first(s, Range(from, to), scratch);
      } else {
        conv_direct(s, pixels, Range(0, direct_panels(s)), scratch);
      }
    }
  }
}
