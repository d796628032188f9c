"""What Keras trains with: scaled layers, and the optimizer that chooses their scales."""
