"""`ddp-kit doctor`: is this place fit for a run, in seconds and before one is started."""
