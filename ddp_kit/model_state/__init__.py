"""What forward passes change of a model besides gradients: seen, put back, kept over ranks."""
