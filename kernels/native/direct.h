// Convolution as an implicit GEMM over pixels [N * P * Q], filter taps and channels, and output
// channels, NHWC. No im2col matrix: each row of a tile is a pointer to where its window's channels
// lie, or to zeros where the window hangs over the edge (the indirect convolution of Dukhan, "The
// Indirect Convolution Algorithm", 2019, with the pointers made as they are needed).
//
// Weights: for each group, panels of up to PANEL output channels, in each [R, S, C, panel].
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
    for (long m = 0; m < M; m++) {
      long q = (pixel + m) % s.Q, row = (pixel + m) / s.Q;
      h[m] = row % s.P * s.stride_h - s.pad_h;
      w[m] = q * s.stride_w - s.pad_w;
      corner[m] = s.x + ((row / s.P * s.H + h[m]) * s.W + w[m]) * s.x_pitch + channel;
      inside &= h[m] >= 0 && h[m] + (s.R - 1) * s.dilation_h < s.H;
      inside &= w[m] >= 0 && w[m] + (s.S - 1) * s.dilation_w < s.W;
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

// One pass over pixels [from, to) with the weights of a few taps, or of some channels of a tap. The
// sums go on from, and to, `sums` (a row of PANEL for each pixel) unless the slice is first, or last.
struct Slice {
  const float* w;
  long r, tap, channel, depth;
  bool rows, first, last;
  const float* next;
};

static void direct_slice(const Step& s, const Slice& slice, long k, long panel, long from, long to,
                         float* sums) {
  const bool pointwise = s.R * s.S == 1 && s.stride_h * s.stride_w == 1 && !s.pad_h && !s.pad_w;
  const float* ahead = slice.next;
  const float* const end = slice.next + slice.depth * panel;
  each_tile_of(panel, from, to, [&]<long M, long N>(long pixel) {
    float* const kept = sums + (pixel - from) * PANEL;
    Tile<M, N> tile;
    if (slice.first) tile.start(s.bias + k); else tile.resume(kept);
    const float* x[M];
    if (pointwise) {
      for (long m = 0; m < M; m++) x[m] = s.x + (pixel + m) * s.x_pitch + slice.channel;
    } else {
      Windows<M> windows(s, pixel, slice.channel);
      windows.tap(s, slice.r, slice.tap, x);
    }
    tile.add(x, slice.w, slice.depth, ahead);
    ahead = ahead + slice.depth * LINE < end ? ahead + slice.depth * LINE : slice.w;
    if (!slice.last) {
      tile.put_away(kept);
      return;
    }
    for (long m = 0; m < M; m++) {
      UNROLLED for (long n = 0; n < N; n++) finish(s, tile.sum[m][n], pixel + m, k + n * LANES);
    }
  });
}

// Few weights: all of them at once.
static void direct_whole(const Step& s, const float* w, long channel, long k, long panel, long from,
                         long to) {
  const long C = s.C / s.groups;
  const bool rows = s.dilation_w == 1 && s.x_pitch == C;
  each_tile_of(panel, from, to, [&]<long M, long N>(long pixel) {
    Tile<M, N> tile;
    tile.start(s.bias + k);
    const float* x[M];
    const float* weight = w;
    Windows<M> windows(s, pixel, channel);
    const bool whole = rows && windows.inside;
    const long taps = whole ? 1 : s.S, depth = whole ? s.S * C : C;
    for (long r = 0; r < s.R; r++) {
      for (long tap = 0; tap < taps; tap++) {
        windows.tap(s, r, tap, x);
        weight = tile.add(x, weight, depth, weight);
      }
    }
    for (long m = 0; m < M; m++) {
      UNROLLED for (long n = 0; n < N; n++) finish(s, tile.sum[m][n], pixel + m, k + n * LANES);
    }
  });
}

static void direct_panel(const Step& s, const float* w, long channel, long k, long panel, long from,
                         long to, float* sums) {
  const long C = s.C / s.groups;
  if (C < 16) return direct_whole(s, w, channel, k, panel, from, to);
  const long parts = (C + DEPTH - 1) / DEPTH;
  const long count = s.R * s.S * parts;
  for (long i = 0; i < count; i++) {
    const long at = i / parts, part = i % parts;
    const long c = C * part / parts, depth = C * (part + 1) / parts - c;
    const Slice slice{w, at / s.S, at % s.S, channel + c, depth, false, i == 0, i + 1 == count, w + depth * panel};
    direct_slice(s, slice, k, panel, from, to, sums);
    w += depth * panel;
  }
}

static void direct(const Step& s, long t, long threads) {
  const long C = s.C / s.groups, K = s.K / s.groups, pixels = s.N * s.P * s.Q;
  const long panels = (K + PANEL - 1) / PANEL, taps = s.R * s.S * C;
  const Part all_pixels(pixels, PIXELS, s.by_channel ? 0 : t, s.by_channel ? 1 : threads);
  const Part all_panels(s.groups * panels, 1, s.by_channel ? t : 0, s.by_channel ? threads : 1);
  float* const sums = s.scratch + t * s.scratch_pitch;
  for (long from = all_pixels.from; from < all_pixels.to; from += s.block) {
    const long to = least(from + s.block, all_pixels.to);
    for (long p = all_panels.from; p < all_panels.to; p++) {
      const long group = p / panels, k = p % panels * PANEL, first = group * K + k;
      direct_panel(s, s.w + first * taps, group * C, first, least(PANEL, K - k), from, to, sums);
    }
  }
}
