"""Runs as their directories show them, and the verbs about them."""
