"""Batch norm in training mode, fused with what stands before and after it, and its gradients."""
