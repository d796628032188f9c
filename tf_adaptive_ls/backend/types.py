"""The type of a tensor of either backend."""

from typing import Any, TypeAlias

# Also a NumPy array, where nothing is differentiated, and a `tf.IndexedSlices` among gradients.
Tensor: TypeAlias = Any
