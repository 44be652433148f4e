"""Where values live: buffers, their lifetimes and aliases, and one arena for them."""
