"""Quantizes the weights of trained models, in plain Keras models."""
