"""What parts of a network cost at the least, here or on a GPU that is not here."""
