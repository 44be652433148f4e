"""Tactics on a GPU: Triton kernels and cuDNN."""
