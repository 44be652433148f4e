// Convolution with as many output channels as input ones in groups of 1 (depthwise), 2, 4, 8 or 16
// that fill a vector: output channels stay in their lanes, input ones are shuffled within a group.
//
// Weights: for each vector of output channels [R, S, C / groups, LANES].
#pragma once

#include "direct.h"
#include "epilogue.h"
#include "step.h"
#include "tile.h"

constexpr long MOST_TAPS = 128;

template <long GROUP>
static inline Ints lanes_of_input(long i) {
  Ints lanes;
  UNROLLED for (long lane = 0; lane < LANES; lane++) lanes[lane] = lane / GROUP * GROUP + i;
  return lanes;
}

template <long GROUP>
static void grouped_in(const Step& s, long from, long to) {
  const long taps = s.R * s.S;
  each_tile<1>(from, to, [&]<long M, long N>(long pixel) {
    const float* x[MOST_TAPS][M];
    const Windows<M> windows(s, pixel, 0);
    for (long tap = 0; tap < taps; tap++) windows.tap(s, tap / s.S, tap % s.S, x[tap]);
    const float* w = s.w;
    for (long k = 0; k < s.K; k += LANES) {
      Floats sum[M];
      UNROLLED for (long m = 0; m < M; m++) sum[m] = load(s.bias + k);
      for (long tap = 0; tap < taps; tap++) {
        Floats value[M];
        UNROLLED for (long m = 0; m < M; m++) value[m] = load(x[tap][m] + k);
        UNROLLED for (long i = 0; i < GROUP; i++, w += LANES) {
          const Floats weight = load(w);
          const Ints lanes = lanes_of_input<GROUP>(i);
          UNROLLED for (long m = 0; m < M; m++) {
            sum[m] += (GROUP == 1 ? value[m] : shuffle(value[m], lanes)) * weight;
          }
        }
      }
      UNROLLED for (long m = 0; m < M; m++) finish(s, sum[m], pixel + m, k);
    }
  });
}

static void grouped(const Step& s, long t, long threads) {
  const Part pixels(s.N * s.P * s.Q, PIXELS, t, threads);
  switch (s.C / s.groups) {
    case 1: grouped_in<1>(s, pixels.from, pixels.to); break;
    case 2: grouped_in<2>(s, pixels.from, pixels.to); break;
    case 4: grouped_in<4>(s, pixels.from, pixels.to); break;
    case 8: grouped_in<8>(s, pixels.from, pixels.to); break;
    case 16: grouped_in<16>(s, pixels.from, pixels.to); break;
  }
}
