"""Reference residual networks, with the parameter names of torchvision. Imports torch only."""

from resfuse.resnet_ref.calibrate import calibrate, shrink_branches
from resfuse.resnet_ref.models import MODELS, create, input_size, num_classes
from resfuse.resnet_ref.weights import load_pretrained, load_weights

__all__ = [
    "MODELS",
    "calibrate",
    "create",
    "input_size",
    "load_pretrained",
    "load_weights",
    "num_classes",
    "shrink_branches",
]
