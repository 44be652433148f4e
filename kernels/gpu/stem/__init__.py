"""A ResNet's stem: 7x7/2 convolution, ReLU and max-pool in one kernel."""
