// Convolution as an implicit GEMM over pixels [N * P * Q], filter taps and channels, and output
// channels, NHWC. No im2col matrix: each row of a tile is a pointer to where its window's channels
// lie, or to zeros where the window hangs over the edge (Dukhan, "The Indirect Convolution
// Algorithm", 2019, but with the pointers computed as they are needed).
//
// Packed weights: for each group, panels of up to NR output channels, in each [R, S, units of C,
// panel]. Where channels do not fill the last unit, its other weights are zero, and no values are
// read for them.
// Scratch of a thread: partial sums [block, NR], of uint8 integers.
#pragma once

#include <cstddef>
#include <cstring>
#include <mutex>

#include "base/dcheck.h"
#include "epilogue.h"
#include "step.h"
#include "base/storage.h"
#include "tile.h"

// For pointers to padding. Python refuses convolutions with longer rows.
constexpr long MAX_ROW = 1 << 14;

#if !defined(RESFUSE_U8)
static const Value zeros[MAX_ROW] = {};
static inline const Value* padding_of(const Step&) { return zeros; }
static inline void prepare_padding(const Step&) {}
#else
// A row for each zero point, filled when a convolution first needs it. glibc's call_once, unlike a
// lock, survives a fork in the middle of it.
static Value zero_points[256][MAX_ROW];
static std::once_flag filled[256];
static inline const Value* padding_of(const Step& s) { return zero_points[s.x_zero]; }
static inline void prepare_padding(const Step& s) {
  const int zero = static_cast<int>(s.x_zero);
  if (zero == 0) return;
  std::call_once(filled[zero], [=] { std::memset(zero_points[zero], zero, MAX_ROW); });
}
#endif

template <long M>
struct Windows {
  const Value* corner[M];  // the address of the window's first tap, inside or not
  long h[M], w[M];
  bool inside = true;  // whether no window hangs over the edge
  const Value* const padding;

  Windows(const Step& s, long pixel, long channel) : padding(padding_of(s)) {
    long q = pixel % s.Q, row = pixel / s.Q, p = row % s.P, image = row / s.P;
    for (long m = 0; m < M; m++) {
      h[m] = p * s.stride_h - s.pad_h;
      w[m] = q * s.stride_w - s.pad_w;
      corner[m] = s.x + ((image * s.H + h[m]) * s.W + w[m]) * s.x_pitch + channel;
      inside &= h[m] >= 0 && h[m] + (s.R - 1) * s.dilation_h < s.H;
      inside &= w[m] >= 0 && w[m] + (s.S - 1) * s.dilation_w < s.W;
      if (++q == s.Q) q = 0, p++;
      if (p == s.P) p = 0, image++;
    }
  }

  void tap(const Step& s, long r, long tap, const Value** x) const {
    long dh = r * s.dilation_h, dw = tap * s.dilation_w;
    for (long m = 0; m < M; m++) {
      bool there = inside || (static_cast<size_t>(h[m] + dh) < static_cast<size_t>(s.H) &&
                              static_cast<size_t>(w[m] + dw) < static_cast<size_t>(s.W));
      x[m] = there ? corner[m] + (dh * s.W + dw) * s.x_pitch : padding;
    }
  }
};

// A panel of output channels [k, k + panel) of pixels [from, to), computed from the input channels
// that begin at `channel`.
struct PanelTask {
  long from, to, k, panel, channel;
};

// The most weights of a panel that are taken in one pass, in units. Where four products take four
// instructions, a second-level cache delivers them fast enough, and 3x3 of 128 and 256 channels are
// 1.28 and 1.10 times faster than in slices (one core of a Zen 3).
#if defined(RESFUSE_U8_BY_HALVES)
constexpr long ONE_PASS = 8 * KC * NR;
#else
constexpr long ONE_PASS = 2 * KC * NR;
#endif

// Returns whether a panel of `panel` output channels is computed with all weights in one pass.
static inline bool in_one_pass(const Step& s, long panel) {
  const long C = units_of(s.C / s.groups), taps = s.R * s.S;
  return C < CACHE_LINE || (taps > 1 && taps * C * panel <= ONE_PASS);
}

// Returns the slices of channels that each tap's weights are divided into otherwise.
static inline long slices_per_tap(const Step& s) {
  const long C = units_of(s.C / s.groups), deep = s.R * s.S == 1 && C > 2 * KC;
  const long most = deep ? 2 * KC : KC;
  return (C + most - 1) / most;
}

// Returns the floats of partial sums that a thread saves between slices.
static inline long direct_scratch_floats(const Step& s) {
  const bool saved = !in_one_pass(s, min(NR, vectors_of_group(s))) && s.R * s.S * slices_per_tap(s) > 1;
  return saved ? s.block * NR : 0;
}

// What sums begin with: the bias or, of uint8, which adds it behind the scale, what x's zero point
// contributes to the products.
#if !defined(RESFUSE_U8)
static inline const float* first_sums(const Step& s, long k) { return s.bias + k; }
#else
static inline const int* first_sums(const Step& s, long k) { return s.offset + k; }
#endif

// Adds the products of `depth` units of each row and of the first `rest` channels of one more.
// Returns the end of their weights.
template <class Tile, long M = Tile::rows>
static ALWAYS_INLINE const Unit* accumulate_row(Tile& tile, const Value* const* x, const Unit* w,
                                                long depth, long rest, const Unit* next_w,
                                                const Prefetch& next) {
  const Unit* row[M];
  UNROLLED for (long m = 0; m < M; m++) row[m] = as_units(x[m]);
  w = tile.accumulate(row, w, depth, next_w, next);
  return UNIT > 1 && rest ? tile.accumulate_first(row, depth, w, rest) : w;
}

// Computes a panel with all weights in one pass, where there are few of them (a stem's three
// channels, groups of 32). Where a window hangs over no edge, each of its rows is one long sum.
static void direct_one_pass(const Step& s, const PanelTask& task, const Unit* weights) {
  const long channels = s.C / s.groups, C = channels / UNIT;
  const long rest = channels % UNIT;  // of one more unit
  const bool rows = s.dilation_w == 1 && s.x_pitch == channels && !rest;
  for_each_tile_of_width(task.panel, task.from, task.to, [&]<long M, long N>(long pixel) {
    const Windows<M> windows(s, pixel, task.channel);
    const bool whole = rows && windows.inside;
    const long taps = whole ? 1 : s.S, depth = whole ? s.S * C : C;
    Tile<M, N, SumInMemory> tile;
    tile.init(first_sums(s, task.k));
    DCHECK(windows.inside || UNIT * depth + rest <= MAX_ROW);
    const Value* x[M];
    const Unit* w = weights;
    for (long r = 0; r < s.R; r++) {
      for (long tap = 0; tap < taps; tap++) {
        windows.tap(s, r, tap, x);
        w = accumulate_row(tile, x, w, depth, rest, nullptr, Prefetch{});
      }
    }
    epilogue_of_sums<M, N>(s, tile.acc, pixel, task.k);
  });
}

// Computes a panel slice by slice of the weights: KC x NR weights of one tap stay in the
// first-level cache while all pixels pass, and those of the next slice are prefetched meanwhile.
// Between slices the sums lie in `partial_sums`, a row of NR for each pixel. With all weights in
// one pass per tile ResNet-50 at batch 1 took 27.9 ms, and with slices 24.6 (two cores). A 1x1 with
// many channels has slices of 2 * KC: to save half as many partial sums makes it 1.01 to 1.05 times
// faster from 512 channels on.
static void direct_sliced(const Step& s, const PanelTask& task, const Unit* w,
                          SumInMemory* partial_sums) {
  const long channels = s.C / s.groups, C = units_of(channels), parts = slices_per_tap(s);
  const long slices = s.R * s.S * parts;
  const bool pointwise = s.R * s.S * s.stride_h * s.stride_w == 1 && !s.pad_h && !s.pad_w;
  for (long i = 0; i < slices; i++) {
    const long tap = i / parts, c = C * (i % parts) / parts;
    const long depth = C * (i % parts + 1) / parts - c;
    const bool first = i == 0, last = i + 1 == slices;
    const long rest = c + depth == C ? channels % UNIT : 0;  // of the last unit
    WeightPrefetch<Unit> next_w(w + depth * task.panel, depth * task.panel);
    for_each_tile_of_width(task.panel, task.from, task.to, [&]<long M, long N>(long pixel) {
      SumInMemory* const partial = partial_sums + (pixel - task.from) * NR;
      Tile<M, N, SumInMemory> tile;
      tile.init(first ? first_sums(s, task.k) : nullptr);
      const Value* x[M];
      const long channel = task.channel + UNIT * c;
      if (pointwise) {
        for (long m = 0; m < M; m++) x[m] = s.x + (pixel + m) * s.x_pitch + channel;
      } else {
        Windows<M>(s, pixel, channel).tap(s, tap / s.S, tap % s.S, x);
      }
      Prefetch next{M * s.stride_w * s.x_pitch / UNIT};
      if (last) {
        next.y = place_in_y(s, pixel + M, task.k);
        next.y_pitch = s.y_pitch * y_values(s);
        if (s.residual && s.residual != s.y) {
          next.residual = s.residual + (pixel + M) * s.residual_pitch + task.k;
          next.residual_pitch = s.residual_pitch;
        }
      }
      accumulate_row(tile, x, w, depth - (rest > 0), rest, next_w.take(depth), next);
      if (!first) tile.accumulate_partial(partial);
      if (last) {
        epilogue_of_sums<M, N>(s, tile.acc, pixel, task.k);
      } else {
        tile.save_partial(partial);
      }
    });
    w += depth * task.panel;
  }
}

// Returns the number of panels of all groups, numbered one group after another.
static inline long direct_panels(const Step& s) { return group_panels(s) * s.groups; }

static void conv_direct(const Step& s, const Range& pixels, const Range& all_panels,
                        float* scratch) {
  SumInMemory* const partial_sums = reinterpret_cast<SumInMemory*>(scratch);
  prepare_padding(s);
  const long C = s.C / s.groups, taps = s.R * s.S * units_of(C);
  const Unit* const weights = reinterpret_cast<const Unit*>(s.w);
  DCHECK(0 <= pixels.from && pixels.to <= s.N * s.P * s.Q);
  DCHECK(0 <= all_panels.from && all_panels.to <= direct_panels(s));
  for (long from = pixels.from; from < pixels.to; from += s.block) {
    const long to = min(from + s.block, pixels.to);
    for (long p = all_panels.from; p < all_panels.to; p++) {
      const Panel panel(s, p);
      const PanelTask task{from, to, panel.k, panel.width, panel.group * C};
      const Unit* const w = weights + panel.before * taps;
      if (in_one_pass(s, task.panel)) {
        direct_one_pass(s, task, w);
      } else {
        direct_sliced(s, task, w, partial_sums);
      }
    }
  }
}

// A thread's range: some pixels and all panels, or all pixels and some panels.
struct DirectRange {
  Range pixels, panels;
  Partition partition;

  DirectRange(const Step& s, long range, long ranges)
      : pixels(s.N * s.P * s.Q, MR, s.by_channel ? 0 : range, s.by_channel ? 1 : ranges),
        panels(direct_panels(s), 1, s.by_channel ? range : 0, s.by_channel ? ranges : 1),
        partition(pixels.blocks(s.block), panels.count(),
            static_cast<double>(pixels.count()) * panels.count() * NR * s.R * s.S *
                (s.C / s.groups)) {}
};

static void direct_piece(const Step& s, long range, long ranges, long i, float* scratch) {
  const DirectRange own(s, range, ranges);
  const Range panels = own.panels.of(own.partition.panels(own.panels.count(), i));
  conv_direct(s, own.pixels.of(own.partition.block(i), s.block), panels, scratch);
}
