// Runs the steps of a network one after another, each on all threads, within one call.
#include "affine.h"
#include "conv3x3_winograd.h"
#include "conv_direct.h"
#include "conv_grouped.h"
#include "convert.h"
#include "base/dcheck.h"
#include "debug_checks.h"
#include "base/digest.h"
#include "exports.h"
#include "fused_chain.h"
#include "fused_rows.h"
#include "group_norm.h"
#include "layer_norm.h"
#include "pool.h"
#include "scratch.h"
#include "split_attention.h"
#include "step.h"
#include "team.h"

// The results of the last step in a thread's scratch memory, for its next piece to reuse.
struct ScratchContents {
  uint64_t step = 0;
  TransformedTiles tiles;
  RowCache rows;
};

static thread_local ScratchContents scratch_contents;

// A step, or a run of fused steps, as work for a team of threads.
class StepWork final : public team::Work {
  const Step* const step_;

 public:
  explicit StepWork(const Step* step) : step_(step) {}

  // Helpers would begin after the caller had finished a few microseconds of work.
  bool is_worth_sharing() const override {
    const Step& s = *step_;
    if (s.length) return true;
    const double values = static_cast<double>(s.N) * s.K * (s.kind == MEAN ? s.H * s.W : s.P * s.Q);
    return is_convolution(s) ? values * s.R * s.S * (s.C / s.groups) > 1 << 17 : values > 1 << 14;
  }

  long pieces(long range, long ranges) const override {
    const Step& s = *step_;
    switch (s.kind) {
      case CHAIN: return FusedChainRange(step_, range, ranges).partition.pieces;
      case ROW_FUSED: return FusedRowsRange(step_, range, ranges).partition.pieces;
      case DIRECT: return DirectRange(s, range, ranges).partition.pieces;
      case WINOGRAD: return WinogradRange(s, range, ranges).partition.pieces;
      case GROUPED: return GroupedRange(s, range, ranges).partition.pieces;
      case MEAN: return mean_range(s, range, ranges).partition.pieces;
      case AFFINE: return affine_range(s, range, ranges).partition.pieces;
      case LAYER_NORM: return layer_norm_range(s, range, ranges).partition.pieces;
      case GROUP_MOMENTS: return group_moments_range(s, range, ranges).partition.pieces;
      case GROUP_NORM: return group_norm_range(s, range, ranges).partition.pieces;
      case SPLIT_SUM:
      case SPLIT_SOFTMAX: return split_range(s, range, ranges).partition.pieces;
      case MAX_POOL:
      case AVERAGE_POOL:
      case PICK: return pool_range(s, range, ranges).partition.pieces;
      case TO_BF16:
      case TO_U8:
      case TO_FP32: return convert_range(s, range, ranges).partition.pieces;
    }
    return 0;
  }

  void compute(const team::Piece& at) const override {
    const Step& s = *step_;
    const long range = at.range, ranges = at.ranges, i = at.index;
    DCHECK(0 <= range && range < ranges && 0 <= at.slot && at.slot < ranges);
    if (scratch_contents.step != at.step) scratch_contents = {at.step, {}, {}};
    float* const scratch = s.scratch + at.slot * s.scratch_pitch;
    switch (s.kind) {
      case CHAIN: return fused_chain_piece(step_, range, ranges, i, at.slot);
      case ROW_FUSED:
        return fused_rows_piece(step_, range, ranges, i, at.slot, scratch_contents.rows);
      case DIRECT: return direct_piece(s, range, ranges, i, scratch);
      case WINOGRAD:
        if constexpr (STORAGE != U8) winograd_piece(s, range, ranges, i, scratch, scratch_contents.tiles);
        return;
      case GROUPED: return grouped_piece(s, range, ranges, i);
      case MAX_POOL: return max_pool(s, pool_range(s, range, ranges).piece(i));
      case MEAN: return global_mean(s, mean_range(s, range, ranges).piece(i));
      case AFFINE: return affine(s, affine_range(s, range, ranges).piece(i));
      case LAYER_NORM: return layer_norm(s, layer_norm_range(s, range, ranges).piece(i));
      case GROUP_MOMENTS:
        return group_moments(s, group_moments_range(s, range, ranges).piece(i), scratch);
      case GROUP_NORM: return group_norm(s, group_norm_range(s, range, ranges).piece(i), scratch);
      case SPLIT_SUM: return split_sum(s, split_range(s, range, ranges).piece(i));
      case SPLIT_SOFTMAX: return split_softmax(s, split_range(s, range, ranges).piece(i));
      case AVERAGE_POOL: return average_pool(s, pool_range(s, range, ranges).piece(i));
      case PICK: return pick(s, pool_range(s, range, ranges).piece(i));
      case TO_BF16: return to_bf16(s, convert_range(s, range, ranges).piece(i));
      case TO_FP32: return to_fp32(s, convert_range(s, range, ranges).piece(i));
      case TO_U8: return to_u8(s, convert_range(s, range, ranges).piece(i));
    }
  }
};

// The steps of a run. A fused run is one step together with the `length` steps behind it.
struct Steps {
  const Step* steps;
  long count;

  bool is_one() const { return count > 0 && count == 1 + steps->length; }

  template <class Do>
  bool each(const Do& run) const {
    for (const Step* step = steps; step < steps + count; step += 1 + step->length) {
      DCHECK(step + step->length < steps + count);
      checks::step(step);
      if (!run(StepWork(step))) return false;
    }
    return true;
  }
};

// Returns 0, or 1 if a piece threw.
extern "C" long resfuse_run(const Step* steps, long count, long threads) {
  DCHECK(count >= 0 && threads > 0);
  return team::run(Steps{steps, count}, static_cast<int>(threads)) ? 0 : 1;
}

// Returns all constants and field offsets that Python uses; the table ends with one without a name.
extern "C" const Constant* resfuse_constants() { return constants; }

// Returns the floats of scratch memory that a thread needs for a step, which is no fused run.
extern "C" long resfuse_scratch_floats(const Step* step) { return scratch_floats(*step); }

// Returns the floats that GROUP_MOMENTS leaves for GROUP_NORM, for either of the two.
extern "C" long resfuse_shared_floats(const Step* step) { return group_moments_floats(*step); }

// Returns the most pixels of a value that a fused run has in a thread's scratch memory at a time.
extern "C" long resfuse_local_pixels(const Step* run) { return local_pixels(run); }

// Stores the scale and the shift that a batch norm comes to.
extern "C" void resfuse_scale_and_shift(const float* mean, const float* variance,
                                        const float* weight, const float* bias, double eps,
                                        long channels, float* scale, float* shift) {
  scale_and_shift(mean, variance, weight, bias, eps, channels, scale, shift);
}

// Stores the digest of each region in it.
extern "C" void resfuse_digest(Region* regions, long count) {
  for (long i = 0; i < count; ++i) regions[i].digest = digest_of(regions[i]);
}

// Returns whether regions [0, always) and [from, to) still have their digests.
extern "C" long resfuse_unchanged(const Region* regions, long always, long from, long to) {
  for (long i = 0; i < always; ++i) {
    if (digest_of(regions[i]) != regions[i].digest) return 0;
  }
  for (long i = from; i < to; ++i) {
    if (digest_of(regions[i]) != regions[i].digest) return 0;
  }
  return 1;
}

#if defined(RESFUSE_DISTURBED)
extern "C" void resfuse_fail_on(long slot) { team::failing_slot.store(slot); }
#endif
