"""Turns a model into a graph: export, operations, merging, images of a batch."""
