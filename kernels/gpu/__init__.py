"""Triton kernels, a folder an operation; experimental, see README.md."""
