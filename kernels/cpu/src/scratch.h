// The scratch memory that steps need. Python asks for it and has no rule of its own.
#pragma once

#include "conv3x3_winograd.h"
#include "conv_direct.h"
#include "fused_chain.h"
#include "fused_rows.h"
#include "group_norm.h"
#include "step.h"

// Returns the floats that a thread needs for a step that is no fused run, or for one step in it.
static inline long scratch_floats(const Step& s) {
  switch (s.kind) {
    case DIRECT: return direct_scratch_floats(s);
    case WINOGRAD: return Workspace::floats(s);
    case GROUP_MOMENTS:
    case GROUP_NORM: return group_scratch_floats(s);
    default: return 0;
  }
}

// Returns the most pixels of a value that a fused run has in a thread's scratch memory at a time.
static inline long local_pixels(const Step* run) {
  return run->kind == CHAIN ? chain_pixels(run[1]) : strip_pixels(run);
}
