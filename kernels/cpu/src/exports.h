// The constants and struct layouts that Python asks for, so that they exist once.
#pragma once

#include <cstddef>

#include "conv_direct.h"
#include "conv_grouped.h"
#include "base/digest.h"
#include "step.h"
#include "team.h"
#include "tile.h"

struct Constant {
  const char* name;
  long value;
};

#define CONSTANT(name) {#name, name},
#define STEP_OFFSET(field) {"Step." #field, offsetof(Step, field)},
#define REGION_OFFSET(field) {"Region." #field, offsetof(Region, field)},

static const Constant constants[] = {
    CONSTANT(LANES) CONSTANT(MR) CONSTANT(NR) CONSTANT(CACHE_LINE)
    CONSTANT(MAX_ROW) CONSTANT(MAX_TAPS) {"MAX_THREADS", team::MAX_THREADS},
    // kinds of steps, by the names that Python has for them
    {"kind.direct", DIRECT}, {"kind.winograd", WINOGRAD}, {"kind.grouped", GROUPED},
    {"kind.max_pool", MAX_POOL}, {"kind.mean", MEAN},
    {"kind.affine", AFFINE}, {"kind.average_pool", AVERAGE_POOL}, {"kind.pick", PICK},
    {"kind.chain", CHAIN}, {"kind.row_fused", ROW_FUSED},
    {"kind.to_bf16", TO_BF16}, {"kind.to_fp32", TO_FP32}, {"kind.layer_norm", LAYER_NORM},
    {"kind.to_u8", TO_U8}, {"kind.group_moments", GROUP_MOMENTS}, {"kind.group_norm", GROUP_NORM},
    {"kind.split_sum", SPLIT_SUM}, {"kind.split_softmax", SPLIT_SOFTMAX},
    {"storage.fp32", FP32}, {"storage.bf16", BF16}, {"storage.u8", U8}, {"storage", STORAGE},
    {"activation.identity", IDENTITY}, {"activation.relu", RELU}, {"activation.relu6", RELU6},
    {"activation.hardswish", HARDSWISH}, {"activation.hardsigmoid", HARDSIGMOID},
    {"activation.silu", SILU}, {"activation.sigmoid", SIGMOID},
    {"activation.gelu", GELU}, {"activation.gelu_tanh", GELU_TANH},
    {"activation.leaky_relu", SLOPE},  // with its slope for every channel
    {"activation.prelu", SLOPE},
    STEP_FIELDS(STEP_OFFSET) {"Step", sizeof(Step)},
    REGION_FIELDS(REGION_OFFSET) {"Region", sizeof(Region)},
    {nullptr, 0},
};
