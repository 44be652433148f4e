"""From the bytes of a file to a torch.fx graph, by what operators/ says of each operator."""
