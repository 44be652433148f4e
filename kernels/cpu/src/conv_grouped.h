// Convolution with as many output channels as input channels, in groups of 1 (depthwise), 2, 4, 8
// or 16 that fill a vector: output channels stay in their lanes, input channels are shuffled within
// a group. Product i of lane l takes input channel l ^ i, so that the first product needs no
// shuffle.
//
// Packed weights, float32: for each vector of output channels [R, S, i, LANES]. Those of uint8 are
// integers, and so are its sums: Python refuses convolutions with sums that float32 would round.
#pragma once

#include "conv_direct.h"
#include "base/dcheck.h"
#include "epilogue.h"
#include "step.h"
#include "tile.h"

constexpr long MAX_TAPS = 128;

static inline Floats input_of(Floats channels, long i) {
  if (i == 0) return channels;
  Ints lanes;
  UNROLLED for (long lane = 0; lane < LANES; lane++) lanes[lane] = lane ^ i;
  return shuffle(channels, lanes);
}

// What sums begin with, as in direct convolutions.
static ALWAYS_INLINE Floats first_of_grouped(const Step& s, long k) {
#if defined(RESFUSE_U8)
  return as_floats(load(s.offset + k));
#else
  return load(s.bias + k);
#endif
}

// Calls `compute(k, read)` for each vector of channels. Where a pixel has no room behind its
// channels, `read` takes those of the last vector alone.
template <long GROUP, class Compute>
static ALWAYS_INLINE void for_each_vector(const Step& s, const Compute& compute) {
  const bool room = GROUP == LANES || s.x_pitch >= s.K;  // whole groups of LANES leave none over
  const long whole = room ? s.K : s.K - LANES, last = s.C - whole;
  for (long k = 0; k < whole; k += LANES) {
    compute(k, [](const Value* x) ALWAYS_INLINE_LAMBDA { return load(x); });
  }
  if (!room) compute(whole, [&](const Value* x) ALWAYS_INLINE_LAMBDA { return load_first(x, last); });
}

template <long GROUP>
static void grouped_pixels(const Step& s, long from, long to) {
  const long taps = s.R * s.S;
  for_each_tile<1>(from, to, [&]<long M, long N>(long pixel) {
    const Value* x[MAX_TAPS][M];
    const Windows<M> windows(s, pixel, 0);
    for (long tap = 0; tap < taps; tap++) windows.tap(s, tap / s.S, tap % s.S, x[tap]);
    const float* w = s.w;
    for_each_vector<GROUP>(s, [&](long k, const auto& read) ALWAYS_INLINE_LAMBDA {
      Floats acc[M][1];
      UNROLLED for (long m = 0; m < M; m++) acc[m][0] = first_of_grouped(s, k);
      for (long tap = 0; tap < taps; tap++) {
        Floats value[M];
        UNROLLED for (long m = 0; m < M; m++) value[m] = read(x[tap][m] + k);
        UNROLLED for (long i = 0; i < GROUP; i++, w += LANES) {
          const Floats weight = load(w);
          UNROLLED for (long m = 0; m < M; m++) {
            acc[m][0] = multiply_add(acc[m][0], input_of(value[m], i), weight);
          }
        }
      }
      epilogue_of_sums<M, 1>(s, acc, pixel, k);
    });
  });
}

// Computes M pixels of a row with 3x3 windows: an input vector is shuffled once for the three
// windows that read it. Shuffles and products share the same ports, so this is 1.4 times faster
// with groups of 4 channels.
template <long GROUP, long M>
static void grouped_row(const Step& s, long pixel) {
  const long q = pixel % s.Q - s.pad_w, row = pixel / s.Q;
  const long p = row % s.P * s.stride_h - s.pad_h, image = row / s.P;
  const Value* x[3][M + 2];
  for (long r = 0; r < 3; r++) {
    const long h = p + r * s.dilation_h;
    for (long j = 0; j < M + 2; j++) {
      const bool there = h >= 0 && h < s.H && q + j >= 0 && q + j < s.W;
      x[r][j] = there ? s.x + ((image * s.H + h) * s.W + q + j) * s.x_pitch : padding_of(s);
    }
  }
  const float* w = s.w;
  for_each_vector<GROUP>(s, [&](long k, const auto& read) ALWAYS_INLINE_LAMBDA {
    Floats acc[M][1];
    UNROLLED for (long m = 0; m < M; m++) acc[m][0] = first_of_grouped(s, k);
    for (long r = 0; r < 3; r++, w += 3 * GROUP * LANES) {
      UNROLLED for (long i = 0; i < GROUP; i++) {
        Floats weight[3];
        UNROLLED for (long t = 0; t < 3; t++) weight[t] = load(w + (t * GROUP + i) * LANES);
        UNROLLED for (long j = 0; j < M + 2; j++) {
          const Floats v = input_of(read(x[r][j] + k), i);
          UNROLLED for (long t = 0; t < 3; t++) {
            if (j - t >= 0 && j - t < M) {
              acc[j - t][0] = multiply_add(acc[j - t][0], v, weight[t]);
            }
          }
        }
      }
    }
    epilogue_of_sums<M, 1>(s, acc, pixel, k);
  });
}

template <long GROUP>
static void grouped_rows(const Step& s, long from, long to) {
  while (from < to) {
    const long left = min(to - from, s.Q - from % s.Q);
    switch (min(left, 8)) {
      case 1: grouped_row<GROUP, 1>(s, from); from += 1; break;
      case 2: grouped_row<GROUP, 2>(s, from); from += 2; break;
      case 3: grouped_row<GROUP, 3>(s, from); from += 3; break;
      case 4: grouped_row<GROUP, 4>(s, from); from += 4; break;
      case 5: grouped_row<GROUP, 5>(s, from); from += 5; break;
      case 6: grouped_row<GROUP, 6>(s, from); from += 6; break;
      case 7: grouped_row<GROUP, 7>(s, from); from += 7; break;
      default: grouped_row<GROUP, 8>(s, from); from += 8; break;
    }
  }
}

template <long GROUP>
static void grouped_range(const Step& s, const Range& pixels) {
  if (s.R == 3 && s.S == 3 && s.stride_w == 1 && s.dilation_w == 1) {
    grouped_rows<GROUP>(s, pixels.from, pixels.to);
  } else {
    grouped_pixels<GROUP>(s, pixels.from, pixels.to);
  }
}

static void conv_grouped(const Step& s, const Range& pixels) {
  DCHECK(0 <= pixels.from && pixels.to <= s.N * s.P * s.Q);
  DCHECK(s.R * s.S <= MAX_TAPS && s.K <= MAX_ROW);
  prepare_padding(s);
  switch (s.C / s.groups) {
    case 1: grouped_range<1>(s, pixels); break;
    case 2: grouped_range<2>(s, pixels); break;
    case 4: grouped_range<4>(s, pixels); break;
    case 8: grouped_range<8>(s, pixels); break;
    case 16: grouped_range<16>(s, pixels); break;
  }
}

// A thread's range of pixels, divided where rows end.
struct GroupedRange {
  Range pixels;
  Partition partition;

  GroupedRange(const Step& s, long range, long ranges)
      : pixels(s.N * s.P * s.Q, MR, range, ranges),
        partition(pixels.blocks(s.Q), 1,
            static_cast<double>(pixels.count()) * s.K * s.R * s.S * (s.C / s.groups)) {}

  Range piece(const Step& s, long i) const {
    const Range rows = partition.block(i);
    const long before = pixels.from / s.Q;  // whole rows
    return Range(i ? (before + rows.from) * s.Q : pixels.from,
                i + 1 < partition.pieces ? (before + rows.to) * s.Q : pixels.to);
  }
};

static void grouped_piece(const Step& s, long range, long ranges, long i) {
  conv_grouped(s, GroupedRange(s, range, ranges).piece(s, i));
}
