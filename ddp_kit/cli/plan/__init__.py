"""`ddp-kit plan`: what a run would cost on N ranks, without them."""
