// A convolution and what alone reads it through windows (a stem's max-pool, a bottleneck's 3x3), a
// strip of the reader's rows at a time, so that the convolution's output never exists as a whole.
// Behind the reader there may be 1x1 convolutions, each of which reads what the one before it makes
// of the strip, as in a chain.
//
// The rows that a strip reads lie in the thread's scratch memory; those that the next strip reads,
// too, are moved to its start.
#pragma once

#include <cstring>

#include "base/dcheck.h"
#include "fused_chain.h"
#include "pool.h"

// Rows of the convolution that the windows of `rows` of the reader's rows reach over.
static inline long window_reach(const Step& reader, long rows) {
  return (rows - 1) * reader.stride_h + (reader.R - 1) * reader.dilation_h + 1;
}

// The most pixels of the convolution that a strip reads, or that the reader makes of them.
static inline long strip_pixels(const Step* fused) {
  const Step &conv = fused[1], &reader = fused[2];
  const long read = conv.Q * min(window_reach(reader, fused->rows), conv.P);
  const long made = reader.Q * min(fused->rows, reader.P);
  return read > made ? read : made;
}

static void run_reader(const Step& s, const Range& rows, float* scratch) {
  if (s.kind == MAX_POOL) return max_pool(s, rows);
  run_first(s, Range(rows.from * s.Q, rows.to * s.Q), scratch);
}

// The rows [first, last) of the convolution that are in a thread's scratch memory, counted over all
// images, and the reader's row that follows the last one computed from them.
struct RowCache {
  long first = 0, last = 0, next = -1;
};

// A thread's range of the reader's rows.
struct FusedRowsRange {
  Range rows;
  Partition partition;

  FusedRowsRange(const Step* fused, long range, long ranges)
      : rows(fused[2].N * fused[2].P, 1, range, ranges),
        partition(strips(fused), 1, multiplications_per_row(fused) * rows.count()) {}

  // Where the strip that begins at row `from` ends: no strip has rows of two images.
  long end(const Step* fused, long from) const {
    const long height = fused[2].P;
    return min(min(from + fused->rows, rows.to), (from / height + 1) * height);
  }

  Range piece(const Step* fused, long i) const {
    const Range wanted = partition.block(i);
    long from = rows.from, strip = 0;
    for (; strip < wanted.from; strip++) from = end(fused, from);
    long to = from;
    for (; strip < wanted.to; strip++) to = end(fused, to);
    return Range(from, to);
  }

 private:
  long strips(const Step* fused) const {
    long count = 0;
    for (long from = rows.from; from < rows.to; from = end(fused, from)) count++;
    return count;
  }

  static double multiplications_per_row(const Step* fused) {
    const Step& conv = fused[1];
    return static_cast<double>(conv.Q) * fused[2].stride_h * conv.K * conv.R * conv.S *
           (conv.C / conv.groups);
  }
};

static void fused_rows_piece(const Step* fused, long range, long ranges, long piece, int slot,
                             RowCache& cached) {
  DCHECK(fused->kind == ROW_FUSED && fused->length >= 2);
  Step conv = fused[1], reader = fused[2];
  float* const scratch = fused->scratch + slot * fused->scratch_pitch;
  Value* const local = reinterpret_cast<Value*>(scratch + conv.y_local);
  float* const conv_scratch = conv.scratch + slot * conv.scratch_pitch;
  float* const reader_scratch = reader.scratch + slot * reader.scratch_pitch;
  const long line = conv.Q * conv.y_pitch;
  const FusedRowsRange own(fused, range, ranges);
  const Range rows = own.piece(fused, piece);
  if (cached.next != rows.from) cached = RowCache{};
  for (long from = rows.from, to; from < rows.to; from = to) {
    const long image = from / reader.P, above = image * conv.P;
    to = own.end(fused, from);
    const long top = from % reader.P * reader.stride_h - reader.pad_h;
    const long bottom = top + window_reach(reader, to - from);
    const long needed = above + (top < 0 ? 0 : top), end = above + min(bottom, conv.P);
    const long kept = cached.last > needed ? cached.last - needed : 0;
    DCHECK((end - needed) * conv.Q <= strip_pixels(fused));
    if (kept) {
      std::memmove(local, local + (needed - cached.first) * line, kept * line * sizeof(Value));
    }
    // rows are counted from the first of the batch, which would lie before a strip's memory
    conv.y = local - needed * line;
    reader.x = conv.y;
    run_first(conv, Range((needed + kept) * conv.Q, end * conv.Q), conv_scratch);
    const Range pixels(from * reader.Q, to * reader.Q);
    if (reader.y_local >= 0) {
      Value* const made = reinterpret_cast<Value*>(scratch + reader.y_local);
      reader.y = made - pixels.from * reader.y_pitch;
    }
    run_reader(reader, Range(from, to), reader_scratch);
    for (long i = 3; i <= fused->length; i++) {
      const Step s = with_local_values(fused[i], scratch, pixels.from);
      conv_direct(s, pixels, Range(0, direct_panels(s)), s.scratch + slot * s.scratch_pitch);
    }
    cached = {needed, end, to};
  }
}
