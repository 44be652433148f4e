"""The end of a bottleneck: 3x3 and 1x1 convolution, residual and ReLU in one kernel."""
