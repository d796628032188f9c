"""What a tensor is: one of whichever backend computes."""

from typing import Any, TypeAlias

# Also a NumPy array, where nothing is differentiated, and a `tf.IndexedSlices` among gradients.
Tensor: TypeAlias = Any
