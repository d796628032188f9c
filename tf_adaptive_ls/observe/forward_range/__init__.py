"""`forward_range`: which parts of a model overflow in the forward pass, and how near others are."""
