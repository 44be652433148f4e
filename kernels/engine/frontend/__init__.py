"""From a model to a graph: export, operations, merging, images of a batch."""
