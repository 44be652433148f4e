// Runs the steps of a network one after another, each on all threads, within one call.
#include "affine.h"
#include "fused_chain.h"
#include "digest.h"
#include "conv_direct.h"
#include "conv_grouped.h"
#include "pool.h"
#include "step.h"
#include "fused_rows.h"
#include "team.h"
#include "conv3x3_winograd.h"

// What a thread's scratch memory holds of the step that it computed last, for its next piece to
// reuse.
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
    const double values = static_cast<double>(s.N) * s.K * (s.kind == MEAN ? s.H * s.W : s.P * s.Q);
    const bool sums = s.kind <= GROUPED || s.kind == WINOGRAD_INLINE;
    return s.joined || (sums ? values * s.R * s.S * (s.C / s.groups) > 1 << 17 : values > 1 << 14);
  }

  long pieces(long range, long ranges) const override {
    const Step& s = *step_;
    if (s.joined) {
      return s.rows_joined() ? FusedRowsRange(&s, range, ranges).partition.pieces
                             : FusedChainRange(&s, range, ranges).partition.pieces;
    }
    switch (s.kind) {
      case DIRECT: return DirectRange(s, range, ranges).partition.pieces;
      case WINOGRAD:
      case WINOGRAD_INLINE: return WinogradRange(s, range, ranges).partition.pieces;
      case GROUPED: return GroupedRange(s, range, ranges).partition.pieces;
      case MEAN: return mean_range(s, range, ranges).partition.pieces;
      case AFFINE: return affine_range(s, range, ranges).partition.pieces;
      case MAX_POOL:
      case AVERAGE_POOL:
      case PICK: return pool_range(s, range, ranges).partition.pieces;
    }
    return 0;
  }

  void compute(const team::Piece& at) const override {
    const Step& s = *step_;
    const long range = at.range, ranges = at.ranges, i = at.index;
    if (scratch_contents.step != at.step) scratch_contents = {at.step, {}, {}};
    if (s.joined) {
      if (s.rows_joined()) {
        return fused_rows_piece(&s, range, ranges, i, at.slot, scratch_contents.rows);
      }
      return fused_chain_piece(&s, range, ranges, i, at.slot);
    }
    float* const scratch = s.scratch + at.slot * s.scratch_pitch;
    switch (s.kind) {
      case DIRECT: return direct_piece(s, range, ranges, i, scratch);
      case WINOGRAD:
      case WINOGRAD_INLINE:
        return winograd_piece(s, range, ranges, i, scratch, scratch_contents.tiles);
      case GROUPED: return grouped_piece(s, range, ranges, i);
      case MAX_POOL: return max_pool(s, pool_range(s, range, ranges).piece(i));
      case MEAN: return global_mean(s, mean_range(s, range, ranges).piece(i));
      case AFFINE: return affine(s, affine_range(s, range, ranges).piece(i));
      case AVERAGE_POOL: return average_pool(s, pool_range(s, range, ranges).piece(i));
      case PICK: return pick(s, pool_range(s, range, ranges).piece(i));
    }
  }
};

struct Steps {
  const Step* steps;
  long count;

  bool is_one() const { return count == 1 + steps->joined; }

  template <class Do>
  bool each(const Do& run) const {
    for (long i = 0; i < count; i += 1 + steps[i].joined) {
      if (!run(StepWork(steps + i))) return false;
    }
    return true;
  }
};

// 0, or 1 if a piece threw.
extern "C" long resfuse_run(const Step* steps, long count, long threads) {
  return team::run(Steps{steps, count}, static_cast<int>(threads)) ? 0 : 1;
}

extern "C" void resfuse_digest(Watched* parts, long count) {
  for (long i = 0; i < count; ++i) parts[i].digest = digest_of(parts[i]);
}

// Whether parts [0, always) and [from, to) have the digests they had.
extern "C" long resfuse_unchanged(const Watched* parts, long always, long from, long to) {
  for (long i = 0; i < always; ++i) {
    if (digest_of(parts[i]) != parts[i].digest) return 0;
  }
  for (long i = from; i < to; ++i) {
    if (digest_of(parts[i]) != parts[i].digest) return 0;
  }
  return 1;
}

// What Python must know to lay memory out.
extern "C" long resfuse_lanes() { return LANES; }
extern "C" long resfuse_panel() { return NR; }
extern "C" long resfuse_pixels() { return MR; }
extern "C" long resfuse_step_bytes() { return sizeof(Step); }
extern "C" long resfuse_watched_bytes() { return sizeof(Watched); }

#if defined(RESFUSE_DISTURBED)
extern "C" void resfuse_fail_on(long slot) { team::failing_slot.store(slot); }
#endif
