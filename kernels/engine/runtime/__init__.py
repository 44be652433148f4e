"""Runs a bound plan: executor, CUDA graphs, checks of inputs, weights."""
