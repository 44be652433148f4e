"""One module's forward as a graph, its guards and memory formats."""
