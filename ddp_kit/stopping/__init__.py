"""Every reason why a run ends before its end."""
