// 3x3 convolution with stride 1 as Winograd's F(2x2, 3x3): 16 multiplications for four outputs where
// the direct form takes 36 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// 2015). The transforms only add, so the error is that of direct convolution.
//
// A 4x4 patch d of the input becomes B^T d B, 16 matrix products over channels follow (one for each
// of its elements), and A^T m A is a 2x2 patch of the output.
//
// Weights: for each panel of up to PANEL output channels, [16, C, panel] of G w G^T.
// Scratch, for each thread: the transformed input [16, block, C], then products [16, block, PANEL].
#pragma once

#include "epilogue.h"
#include "step.h"
#include "tile.h"

static inline void transform_input(const Floats d[4][4], Floats v[4][4]) {
  Floats u[4][4];
  UNROLLED for (long j = 0; j < 4; j++) {
    u[0][j] = d[0][j] - d[2][j];
    u[1][j] = d[1][j] + d[2][j];
    u[2][j] = d[2][j] - d[1][j];
    u[3][j] = d[1][j] - d[3][j];
  }
  UNROLLED for (long i = 0; i < 4; i++) {
    v[i][0] = u[i][0] - u[i][2];
    v[i][1] = u[i][1] + u[i][2];
    v[i][2] = u[i][2] - u[i][1];
    v[i][3] = u[i][1] - u[i][3];
  }
}

static inline void transform_output(const Floats m[4][4], Floats y[2][2]) {
  Floats u[2][4];
  UNROLLED for (long j = 0; j < 4; j++) {
    u[0][j] = m[0][j] + m[1][j] + m[2][j];
    u[1][j] = m[1][j] - m[2][j] - m[3][j];
  }
  UNROLLED for (long i = 0; i < 2; i++) {
    y[i][0] = u[i][0] + u[i][1] + u[i][2];
    y[i][1] = u[i][1] - u[i][2] - u[i][3];
  }
}

// Where the 2x2 output patch number `tile` lies.
struct Patch {
  long image, p, q;
  Patch(const Step& s, long tile) {
    const long across = (s.Q + 1) / 2, down = (s.P + 1) / 2;
    q = tile % across * 2;
    p = tile / across % down * 2;
    image = tile / across / down;
  }
};

static void gather(const Step& s, const Patch& at, long plane, float* to) {
  const long h = at.p - s.pad_h, w = at.q - s.pad_w;
  for (long c = 0; c < s.C; c += LANES) {
    Floats d[4][4], v[4][4];
    UNROLLED for (long i = 0; i < 4; i++) {
      UNROLLED for (long j = 0; j < 4; j++) {
        const bool there = h + i >= 0 && h + i < s.H && w + j >= 0 && w + j < s.W;
        d[i][j] = there ? load(s.x + ((at.image * s.H + h + i) * s.W + w + j) * s.x_pitch + c)
                        : Floats{};
      }
    }
    transform_input(d, v);
    UNROLLED for (long i = 0; i < 16; i++) store(to + i * plane + c, v[i / 4][i % 4]);
  }
}

static void scatter(const Step& s, const Patch& at, const float* from, long plane, long k,
                    long channels) {
  for (long c = 0; c < channels; c += LANES) {
    Floats m[4][4], y[2][2];
    UNROLLED for (long i = 0; i < 16; i++) m[i / 4][i % 4] = load(from + i * plane + c);
    transform_output(m, y);
    const Floats bias = load(s.bias + k + c);
    for (long i = 0; i < least(2, s.P - at.p); i++) {
      for (long j = 0; j < least(2, s.Q - at.q); j++) {
        const long pixel = (at.image * s.P + at.p + i) * s.Q + at.q + j;
        finish(s, y[i][j] + bias, pixel, k + c);
      }
    }
  }
}

// product[row][0..panel) = input[row][0..C) @ w for `count` rows, slice by slice as direct_slices.
static void multiply(const Step& s, const float* input, const float* w, float* product, long count,
                     long panel) {
  const long parts = (s.C + DEPTH - 1) / DEPTH;
  for (long part = 0; part < parts; part++) {
    const long c = s.C * part / parts, depth = s.C * (part + 1) / parts - c;
    Ahead ahead(w + depth * panel, depth * panel);
    each_tile_of(panel, 0, count, [&]<long M, long N>(long row) {
      float* const kept = product + row * PANEL;
      Tile<M, N> tile;
      if (part == 0) {
        tile.start(nullptr);
      } else {
        tile.resume(kept);
      }
      const float* x[M];
      for (long m = 0; m < M; m++) x[m] = input + (row + m) * s.C + c;
      tile.add(x, w, depth, ahead.take(depth), Next{M * s.C, nullptr, 0});
      tile.put_away(kept);
    });
    w += depth * panel;
  }
}

static inline long winograd_tiles(const Step& s) {
  return s.N * ((s.P + 1) / 2) * ((s.Q + 1) / 2);
}

static inline long winograd_panels(const Step& s) { return (s.K + PANEL - 1) / PANEL; }

static void winograd_in(const Step& s, const Part& all_tiles, const Part& all_panels,
                        float* input) {
  const long plane = s.block * s.C, product_plane = s.block * PANEL;
  float* const product = input + 16 * plane;
  for (long from = all_tiles.from; from < all_tiles.to; from += s.block) {
    const long count = least(s.block, all_tiles.to - from);
    for (long i = 0; i < count; i++) gather(s, Patch(s, from + i), plane, input + i * s.C);
    for (long p = all_panels.from; p < all_panels.to; p++) {
      const long k = p * PANEL, panel = least(PANEL, s.K - k);
      for (long e = 0; e < 16; e++) {
        const float* const w = s.w + (k * 16 + e * panel) * s.C;
        multiply(s, input + e * plane, w, product + e * product_plane, count, panel);
      }
      for (long i = 0; i < count; i++) {
        scatter(s, Patch(s, from + i), product + i * PANEL, product_plane, k, panel);
      }
    }
  }
}

static void winograd(const Step& s, long t, long threads) {
  const Part tiles(winograd_tiles(s), PIXELS, s.by_channel ? 0 : t, s.by_channel ? 1 : threads);
  const Part panels(winograd_panels(s), 1, s.by_channel ? t : 0, s.by_channel ? threads : 1);
  winograd_in(s, tiles, panels, s.scratch + t * s.scratch_pitch);
}
