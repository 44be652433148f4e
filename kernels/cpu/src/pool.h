// Pooling over windows, the mean over each map, and single pixels picked from a map, NHWC.
#pragma once

#include "step.h"
#include "tile.h"

static void max_pool(const Step& s, const Range& rows) {
  for (long row = rows.from; row < rows.to; row++) {
    const long top = row % s.P * s.stride_h - s.pad_h;
    const Value* const image = s.x + row / s.P * s.H * s.W * s.x_pitch;
    for (long q = 0; q < s.Q; q++) {
      const long left = q * s.stride_w - s.pad_w;
      Value* const y = s.y + (row * s.Q + q) * s.y_pitch;
      for (long k = 0; k < s.K; k += LANES) {
        Floats most = broadcast(-__builtin_inff());
        for (long r = 0; r < s.R; r++) {
          const long h = top + r * s.dilation_h;
          if (h < 0 || h >= s.H) continue;
          for (long tap = 0; tap < s.S; tap++) {
            const long w = left + tap * s.dilation_w;
            if (w < 0 || w >= s.W) continue;
            const Floats value = load(image + (h * s.W + w) * s.x_pitch + k);
            most = ((value > most) | (value != value)) ? value : most;  // NaN stays NaN
          }
        }
        store(y + k, most);
      }
    }
  }
}

// A thread's range of rows of y, whose pixels read windows of R x S.
static RowRange pool_range(const Step& s, long range, long ranges) {
  const double window = s.kind == PICK ? 1 : s.R * s.S;
  return RowRange(s.N * s.P, 1, range, ranges, 4 * window * s.Q * s.K);
}

// A thread's range of vectors of channels.
static RowRange mean_range(const Step& s, long range, long ranges) {
  const long vectors = (s.K + LANES - 1) / LANES;
  return RowRange(s.N * vectors, 1, range, ranges, 4.0 * LANES * s.H * s.W);
}

static void global_mean(const Step& s, const Range& part) {
  const long vectors = (s.K + LANES - 1) / LANES, pixels = s.H * s.W;
  for (long i = part.from; i < part.to; i++) {
    const long image = i / vectors, k = i % vectors * LANES;
    const Value* x = s.x + image * pixels * s.x_pitch + k;
    Floats sum[4] = {};
    for (long pixel = 0; pixel < pixels; pixel++) sum[pixel % 4] += load(x + pixel * s.x_pitch);
    store(s.y + image * s.y_pitch + k, (sum[0] + sum[1] + (sum[2] + sum[3])) / broadcast(pixels));
  }
}

// Computes the sum of each window divided by w[p] * slope[q], which Python computes from how
// windows at the edge count.
static void average_pool(const Step& s, const Range& rows) {
  for (long row = rows.from; row < rows.to; row++) {
    const long top = row % s.P * s.stride_h - s.pad_h;
    const long first = top < 0 ? 0 : top, last = min(top + s.R, s.H);
    const Value* const image = s.x + row / s.P * s.H * s.W * s.x_pitch;
    for (long q = 0; q < s.Q; q++) {
      const long left = q * s.stride_w - s.pad_w;
      const long from = left < 0 ? 0 : left, to = min(left + s.S, s.W);
      const Floats count = broadcast(s.w[row % s.P] * s.slope[q]);
      Value* const y = s.y + (row * s.Q + q) * s.y_pitch;
      for (long k = 0; k < s.K; k += LANES) {
        Floats sum = {};
        for (long h = first; h < last; h++) {
          for (long w = from; w < to; w++) sum += load(image + (h * s.W + w) * s.x_pitch + k);
        }
        store(y + k, sum / count);
      }
    }
  }
}

// Computes y[p, q, k] = x[w[p], slope[q], k], or with a table of channels x[w[p], slope[q], bias[k]];
// zeros in channels [C, K).
static void pick(const Step& s, const Range& rows) {
  for (long row = rows.from; row < rows.to; row++) {
    const long h = row / s.P * s.H + static_cast<long>(s.w[row % s.P]);
    for (long q = 0; q < s.Q; q++) {
      const Value* const x = s.x + (h * s.W + static_cast<long>(s.slope[q])) * s.x_pitch;
      Value* const y = s.y + (row * s.Q + q) * s.y_pitch;
      if (s.bias) {
        for (long k = 0; k < s.C; k++) y[k] = x[static_cast<long>(s.bias[k])];
        for (long k = s.C; k < whole_vectors(s.K); k++) y[k] = Value{};
      } else {
        for (long k = 0; k < s.K; k += LANES) store(y + k, load_first(x + k, s.C - k));
      }
    }
  }
}
