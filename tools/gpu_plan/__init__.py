"""`resfuse gpu-plan`: what to measure when a GPU is at hand, most valuable first."""
