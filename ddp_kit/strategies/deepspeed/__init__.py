"""DeepSpeed as a strategy."""
