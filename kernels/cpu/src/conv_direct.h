// Convolution as an implicit GEMM over pixels [N * P * Q], filter taps and channels, and output
// channels, NHWC. No im2col matrix: each row of a tile is a pointer to where its window's channels
// lie, or to zeros where the window hangs over the edge (the indirect convolution of Dukhan, "The
// Indirect Convolution Algorithm", 2019, with the pointers made as they are needed).
//
// Weights: for each group, panels of up to PANEL output channels, in each [R, S, C, panel].
// Scratch, for each thread: sums [block, PANEL].
#pragma once

#include <cstddef>

#include "epilogue.h"
#include "step.h"
#include "tile.h"

// Every pointer to padding points here; rows longer than this are refused by Python.
constexpr long LONGEST_ROW = 1 << 14;
static const float zeros[LONGEST_ROW] = {0};

template <long M>
struct Windows {
  const float* corner[M];  // where the window's first tap would be
  long h[M], w[M];
  bool inside = true;  // no window hangs over the edge

  Windows(const Step& s, long pixel, long channel) {
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

  void tap(const Step& s, long r, long tap, const float** x) const {
    long dh = r * s.dilation_h, dw = tap * s.dilation_w;
    for (long m = 0; m < M; m++) {
      bool there = inside || (static_cast<size_t>(h[m] + dh) < static_cast<size_t>(s.H) &&
                              static_cast<size_t>(w[m] + dw) < static_cast<size_t>(s.W));
      x[m] = there ? corner[m] + (dh * s.W + dw) * s.x_pitch : zeros;
    }
  }
};

// A tile's end: pixels from `pixel` on, output channels from `k` on.
template <long M, long N>
static inline void write(const Step& s, const Tile<M, N>& tile, long pixel, long k) {
  for (long m = 0; m < M; m++) {
    UNROLLED for (long n = 0; n < N; n++) finish(s, tile.sum[m][n], pixel + m, k + n * LANES);
  }
}

// What is computed together: output channels [k, k + panel) of pixels [from, to) from the input
// channels that begin at `channel`.
struct Task {
  long from, to, k, panel, channel;
};

// All weights at once, where there are few of them (a stem's three channels, groups of 32): where
// a window hangs over no edge, each of its rows is read in one go.
static void direct_shallow(const Step& s, const Task& task, const float* weights) {
  const long C = s.C / s.groups;
  const bool rows = s.dilation_w == 1 && s.x_pitch == C;
  each_tile_of(task.panel, task.from, task.to, [&]<long M, long N>(long pixel) {
    const Windows<M> windows(s, pixel, task.channel);
    const bool whole = rows && windows.inside;
    const long taps = whole ? 1 : s.S, depth = whole ? s.S * C : C;
    Tile<M, N> tile;
    tile.start(s.bias + task.k);
    const float* x[M];
    const float* w = weights;
    for (long r = 0; r < s.R; r++) {
      for (long tap = 0; tap < taps; tap++) {
        windows.tap(s, r, tap, x);
        w = tile.add(x, w, depth, nullptr, Next{});
      }
    }
    write(s, tile, pixel, task.k);
  });
}

// The weights of one tap, or of some of its channels: DEPTH x PANEL of them stay in the first-level
// cache while all pixels pass, and the next are fetched meanwhile. Sums are kept in `sums`
// (a row of PANEL for each pixel). For the whole weights in one pass per tile, ResNet-50 at batch 1
// took 27.9 ms, and so 24.6 (two cores). Of a 1x1 with many channels a slice has 2 * DEPTH: half as
// many sums to keep are worth more there (0.95 to 0.99 of the time from 512 channels on).
static void direct_slices(const Step& s, const Task& task, const float* w, float* sums) {
  const long C = s.C / s.groups, deep = s.R * s.S == 1 && C > 2 * DEPTH;
  const long most = deep ? 2 * DEPTH : DEPTH, parts = (C + most - 1) / most;
  const long slices = s.R * s.S * parts;
  const bool pointwise = s.R * s.S * s.stride_h * s.stride_w == 1 && !s.pad_h && !s.pad_w;
  for (long i = 0; i < slices; i++) {
    const long tap = i / parts, c = C * (i % parts) / parts;
    const long depth = C * (i % parts + 1) / parts - c;
    const bool first = i == 0, last = i + 1 == slices;
    Ahead ahead(w + depth * task.panel, depth * task.panel);
    each_tile_of(task.panel, task.from, task.to, [&]<long M, long N>(long pixel) {
      float* const kept = sums + (pixel - task.from) * PANEL;
      Tile<M, N> tile;
      tile.start(first ? s.bias + task.k : nullptr);
      const float* x[M];
      if (pointwise) {
        for (long m = 0; m < M; m++) x[m] = s.x + (pixel + m) * s.x_pitch + task.channel + c;
      } else {
        Windows<M>(s, pixel, task.channel + c).tap(s, tap / s.S, tap % s.S, x);
      }
      Next next{M * s.stride_w * s.x_pitch};
      if (last) {
        next.y = s.y + (pixel + M) * s.y_pitch + task.k;
        next.y_pitch = s.y_pitch;
        if (s.residual && s.residual != s.y) {
          next.residual = s.residual + (pixel + M) * s.residual_pitch + task.k;
          next.residual_pitch = s.residual_pitch;
        }
      }
      tile.add(x, w, depth, ahead.take(depth), next);
      if (!first) tile.plus(kept);
      if (last) {
        write(s, tile, pixel, task.k);
      } else {
        tile.put_away(kept);
      }
    });
    w += depth * task.panel;
  }
}

// The panels of all groups, one after another.
static inline long direct_panels(const Step& s) {
  return s.groups * ((s.K / s.groups + PANEL - 1) / PANEL);
}

static void direct_in(const Step& s, const Part& all_pixels, const Part& all_panels, float* sums) {
  const long C = s.C / s.groups, K = s.K / s.groups;
  const long panels = (K + PANEL - 1) / PANEL, taps = s.R * s.S * C;
  for (long from = all_pixels.from; from < all_pixels.to; from += s.block) {
    const long to = least(from + s.block, all_pixels.to);
    for (long p = all_panels.from; p < all_panels.to; p++) {
      const long group = p / panels, first = p % panels * PANEL;
      const Task task{from, to, group * K + first, least(PANEL, K - first), group * C};
      const float* const w = s.w + task.k * taps;
      if (C < LINE || (s.R * s.S > 1 && taps * task.panel <= 2 * DEPTH * PANEL)) {
        direct_shallow(s, task, w);
      } else {
        direct_slices(s, task, w, sums);
      }
    }
  }
}

// A thread's range: of pixels through all panels, or of panels over all pixels.
struct DirectRange {
  Part pixels, panels;
  Cut cut;

  DirectRange(const Step& s, long range, long ranges)
      : pixels(s.N * s.P * s.Q, PIXELS, s.by_channel ? 0 : range, s.by_channel ? 1 : ranges),
        panels(direct_panels(s), 1, s.by_channel ? range : 0, s.by_channel ? ranges : 1),
        cut(pixels.blocks(s.block), panels.count(),
            static_cast<double>(pixels.count()) * panels.count() * PANEL * s.R * s.S *
                (s.C / s.groups)) {}
};

static void direct_piece(const Step& s, long range, long ranges, long i, float* scratch) {
  const DirectRange all(s, range, ranges);
  direct_in(s, all.pixels.of(all.cut.block(i), s.block), all.panels.of(all.cut.panels(all.panels.count(), i)), scratch);
}
