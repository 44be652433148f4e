"""Proves, from the graph and by torch.export, that a batch may be filled up with zeros."""
