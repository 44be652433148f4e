// A step of a network: what to compute, on which memory. Python fills these in
// (kernels/cpu/program.py has the same fields and compares their offsets with those in exports.h).
//
// Contract of every step:
// - Tensors are NHWC, of the library's `Value`, but for what conversions and `y_fp32` say. A pixel's channels are contiguous, pixels are `pitch`
//   values apart. Bias, slope, scale and the tables of pools are float32, and so are the weights of
//   grouped convolutions; those of Winograd are values, those of direct ones units of channels
//   (storage.h).
// - K counts whole vectors of output channels in convolutions and in steps with `unstored`, and
//   per-channel parameters (bias, slope, scale, offset) are padded to whole vectors. But where groups
//   of DIRECT and WINOGRAD fill no vectors, K counts channels, `unstored` says what each group lacks,
//   and those parameters have a vector more. Where the channels of other steps, and those of a
//   convolution without `unstored`, are no whole vectors, pitches have room for the rest of the last
//   one, which is read and written, too. Of what a grouped convolution reads, pitches may have that
//   room.
// - x and y may overlap only where they are the same pixels of a step without windows; y may be the
//   residual.
// - Each thread has `scratch_pitch` floats of scratch memory, undefined before a step.
//   resfuse_scratch_floats returns the floats that a step needs.
// - What GROUP_MOMENTS writes to y, and GROUP_NORM reads from `scale`, is as many floats as
//   resfuse_shared_floats returns, at a multiple of eight bytes.
// - All memory must outlive the call; steps store no pointers.
// debug_checks.h asserts as much of this as a step shows.
#pragma once

#include "base/storage.h"

enum Kind : long {
  DIRECT = 0,
  WINOGRAD = 1,
  GROUPED = 2,
  MAX_POOL = 3,
  MEAN = 4,
  AFFINE = 5,
  AVERAGE_POOL = 6,
  PICK = 7,
  CHAIN = 8,       // the `length` steps behind this one, fused block by block (fused_chain.h)
  ROW_FUSED = 9,  // the `length` steps behind this one, fused by strips of rows (fused_rows.h)
  TO_BF16 = 10,   // x is float32 (convert.h; in the library for bfloat16 alone)
  TO_FP32 = 11,   // y is float32 (in the libraries for bfloat16 and uint8)
  LAYER_NORM = 12,  // over the channels of each pixel
  TO_U8 = 13,       // x is float32 (in the library for uint8 alone)
  GROUP_MOMENTS = 14,  // means and squares for GROUP_NORM (group_norm.h)
  GROUP_NORM = 15,     // over the pixels and the channels of each of `groups` of an image
  SPLIT_SUM = 16,      // of `groups` splits of the channels, K each (split_attention.h)
  SPLIT_SOFTMAX = 17,  // over `groups` splits of the channels, K each
};

enum Activation : long {
  IDENTITY = 0,
  RELU = 1,
  RELU6 = 2,
  HARDSWISH = 3,
  SLOPE = 4,
  HARDSIGMOID = 5,
  SILU = 6,
  SIGMOID = 7,
  GELU = 8,
  GELU_TANH = 9,
};

struct Step {
  Kind kind;
  const Value* x;
  const float *w, *bias, *slope;  // null: none
  const Value* residual;
  const Value* gate;  // of SPLIT_SUM
  Value* y;
  float* scratch;
  long N, H, W, C, K, R, S, P, Q;
  long stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  long x_pitch, residual_pitch, y_pitch, gate_pitch;  // values from one pixel to the next
  // Of convolutions and AFFINE: channels of the last vector, of each group, that neither y nor the
  // residual has
  long unstored;
  Activation activation;
  long residual_last;   // whether the residual is added after the activation
  long by_channel;      // whether threads divide the output channels and not the pixels
  long block;           // pixels (Winograd: tiles) taken through all output channels at a time
  long scratch_pitch;   // floats from one thread's scratch memory to the next's
  long length;          // CHAIN, ROW_FUSED: how many of the next steps are fused; else 0
  long rows;            // ROW_FUSED: rows of the last step's output in a strip
  // In a fused run: the value's offset in the thread's scratch memory of the run, in floats, or -1
  // for a value at its address.
  long x_local, residual_local, y_local;
  Storage storage;  // of the library that runs it
  // Values in uint8 stand for scale * (value - zero): see kernels/ops/quantization.py. The sums of a
  // convolution begin with offset[k] = -x_zero * the sum of channel k's weights, and are multiplied
  // by scale[k], that of x times that of those weights; it has no use for x_scale.
  const float* scale;
  const int* offset;
  long x_zero, y_zero, residual_zero;
  long y_fp32;  // whether y is float32: of convolutions, MEAN, AVERAGE_POOL and AFFINE
  float x_scale, y_inverse_scale, residual_scale;
  float eps;  // of LAYER_NORM and GROUP_NORM
};

static inline bool is_convolution(const Step& s) { return s.kind <= GROUPED; }

// Returns the groups that a convolution computes one by one: GROUPED has them within vectors.
static inline long groups_apart(const Step& s) { return s.kind == GROUPED ? 1 : s.groups; }

// The names of all fields, for exports.h.
#define STEP_FIELDS(FIELD)                                                                    \
  FIELD(kind)                                                                                 \
  FIELD(x) FIELD(w) FIELD(bias) FIELD(slope) FIELD(residual) FIELD(gate) FIELD(y) FIELD(scratch) \
  FIELD(N) FIELD(H) FIELD(W) FIELD(C) FIELD(K) FIELD(R) FIELD(S) FIELD(P) FIELD(Q)            \
  FIELD(stride_h) FIELD(stride_w) FIELD(pad_h) FIELD(pad_w) FIELD(dilation_h)                 \
  FIELD(dilation_w) FIELD(groups) FIELD(x_pitch) FIELD(residual_pitch) FIELD(y_pitch)         \
  FIELD(gate_pitch) FIELD(unstored)                                                           \
  FIELD(activation) FIELD(residual_last) FIELD(by_channel) FIELD(block) FIELD(scratch_pitch)  \
  FIELD(length) FIELD(rows) FIELD(x_local) FIELD(residual_local) FIELD(y_local) FIELD(storage)  \
  FIELD(scale) FIELD(offset) FIELD(x_zero) FIELD(y_zero) FIELD(residual_zero) FIELD(y_fp32)     \
  FIELD(x_scale) FIELD(y_inverse_scale) FIELD(residual_scale) FIELD(eps)
