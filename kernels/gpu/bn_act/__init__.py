"""Batch norm in eval mode with an activation, where no convolution stands before it."""
