"""Residual networks for 32x32 images: three stages at 32, 16 and 8 pixels."""

from functools import partial

from resfuse.resnet_ref.blocks import (
    BasicBlock,
    Bottleneck,
    PlainBlock,
    PreActBasicBlock,
    PreActBottleneck,
    Shortcut,
)
from resfuse.resnet_ref.resnet import ResNet

_small_resnet = partial(ResNet, widths=(16, 32, 64), stem_width=16, small_images=True)


def blocks_per_stage(depth: int, layers_per_block: int, other_layers: int = 2) -> int:
    """Solves depth = 3 stages * blocks * layers_per_block + other_layers for the blocks.

    Raises:
        ValueError: no whole number of blocks has that depth.
    """
    blocks, rest = divmod(depth - other_layers, 3 * layers_per_block)
    if rest or blocks < 1:
        raise ValueError(
            f"depth is {depth}; accepted: {3 * layers_per_block}n + {other_layers}, n >= 1"
        )
    return blocks


def cifar_resnet(
    depth: int, shortcut: Shortcut = "A", num_classes: int = 10, features_only: bool = False
) -> ResNet:
    """The ResNet of He et al. 2015 (arXiv:1512.03385), section 4.2: depth 6n + 2, option A."""
    return _small_resnet(
        partial(BasicBlock, shortcut=shortcut),
        counts=[blocks_per_stage(depth, 2)] * 3,
        num_classes=num_classes,
        features_only=features_only,
    )


def cifar_plain(depth: int, num_classes: int = 10, features_only: bool = False) -> ResNet:
    """The plain counterpart of cifar_resnet, with exactly its parameters (option A adds none)."""
    return _small_resnet(
        PlainBlock,
        counts=[blocks_per_stage(depth, 2)] * 3,
        num_classes=num_classes,
        features_only=features_only,
    )


def cifar_preact(depth: int, num_classes: int = 10, features_only: bool = False) -> ResNet:
    """Pre-activation ResNet with bottlenecks, depth 9n + 2; He et al. 2016 (arXiv:1603.05027).

    Strides in the first 1x1, as the authors' KaimingHe/resnet-1k-layers does.
    """
    return _small_resnet(
        partial(PreActBottleneck, stride_in_1x1=True),
        counts=[blocks_per_stage(depth, 3)] * 3,
        preact=True,
        num_classes=num_classes,
        features_only=features_only,
    )


def cifar_wrn(depth: int, widen: int, num_classes: int = 10, features_only: bool = False) -> ResNet:
    """Wide ResNet WRN-depth-widen, depth 6n + 4, without dropout.

    Zagoruyko and Komodakis 2016 (arXiv:1605.07146), table 1: the stages are `widen` times wider
    than cifar_resnet's, the stem is not. The depth counts convolutions: two a block, the stem and
    the three projections.
    """
    return _small_resnet(
        PreActBasicBlock,
        counts=[blocks_per_stage(depth, 2, other_layers=4)] * 3,
        widths=(16 * widen, 32 * widen, 64 * widen),
        preact=True,
        num_classes=num_classes,
        features_only=features_only,
    )


def cifar_resnext(
    depth: int,
    groups: int,
    base_width: int,
    num_classes: int = 10,
    features_only: bool = False,
) -> ResNet:
    """ResNeXt of depth 9n + 2; Xie et al. 2016 (arXiv:1611.05431), section 5.3."""
    return _small_resnet(
        partial(Bottleneck, groups=groups, base_width=base_width),
        counts=[blocks_per_stage(depth, 3)] * 3,
        widths=(64, 128, 256),
        stem_width=64,
        num_classes=num_classes,
        features_only=features_only,
    )
