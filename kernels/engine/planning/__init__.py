"""From candidates and their costs to the cheapest cover of a graph."""
