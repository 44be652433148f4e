"""Makes networks that were never trained behave like trained ones, for checks at low precision."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resfuse.resnet_ref.blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Sets the running statistics of every batch-norm layer to those of `images`.

    A new network's running mean 0 and variance 1 are far from what its layers see: in evaluation
    mode the activations grow by a factor a block and pass fp16's 65504 (ResNet-152's do). Here each
    layer gets the mean and variance (unbiased, torch's convention) of its own input, front to back
    in one pass, the layers before it being calibrated already. Training-mode averages would
    describe inputs normalised by the batch instead, which evaluation mode never sees.

    Deterministic. Parameters, momenta, num_batches_tracked, training flags and hooks stay as they
    were, and layers without running statistics are left alone.

    Args:
        model: any module of images. Changed in place.
        images: [N, C, H, W] on the model's device and in its dtype, normalised as for inference;
            all go through in one batch.

    Raises:
        ValueError: images are not [N, C, H, W], or empty, of one colour, not finite, or so small
            that some layer sees a single value a channel.
    """
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(
            f"images has shape {list(images.shape)}; accepted: [N, C, H, W], not empty"
        )
    if not images.isfinite().all():
        raise ValueError("images holds NaN or infinity; accepted: finite pixels")
    if (images == images[:1, :, :1, :1]).all():
        raise ValueError("images are all of one colour; accepted: photographs")

    training = {module: module.training for module in model.modules()}
    hooks = [
        module.register_forward_pre_hook(_take_statistics)
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    model.eval()
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag


@torch.no_grad()
def shrink_branches(model: nn.Module, gain: float = 0.2) -> None:
    """Multiplies the scale of the last batch-norm in every residual branch by `gain`.

    At the usual initialisation each block adds as much as its shortcut carries, and rounding errors
    grow with every block; a trained network's branches add little. So with random weights a check
    in fp16 proves nothing unless the branches shrink. ResNet-152 on 64-pixel photographs (CPU,
    calibrated; relative L2 distance of the logits):

        gain                          1      0.5    0.2    0.1
        fp16 from fp64                0.45   0.16   0.014  0.004
        bf16 from fp64                0.67   0.50   0.10   0.03
        one photograph from another   0.70   0.70   0.77   0.89

    Gain 0 is torchvision's zero_init_residual (Goyal et al. 2017, arXiv:1706.02677), in which the
    branches compute nothing. Call it before `calibrate`. Plain networks and VGG have no branches
    and stay as they are.

    Raises:
        ValueError: gain is not above 0.
    """
    if not gain > 0:
        raise ValueError(f"gain is {gain}; accepted: above 0")
    for block in model.modules():
        if isinstance(block, BasicBlock | PreActBasicBlock):
            block.bn2.weight.mul_(gain)
        elif isinstance(block, Bottleneck | PreActBottleneck):
            block.bn3.weight.mul_(gain)


def _take_statistics(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert isinstance(layer, _BatchNorm)
    assert layer.running_mean is not None and layer.running_var is not None
    x = inputs[0].float()  # a sum of fp16 values overflows
    if x.numel() == x.shape[1]:
        raise ValueError(
            "images are too small for statistics: a batch-norm layer sees one value a channel;"
            " accepted: two images or more, or larger ones"
        )
    variance, mean = torch.var_mean(x, dim=[0, *range(2, x.dim())])
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)
