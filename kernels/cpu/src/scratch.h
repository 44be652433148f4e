// How much scratch memory steps need: the only place that says so.
#pragma once

#include "conv3x3_winograd.h"
#include "conv_direct.h"
#include "fused_chain.h"
#include "fused_rows.h"
#include "step.h"

// Floats that a thread needs for a step that is not a fused run; what a fused step needs for
// itself.
static inline long scratch_floats(const Step& s) {
  switch (s.kind) {
    case DIRECT: return direct_scratch_floats(s);
    case WINOGRAD:
    case WINOGRAD_INLINE: return Workspace::floats(s);
    default: return 0;
  }
}

// The most pixels of a value that are in a thread's scratch memory at a time, for a fused run.
static inline long local_pixels(const Step* run) {
  return run->kind == CHAIN ? chain_pixels(run[1]) : strip_pixels(run);
}
