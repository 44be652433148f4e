// 3x3 convolution with stride 1 as Winograd's F(2x2, 3x3): 16 multiplications for four outputs where
// the direct form takes 36 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// 2015). The transforms only add, so the error is that of direct convolution.
//
// A 4x4 patch d of the input becomes B^T d B, 16 matrix products over channels follow (one for each
// of its elements), and A^T m A is a 2x2 patch of the output.
//
// Weights: WINOGRAD reads, for each panel of up to PANEL output channels, [16, C, panel] of G w G^T.
// These are 16/9 as large as w, so WINOGRAD_INLINE reads what conv_direct.h does and computes G w G^T
// itself, a slice of channels at a time and again for every block.
// Scratch, for each thread: the transformed input [16, block, C], products [16, block, PANEL], and
// the slice of transformed weights [16, SLICE, PANEL].
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

// A column of G w
static inline void transform_filter(Floats w0, Floats w1, Floats w2, Floats u[4]) {
  const Floats outer = (w0 + w2) * 0.5f, inner = w1 * 0.5f;
  u[0] = w0;
  u[1] = outer + inner;
  u[2] = outer - inner;
  u[3] = w2;
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

// Channels of a slice whose transformed weights are computed together: with all products' inputs
// they fit into a second-level cache.
constexpr long SLICE = 64;

// Planes of 16 elements would lie a power of two apart, all in one set of the caches.
constexpr long APART = 3 * LINE;

// A panel's output channels, and some of the input channels.
struct Slice {
  long k, panel, c, depth;

  Slice(const Step& s, long p, long part, long parts)
      : k(p * PANEL),
        panel(least(PANEL, s.K - k)),
        c(s.C * part / parts),
        depth(s.C * (part + 1) / parts - c) {}

  long floats() const { return depth * panel; }

  // Its weights in plane `i` of `planes`: taps, or transformed elements.
  const float* weights(const Step& s, long planes, long i) const {
    return s.w + (k * planes + i * panel) * s.C + c * panel;
  }
};

// Where a thread keeps what it computes: 16 planes of each.
struct Kept {
  float *input, *product, *weights;
  long input_plane, product_plane;
  static constexpr long weights_plane = SLICE * PANEL + APART;

  Kept(const Step& s, float* scratch)
      : input_plane(s.block * s.C + APART), product_plane(s.block * PANEL + APART) {
    input = scratch;
    product = input + 16 * input_plane;
    weights = product + 16 * product_plane;
  }
};

// The slice's G w G^T, [16, depth, panel].
static void transform_weights(const Step& s, const Slice& slice, const Kept& kept) {
  const float* const from = slice.weights(s, 9, 0);
  const long tap = s.C * slice.panel;
  for (long i = 0; i < slice.floats(); i += LANES) {
    Floats t[4][3], u[4];
    UNROLLED for (long j = 0; j < 3; j++) {
      const float* const w = from + j * tap + i;
      transform_filter(load(w), load(w + 3 * tap), load(w + 6 * tap), u);
      UNROLLED for (long r = 0; r < 4; r++) t[r][j] = u[r];
    }
    UNROLLED for (long r = 0; r < 4; r++) {
      transform_filter(t[r][0], t[r][1], t[r][2], u);
      UNROLLED for (long j = 0; j < 4; j++) {
        store(kept.weights + (4 * r + j) * kept.weights_plane + i, u[j]);
      }
    }
  }
}

// Element e's product[row][0..panel) (+)= input[row][0..depth) @ w for `count` rows.
static void multiply(const Step& s, const Slice& slice, long e, const float* w, const Kept& kept,
                     long count, Ahead ahead) {
  const float* const input = kept.input + e * kept.input_plane + slice.c;
  each_tile_of(slice.panel, 0, count, [&]<long M, long N>(long row) {
    float* const product = kept.product + e * kept.product_plane + row * PANEL;
    Tile<M, N> tile;
    tile.start(nullptr);
    const float* x[M];
    for (long m = 0; m < M; m++) x[m] = input + (row + m) * s.C;
    tile.add(x, w, slice.depth, ahead.take(slice.depth), Next{M * s.C});
    if (slice.c) tile.plus(product);
    tile.put_away(product);
  });
}

// The products of panel p, from transformed weights; the next ones in memory are fetched meanwhile.
static void products(const Step& s, long p, const Kept& kept, long count) {
  const long parts = (s.C + DEPTH - 1) / DEPTH;
  for (long e = 0; e < 16; e++) {
    for (long part = 0; part < parts; part++) {
      const Slice slice(s, p, part, parts);
      const float* const w = slice.weights(s, 16, e);
      multiply(s, slice, e, w, kept, count, Ahead(w + slice.floats(), slice.floats()));
    }
  }
}

// The same from the direct form's weights; the next slice's taps are fetched, then panel `next`'s.
static void products_inline(const Step& s, long p, long next, const Kept& kept, long count) {
  const long parts = (s.C + SLICE - 1) / SLICE;
  for (long part = 0; part < parts; part++) {
    const Slice slice(s, p, part, parts);
    const Slice after = part + 1 < parts ? Slice(s, p, part + 1, parts) : Slice(s, next, 0, parts);
    transform_weights(s, slice, kept);
    for (long e = 0; e < 16; e++) {
      const Ahead ahead(after.weights(s, 9, e % 9), after.floats());
      multiply(s, slice, e, kept.weights + e * kept.weights_plane, kept, count, ahead);
    }
  }
}

static inline long winograd_tiles(const Step& s) {
  return s.N * ((s.P + 1) / 2) * ((s.Q + 1) / 2);
}

static inline long winograd_panels(const Step& s) { return (s.K + PANEL - 1) / PANEL; }

// The size of as many blocks as `block` makes, none a small rest: each reads all weights.
static inline long evenly(long tiles, long block) {
  if (tiles <= block) return block;
  const long blocks = (tiles + block - 1) / block, each = (tiles + blocks - 1) / blocks;
  return least(block, (each + PIXELS - 1) / PIXELS * PIXELS);
}

// The tiles whose transformed input is in a thread's scratch memory.
struct Transformed {
  long from = -1, count = 0;
};

static void winograd_in(const Step& s, const Part& tiles, const Part& panels, float* scratch,
                        Transformed* there = nullptr) {
  const Kept kept(s, scratch);
  const long block = evenly(tiles.count(), s.block);
  for (long from = tiles.from; from < tiles.to; from += block) {
    const long count = least(block, tiles.to - from);
    if (!there || there->from != from || there->count != count) {
      for (long i = 0; i < count; i++) {
        gather(s, Patch(s, from + i), kept.input_plane, kept.input + i * s.C);
      }
      if (there) *there = {from, count};
    }
    for (long p = panels.from; p < panels.to; p++) {
      if (s.kind == WINOGRAD) {
        products(s, p, kept, count);
      } else {
        products_inline(s, p, p + 1 < panels.to ? p + 1 : panels.from, kept, count);
      }
      const long k = p * PANEL, panel = least(PANEL, s.K - k);
      for (long i = 0; i < count; i++) {
        scatter(s, Patch(s, from + i), kept.product + i * PANEL, kept.product_plane, k, panel);
      }
    }
  }
}

// A thread's range: of tiles through all panels, or of panels over all tiles.
struct WinogradRange {
  Part tiles, panels;
  long block;
  Cut cut;

  WinogradRange(const Step& s, long range, long ranges)
      : tiles(winograd_tiles(s), PIXELS, s.by_channel ? 0 : range, s.by_channel ? 1 : ranges),
        panels(winograd_panels(s), 1, s.by_channel ? range : 0, s.by_channel ? ranges : 1),
        block(evenly(tiles.count(), s.block)),
        cut(tiles.blocks(block), panels.count(),
            16.0 * tiles.count() * panels.count() * PANEL * s.C) {}
};

static void winograd_piece(const Step& s, long range, long ranges, long i, float* scratch,
                           Transformed& there) {
  const WinogradRange all(s, range, ranges);
  const Part panels = all.panels.of(all.cut.panels(all.panels.count(), i));
  winograd_in(s, all.tiles.of(all.cut.block(i), all.block), panels, scratch, &there);
}
