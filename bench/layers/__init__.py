"""`resfuse kernels`: which convolution of a network is the bad one, provider against provider.

Timed is y = relu(conv(x) + b), the form every convolution of a residual network takes once batch
norm is folded; a convolution that another operation follows (a residual add, nothing) is timed in
the same form. Adds, pooling and the classifier are left out.
"""
