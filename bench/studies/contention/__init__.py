"""How fast each backend is while others use the same cores."""
