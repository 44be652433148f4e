"""A network as data: its graph, candidates for its nodes, and what they lower to."""
