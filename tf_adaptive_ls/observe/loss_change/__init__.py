"""Loss Change Allocation: divides the change of the loss among layers."""
