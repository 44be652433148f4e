"""Which chains of layers one kernel can compute."""
