"""Fused layers for training mode: tracing, plans, and what runs in place of batch norms."""
