"""The ranks of one machine."""
