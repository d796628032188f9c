"""After training: weights in few bits, in plain Keras models."""
