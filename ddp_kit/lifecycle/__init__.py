"""One attempt of a run, from the lock on its directory to status.json."""
