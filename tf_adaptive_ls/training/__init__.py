"""Scaled layers, and the optimizer that chooses their scales."""
