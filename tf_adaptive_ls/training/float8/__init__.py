"""Operands of 8 bits: what a user chooses, how an operand is rounded, and the products of them."""
