// One step of a network: what is to be computed, on which memory. Python fills these in
// (kernels/cpu/program.py has the same fields in the same order).
#pragma once

enum Kind : long {
  DIRECT = 0,
  WINOGRAD = 1,
  GROUPED = 2,
  MAX_POOL = 3,
  MEAN = 4,
  AFFINE = 5,
  AVERAGE_POOL = 6,
  PICK = 7,
  WINOGRAD_INLINE = 8,
};

enum Activation : long { IDENTITY = 0, RELU = 1, RELU6 = 2, HARDSWISH = 3, SLOPE = 4 };

struct Step {
  Kind kind;
  const float *x, *w, *bias, *slope, *residual;
  float *y, *scratch;
  long N, H, W, C, K, R, S, P, Q;
  long stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  long x_pitch, residual_pitch, y_pitch;  // floats from one pixel to the next
  Activation activation;
  long residual_last;   // the residual is added after the activation
  long by_channel;      // threads part the output channels, not the pixels
  long block;           // pixels (Winograd: tiles) taken through all channels at a time
  long scratch_pitch;   // floats of scratch memory for each thread
  // fused_chain.h, fused_rows.h:
  long joined;                            // so many of the next steps take each block of this one
  long rows;                              // of a strip, where this step reads the one before so
  long x_local, residual_local, y_local;  // floats into the scratch memory, 0: not there

  bool rows_joined() const { return this[1].rows; }  // fused_rows.h, else fused_chain.h
};
