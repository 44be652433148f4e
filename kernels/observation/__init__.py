"""What a forward reads and changes besides tensors, seen while it runs, and undone."""
