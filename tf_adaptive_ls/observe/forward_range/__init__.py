"""Finds the parts of a model that overflow in the forward pass, and widens them."""
