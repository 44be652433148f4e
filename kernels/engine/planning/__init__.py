"""Finds the cheapest cover of a graph by candidates, from their costs."""
