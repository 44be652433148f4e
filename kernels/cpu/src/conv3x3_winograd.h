// 3x3 convolution with stride 1 as Winograd's F(2x2, 3x3): 16 multiplications for four outputs
// where the direct form takes 36 (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", 2015). The transforms only add, so the error is that of direct convolution.
//
// A 4x4 tile d of the input is transformed to B^T d B, 16 matrix products over channels follow (one
// for each of its elements), and A^T m A is a 2x2 tile of the output.
//
// Packed weights: for each group, panels of up to NR output channels, in each [16, C of a group,
// panel] of G w G^T, stored as values are. In bfloat16 they are rounded once, after the transform, which was computed in fp64:
// half the memory, for 1.7 times the error that rounded weights make in the direct form.
// Scratch of a thread: the transformed input [16, block, C] and products [16, block, NR]. These are
// float32, also where values are bfloat16: transformed, those would be rounded a second time.
#pragma once

#include "base/dcheck.h"
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

// The image and first row and column of the 2x2 output tile number `tile`.
struct TilePosition {
  long image, p, q;
  TilePosition(const Step& s, long tile) {
    const long across = (s.Q + 1) / 2, down = (s.P + 1) / 2;
    q = tile % across * 2;
    p = tile / across % down * 2;
    image = tile / across / down;
  }
};

// Transforms the input of a tile, element by element into planes.
static void gather(const Step& s, const TilePosition& at, long plane, float* to) {
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

// Transforms the products of a tile and stores its output pixels.
static void scatter(const Step& s, const TilePosition& at, const float* from, long plane,
                    const Panel& panel) {
  for (long c = 0; c < panel.width; c += LANES) {
    Floats m[4][4], y[2][2];
    UNROLLED for (long i = 0; i < 16; i++) m[i / 4][i % 4] = load(from + i * plane + c);
    transform_output(m, y);
    const Floats bias = load(s.bias + panel.k + c);
    for (long i = 0; i < min(2, s.P - at.p); i++) {
      for (long j = 0; j < min(2, s.Q - at.q); j++) {
        const long pixel = (at.image * s.P + at.p + i) * s.Q + at.q + j;
        Sums<1, 1> sum = {{y[i][j] + bias}};
        epilogue<1, 1>(s, sum, pixel, panel.k + c);
      }
    }
  }
}

// Padding without which the planes of the 16 elements would be a power of two apart and share one
// set of the caches.
constexpr long PLANE_PADDING = 3 * CACHE_LINE;

// A panel's output channels and a slice of the input channels of its group.
struct Slice {
  Panel panel;
  long c, depth;

  Slice(const Step& s, const Panel& panel, long part, long parts)
      : panel(panel),
        c(s.C / s.groups * part / parts),
        depth(s.C / s.groups * (part + 1) / parts - c) {}

  long weights() const { return depth * panel.width; }

  // The slice's weights of the transformed element `e`.
  const Value* weights(const Step& s, long e) const {
    const long before = (panel.before * 16 + e * panel.width) * (s.C / s.groups);
    return reinterpret_cast<const Value*>(s.w) + before + c * panel.width;
  }
};

// A thread's scratch memory: 16 planes each of transformed input and of products.
struct Workspace {
  float *input, *product;
  long input_plane, product_plane;

  Workspace(const Step& s, float* scratch)
      : input_plane(s.block * s.C + PLANE_PADDING), product_plane(s.block * NR + PLANE_PADDING) {
    input = scratch;
    product = input + 16 * input_plane;
  }

  static long floats(const Step& s) {
    const Workspace ws(s, nullptr);
    return 16 * (ws.input_plane + ws.product_plane) - PLANE_PADDING;  // none at the end
  }
};

// For element e and `count` rows: product[row][0..panel) (+)= input[row][0..depth) @ w.
static void multiply(const Step& s, const Slice& slice, long e, const Value* w,
                     const Workspace& ws, long count, WeightPrefetch<Value> next_w) {
  const long channel = slice.panel.group * (s.C / s.groups) + slice.c;
  const float* const input = ws.input + e * ws.input_plane + channel;
  for_each_tile_of_width(slice.panel.width, 0, count, [&]<long M, long N>(long row) {
    float* const product = ws.product + e * ws.product_plane + row * NR;
    Tile<M, N> tile;
    tile.init(nullptr);
    const float* x[M];
    for (long m = 0; m < M; m++) x[m] = input + (row + m) * s.C;
    tile.accumulate(x, w, slice.depth, next_w.take(slice.depth), Prefetch{M * s.C});
    if (slice.c) tile.accumulate_partial(product);
    tile.save_partial(product);
  });
}

// Computes the products of a panel from transformed weights, and prefetches the next ones.
static void products(const Step& s, const Panel& panel, const Workspace& ws, long count) {
  const long parts = (s.C / s.groups + KC - 1) / KC;
  for (long e = 0; e < 16; e++) {
    for (long part = 0; part < parts; part++) {
      const Slice slice(s, panel, part, parts);
      const Value* const w = slice.weights(s, e);
      const WeightPrefetch<Value> next_w(w + slice.weights(), slice.weights());
      multiply(s, slice, e, w, ws, count, next_w);
    }
  }
}

static inline long winograd_tiles(const Step& s) {
  return s.N * ((s.P + 1) / 2) * ((s.Q + 1) / 2);
}

static inline long winograd_panels(const Step& s) { return group_panels(s) * s.groups; }

// Returns the size of equal blocks, as few as with `block`: each block reads all weights, so a
// small last one would be expensive.
static inline long even_block(long tiles, long block) {
  if (tiles <= block) return block;
  const long blocks = (tiles + block - 1) / block, even = (tiles + blocks - 1) / blocks;
  return min(block, (even + MR - 1) / MR * MR);
}

// The tiles whose transformed input lies in a thread's scratch memory.
struct TransformedTiles {
  long from = -1, count = 0;
};

static void conv3x3_winograd(const Step& s, const Range& tiles, const Range& panels, float* scratch,
                        TransformedTiles* cached = nullptr) {
  DCHECK(0 <= panels.from && panels.to <= winograd_panels(s));
  const Workspace ws(s, scratch);
  const long block = even_block(tiles.count(), s.block);
  for (long from = tiles.from; from < tiles.to; from += block) {
    const long count = min(block, tiles.to - from);
    DCHECK(count <= s.block && 0 <= from && from + count <= winograd_tiles(s));
    if (!cached || cached->from != from || cached->count != count) {
      for (long i = 0; i < count; i++) {
        gather(s, TilePosition(s, from + i), ws.input_plane, ws.input + i * s.C);
      }
      if (cached) *cached = {from, count};
    }
    for (long p = panels.from; p < panels.to; p++) {
      const Panel panel(s, p);
      products(s, panel, ws, count);
      for (long i = 0; i < count; i++) {
        scatter(s, TilePosition(s, from + i), ws.product + i * NR, ws.product_plane, panel);
      }
    }
  }
}

// A thread's range: some tiles and all panels, or all tiles and some panels.
struct WinogradRange {
  Range tiles, panels;
  long block;
  Partition partition;

  WinogradRange(const Step& s, long range, long ranges)
      : tiles(winograd_tiles(s), MR, s.by_channel ? 0 : range, s.by_channel ? 1 : ranges),
        panels(winograd_panels(s), 1, s.by_channel ? range : 0, s.by_channel ? ranges : 1),
        block(even_block(tiles.count(), s.block)),
        partition(tiles.blocks(block), panels.count(),
            16.0 * tiles.count() * panels.count() * NR * (s.C / s.groups)) {}
};

static void winograd_piece(const Step& s, long range, long ranges, long i, float* scratch,
                           TransformedTiles& cached) {
  const WinogradRange own(s, range, ranges);
  const Range panels = own.panels.of(own.partition.panels(own.panels.count(), i));
  conv3x3_winograd(s, own.tiles.of(own.partition.block(i), own.block), panels, scratch, &cached);
}
