"""Who hangs: each rank tells the others where it is, and what does not move is named and ended."""
