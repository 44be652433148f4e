// Asserts, in debug builds, all preconditions of step.h and the kernels that a step shows.
#pragma once

#include "conv3x3_winograd.h"
#include "conv_direct.h"
#include "conv_grouped.h"
#include "base/dcheck.h"
#include "fused_chain.h"
#include "fused_rows.h"
#include "group_norm.h"
#include "scratch.h"
#include "step.h"

namespace checks {

static inline long windows(long size, long pad, long kernel, long stride, long dilation) {
  return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

static void convolution(const Step& s) {
  DCHECK(s.N > 0 && s.H > 0 && s.W > 0 && s.C > 0 && s.K > 0 && s.R > 0 && s.S > 0);
  DCHECK(s.stride_h > 0 && s.stride_w > 0 && s.dilation_h > 0 && s.dilation_w > 0);
  DCHECK(s.pad_h >= 0 && s.pad_w >= 0);
  DCHECK(s.P == windows(s.H, s.pad_h, s.R, s.stride_h, s.dilation_h) && s.P > 0);
  DCHECK(s.Q == windows(s.W, s.pad_w, s.S, s.stride_w, s.dilation_w) && s.Q > 0);
  DCHECK(s.groups > 0 && s.C % s.groups == 0);
  DCHECK(s.w && s.bias);
  if (STORAGE == U8) DCHECK(s.kind != WINOGRAD && s.scale && s.offset);
  DCHECK(0 <= s.unstored && s.unstored < LANES);
  const long groups = groups_apart(s);
  if (groups == 1) DCHECK(s.K % LANES == 0);
  if (groups > 1) DCHECK(s.K % groups == 0 && (s.K / groups + s.unstored) % LANES == 0);
  DCHECK(s.x_pitch >= s.C && s.y_pitch >= s.K - (groups > 1 ? 0 : s.unstored));
  if (s.kind == DIRECT) {
    DCHECK(s.C / s.groups <= MAX_ROW);
    DCHECK(s.block > 0);
  } else if (s.kind == GROUPED) {
    DCHECK(s.groups > 1 && s.K == whole_vectors(s.C) && LANES % (s.C / s.groups) == 0);
    DCHECK(s.R * s.S <= MAX_TAPS);
    DCHECK(s.K <= MAX_ROW);
  } else {
    DCHECK(s.R == 3 && s.S == 3);
    DCHECK(s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1);
    DCHECK(s.C % LANES == 0);
    DCHECK(s.block > 0);
  }
}

static bool is_split(const Step& s) { return s.kind == SPLIT_SUM || s.kind == SPLIT_SOFTMAX; }
static bool is_group_norm(const Step& s) { return s.kind == GROUP_MOMENTS || s.kind == GROUP_NORM; }

static void map(const Step& s) {
  const long vectors = whole_vectors(s.K);
  DCHECK(0 <= s.unstored && s.unstored < LANES);
  DCHECK(s.unstored == 0 || (s.kind == AFFINE && s.K == vectors));
  DCHECK(s.K > 0 && (s.y_pitch >= vectors - s.unstored || s.kind == GROUP_MOMENTS));
  DCHECK(s.kind == PICK ? s.x_pitch >= s.C : s.x_pitch >= vectors);
  if (s.kind == MEAN) {
    DCHECK(s.N > 0 && s.H > 0 && s.W > 0);
  } else {
    DCHECK(s.N > 0 && s.P > 0 && s.Q > 0);
  }
  if (s.kind == AFFINE) DCHECK(s.w && s.bias);
  if (s.kind == AVERAGE_POOL || s.kind == PICK) DCHECK(s.w && s.slope);
  if (s.kind == LAYER_NORM) {
    DCHECK(s.w && s.bias && s.eps >= 0);
    DCHECK(s.activation == IDENTITY && !s.residual);
  }
  if (is_split(s)) {
    DCHECK(s.groups > 0 && s.x_pitch >= s.groups * s.K);
    DCHECK(s.kind == SPLIT_SUM || s.y_pitch >= s.groups * s.K);
    DCHECK(!s.gate || (s.kind == SPLIT_SUM && s.gate_pitch >= s.groups * s.K));
    DCHECK(s.activation == IDENTITY && !s.residual);
  }
  if (is_group_norm(s)) DCHECK(s.groups > 0 && s.K % s.groups == 0);
  if (s.kind == GROUP_NORM) DCHECK(s.w && s.bias && s.eps >= 0 && s.scale);
  if (s.kind == MAX_POOL || s.kind == AVERAGE_POOL) {
    DCHECK(s.R > 0 && s.S > 0 && s.stride_h > 0 && s.stride_w > 0 && s.pad_h >= 0 && s.pad_w >= 0);
  }
  if (s.kind == MAX_POOL) DCHECK(s.dilation_h > 0 && s.dilation_w > 0);
  if (s.kind == PICK) {
    for (long p = 0; p < s.P; p++) DCHECK(s.w[p] >= -1 && s.w[p] < s.H);
    for (long q = 0; q < s.Q; q++) DCHECK(s.slope[q] >= -1 && s.slope[q] < s.W);
    for (long k = 0; s.bias && k < s.C; k++) DCHECK(s.bias[k] >= 0 && s.bias[k] < s.x_pitch);
  }
}

static void conversion(const Step& s) {
  DCHECK(STORAGE != FP32 && (s.kind == TO_FP32 || s.kind == (STORAGE == U8 ? TO_U8 : TO_BF16)));
  DCHECK(s.N > 0 && s.P > 0 && s.Q > 0 && s.C > 0);
  DCHECK(s.x_pitch >= s.C && s.K >= s.C && s.y_pitch >= s.K && s.unstored == 0);
}

static bool is_positive(float scale) { return scale > 0 && scale < __builtin_inff(); }
static bool is_value(long number) { return 0 <= number && number <= 255; }

// Checks what uint8 needs beside; max-pools and picks store what they read.
static void quantization(const Step& s) {
  DCHECK(STORAGE == U8 || s.y_fp32 == 0);
  if (STORAGE != U8) return;
  DCHECK(is_value(s.x_zero) && is_value(s.y_zero) && is_value(s.residual_zero));
  const bool scales = is_convolution(s), copies = s.kind == MAX_POOL || s.kind == PICK;
  if (!scales && !copies && s.kind != TO_U8) DCHECK(is_positive(s.x_scale));
  if (!copies && s.kind != TO_FP32 && !s.y_fp32) DCHECK(is_positive(s.y_inverse_scale));
  if (s.residual || s.residual_local >= 0) DCHECK(is_positive(s.residual_scale));
  if (s.y_fp32) {
    DCHECK(scales || s.kind == MEAN || s.kind == AFFINE || s.kind == AVERAGE_POOL);
    DCHECK(s.y_local < 0 && (!s.residual || s.residual != s.y));
  }
  DCHECK(s.kind != LAYER_NORM && !is_group_norm(s) && !is_split(s));
}

// Checks a step, fused or not.
static void kernel(const Step& s) {
  DCHECK(s.length == 0 && s.storage == STORAGE);
  if (is_convolution(s)) {
    convolution(s);
  } else if (s.kind == TO_BF16 || s.kind == TO_FP32 || s.kind == TO_U8) {
    conversion(s);
  } else {
    DCHECK((s.kind >= DIRECT && s.kind <= PICK) || s.kind == LAYER_NORM ||
           is_group_norm(s) || is_split(s));
    map(s);
  }
  quantization(s);
  DCHECK(s.activation >= IDENTITY && s.activation <= GELU_TANH);
  DCHECK(s.activation != SLOPE || s.slope);
  DCHECK(s.x || s.x_local >= 0);
  DCHECK(s.y || s.y_local >= 0);
  if (s.residual || s.residual_local >= 0) DCHECK(s.residual_pitch >= whole_vectors(s.K) - s.unstored);
  const long scratch = scratch_floats(s);
  if (scratch) DCHECK(s.scratch && s.scratch_pitch >= scratch);
}

// Checks that a local value fits in the run's scratch memory, behind the fused step's own.
static void local(const Step& run, const Step& s, long offset, long floats) {
  if (offset < 0) return;
  DCHECK(offset + floats <= run.scratch_pitch);
  const long own = scratch_floats(s);
  if (own) DCHECK(s.scratch >= run.scratch && s.scratch + own <= run.scratch + offset);
}

static void fused(const Step* run) {
  DCHECK(run->length > 0 && (run->scratch || run->scratch_pitch == 0));
  const long pixels = local_pixels(run);
  for (long i = 1; i <= run->length; i++) {
    const Step& s = run[i];
    kernel(s);
    DCHECK(!s.by_channel);
    if (scratch_floats(s)) DCHECK(s.scratch_pitch == run->scratch_pitch);
    local(*run, s, s.x_local, floats_of(pixels * s.x_pitch));
    local(*run, s, s.residual_local, floats_of(pixels * s.residual_pitch));
    local(*run, s, s.y_local, floats_of(pixels * s.y_pitch));
  }
}

static void chain(const Step* run) {
  const Step& first = run[1];
  DCHECK(first.kind == DIRECT || first.kind == WINOGRAD || first.kind == GROUPED);
  DCHECK(first.block > 0 && first.x_local < 0 && first.residual_local < 0);
  if (first.kind == WINOGRAD) DCHECK(first.block % tiles_across(first) == 0);
  for (long i = 2; i <= run->length; i++) {
    const Step& s = run[i];
    DCHECK(s.kind == DIRECT && s.R == 1 && s.S == 1 && s.pad_h == 0 && s.pad_w == 0);
    DCHECK(s.N == first.N && s.P == first.P && s.Q == first.Q);
    DCHECK(s.block >= chain_pixels(first));
    if (s.x_local >= 0) DCHECK(s.stride_h == 1 && s.stride_w == 1);
  }
}

static void row_fused(const Step* run) {
  DCHECK(run->length >= 2 && run->rows > 0);
  const Step &conv = run[1], &reader = run[2];
  DCHECK(conv.kind == DIRECT || conv.kind == GROUPED);
  DCHECK(reader.kind == DIRECT || reader.kind == GROUPED || reader.kind == MAX_POOL);
  DCHECK(!conv.residual && conv.x_local < 0 && conv.residual_local < 0 && conv.y_local >= 0);
  DCHECK(reader.x_local == conv.y_local && reader.residual_local < 0);
  DCHECK((reader.y_local >= 0) == (run->length > 2));
  DCHECK(reader.N == conv.N && reader.H == conv.P && reader.W == conv.Q);
  DCHECK(reader.x_pitch == conv.y_pitch);
  for (long i = 3; i <= run->length; i++) {
    const Step& s = run[i];
    DCHECK(s.kind == DIRECT && s.R == 1 && s.S == 1 && s.pad_h == 0 && s.pad_w == 0);
    DCHECK(s.stride_h == 1 && s.stride_w == 1);
    DCHECK(s.N == reader.N && s.P == reader.P && s.Q == reader.Q);
    DCHECK(s.block >= min(run->rows, reader.P) * reader.Q);
    DCHECK(s.x_local >= 0 && s.residual_local < 0 && (s.y_local >= 0) == (i < run->length));
  }
}

static void step(const Step* s) {
  if (s->kind == CHAIN || s->kind == ROW_FUSED) {
    s->kind == CHAIN ? chain(s) : row_fused(s);
    fused(s);
  } else {
    DCHECK(s->x_local == -1 && s->residual_local == -1 && s->y_local == -1);
    kernel(*s);
  }
}

}  // namespace checks
