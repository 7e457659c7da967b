"""`ddp-kit VERB`."""
