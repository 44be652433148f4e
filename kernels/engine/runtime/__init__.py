"""A bound plan at work: executor, CUDA graphs, inputs, weights."""
