"""Loss Change Allocation: what the gradients of each layer bought in units of loss."""
