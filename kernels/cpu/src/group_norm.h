// Normalises each group of channels of each image: y = act((x - mean) / sqrt(variance + eps) * w +
// bias + residual), the mean and the variance over the pixels and channels of the group, NHWC.
//
// Two steps: GROUP_MOMENTS takes blocks of an image's pixels, for each group of each block the mean
// and the sum of squared differences from it; GROUP_NORM puts an image's blocks together and
// normalises any range of pixels. So one image in one group is work for all threads, too. The
// blocks, and the order of all sums, depend on the shape alone.
//
// Differences are taken, in float32, from the channel's own mean in the block, and what rounding has
// left of the mean in them is taken out again. Where channels and blocks are put together it is
// float64. So a large mean costs no digits. There is no such step in uint8.
#pragma once

#include <cmath>

#include "epilogue.h"
#include "step.h"
#include "tile.h"

struct GroupMoments {
  double mean, squares;
};

constexpr long GROUP_BLOCK_VALUES = 1 << 15;  // read twice, so that they stay in a cache
constexpr long LEAST_GROUP_BLOCK = 16, MOST_GROUP_BLOCKS = 64;

// The blocks of an image.
static inline long group_blocks(const Step& s) {
  const long pixels = s.P * s.Q, cached = GROUP_BLOCK_VALUES / s.K;
  const long block = cached > LEAST_GROUP_BLOCK ? cached : LEAST_GROUP_BLOCK;
  return min((pixels + block - 1) / block, MOST_GROUP_BLOCKS);
}

// The floats that GROUP_MOMENTS leaves for GROUP_NORM.
static inline long group_moments_floats(const Step& s) {
  return s.N * group_blocks(s) * s.groups * static_cast<long>(sizeof(GroupMoments) / sizeof(float));
}

// A thread's three numbers for each channel.
static inline long group_scratch_floats(const Step& s) { return 3 * whole_vectors(s.K); }

static RowRange group_moments_range(const Step& s, long range, long ranges) {
  const long blocks = group_blocks(s);
  return RowRange(s.N * blocks, 1, range, ranges, 8.0 * s.K * s.P * s.Q / blocks);
}

static RowRange group_norm_range(const Step& s, long range, long ranges) {
  return RowRange(s.N * s.P * s.Q, 1, range, ranges, 6 * s.K);
}

#if defined(RESFUSE_U8)
static void group_moments(const Step&, const Range&, float*) { __builtin_trap(); }
static void group_norm(const Step&, const Range&, float*) { __builtin_trap(); }
#else
// Of each of V vectors of channels over `pixels` pixels: a number near its mean, and the sums of the
// differences from that and of their squares.
template <long V>
static ALWAYS_INLINE void channel_moments(const Value* x, long pitch, long pixels, float* center,
                                          float* rest, float* squares) {
  const Floats share = broadcast(1 / static_cast<float>(pixels));  // shares: no sum overflows
  Floats mean[V][2] = {}, sum[V][2] = {}, square[V][2] = {};
  const auto each_pixel = [&](const auto& take) ALWAYS_INLINE_LAMBDA {
    long pixel = 0;
    for (; pixel + 2 <= pixels; pixel += 2) {
      UNROLLED for (long v = 0; v < V; v++) {
        take(load(x + pixel * pitch + v * LANES), v, 0);
        take(load(x + (pixel + 1) * pitch + v * LANES), v, 1);
      }
    }
    if (pixel < pixels) {
      UNROLLED for (long v = 0; v < V; v++) take(load(x + pixel * pitch + v * LANES), v, 0);
    }
  };
  each_pixel([&](Floats value, long v, long i) ALWAYS_INLINE_LAMBDA {
    mean[v][i] = multiply_add(mean[v][i], value, share);
  });
  UNROLLED for (long v = 0; v < V; v++) mean[v][0] += mean[v][1];
  each_pixel([&](Floats value, long v, long i) ALWAYS_INLINE_LAMBDA {
    const Floats difference = value - mean[v][0];
    sum[v][i] += difference;
    square[v][i] = multiply_add(square[v][i], difference, difference);
  });
  UNROLLED for (long v = 0; v < V; v++) {
    store(center + v * LANES, mean[v][0]);
    store(rest + v * LANES, sum[v][0] + sum[v][1]);
    store(squares + v * LANES, square[v][0] + square[v][1]);
  }
}

static void group_moments(const Step& s, const Range& part, float* scratch) {
  const long blocks = group_blocks(s), width = whole_vectors(s.K), channels = s.K / s.groups;
  float *const center = scratch, *const rest = center + width, *const squares = rest + width;
  GroupMoments* to = reinterpret_cast<GroupMoments*>(s.y) + part.from * s.groups;
  for (long i = part.from; i < part.to; i++) {
    const Range pixels(s.P * s.Q, 1, i % blocks, blocks);
    const Value* const x = s.x + (i / blocks * s.P * s.Q + pixels.from) * s.x_pitch;
    const long count = pixels.count();
    long k = 0;
    for (; k + 2 * LANES <= width; k += 2 * LANES) {
      channel_moments<2>(x + k, s.x_pitch, count, center + k, rest + k, squares + k);
    }
    if (k < width) channel_moments<1>(x + k, s.x_pitch, count, center + k, rest + k, squares + k);
    const double share = 1.0 / static_cast<double>(count);
    for (long first = 0; first < s.K; first += channels, to++) {
      double sum = 0, square = 0;
      for (long c = first; c < first + channels; c++) sum += center[c] + share * rest[c];
      const double mean = sum / static_cast<double>(channels);
      for (long c = first; c < first + channels; c++) {
        const double left = share * rest[c], off = center[c] + left - mean;
        square += squares[c] + static_cast<double>(count) * (off * off - left * left);
      }
      *to = {mean, square};
    }
  }
}

// What y is of an image: (x - mean) * scale + shift, three numbers for each channel.
struct GroupTables {
  float *mean, *scale, *shift;

  GroupTables(const Step& s, long image, float* scratch)
      : mean(scratch), scale(mean + whole_vectors(s.K)), shift(scale + whole_vectors(s.K)) {
    const long blocks = group_blocks(s), pixels = s.P * s.Q, channels = s.K / s.groups;
    const auto* const from =
        reinterpret_cast<const GroupMoments*>(s.scale) + image * blocks * s.groups;
    for (long group = 0; group < s.groups; group++) {
      const auto each_block = [&](const auto& take) ALWAYS_INLINE_LAMBDA {
        for (long i = 0; i < blocks; i++) {
          const long count = Range(pixels, 1, i, blocks).count();
          take(from[i * s.groups + group], static_cast<double>(count) / pixels);
        }
      };
      double center = 0, variance = 0;
      each_block([&](const GroupMoments& block, double share) { center += share * block.mean; });
      each_block([&](const GroupMoments& block, double share) {
        const double off = block.mean - center;
        variance += share * off * off + block.squares / (static_cast<double>(pixels) * channels);
      });
      const double deviation = std::sqrt((variance < 0 ? 0 : variance) + s.eps);
      const float nearest = static_cast<float>(center);
      for (long c = group * channels; c < (group + 1) * channels; c++) {
        const double factor = s.w[c] / deviation;
        mean[c] = nearest;
        scale[c] = static_cast<float>(factor);
        shift[c] = static_cast<float>(s.bias[c] - (center - nearest) * factor);
      }
    }
    for (long c = s.K; c < whole_vectors(s.K); c++) mean[c] = scale[c] = shift[c] = 0;
  }
};

static void group_norm(const Step& s, const Range& part, float* scratch) {
  const long pixels = s.P * s.Q;
  for (long pixel = part.from; pixel < part.to;) {
    const long image = pixel / pixels, end = min(part.to, (image + 1) * pixels);
    const GroupTables of(s, image, scratch);
    for (; pixel < end; pixel++) {
      const Value* const x = s.x + pixel * s.x_pitch;
      for (long k = 0; k < s.K; k += LANES) {
        const Floats difference = load(x + k) - load(of.mean + k);
        Sums<1, 1> y = {{multiply_add(load(of.shift + k), difference, load(of.scale + k))}};
        epilogue<1, 1>(s, y, pixel, k);
      }
    }
  }
}
#endif
