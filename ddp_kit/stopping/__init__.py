"""Every reason why a run ends before its last step, and how all ranks come to know of it."""
