"""Whether a batch may be filled up with zeros: proved from the graph, and by torch.export."""
