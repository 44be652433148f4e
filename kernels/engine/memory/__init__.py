"""Memory of values: buffers, their lifetimes and aliases, and one arena for all of them."""
