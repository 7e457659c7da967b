"""The bytes of a checkpoint: who writes what, when it is whole, and reading it without trust."""
