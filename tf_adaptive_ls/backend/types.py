"""The type of a tensor of either backend."""

from typing import Any, TypeAlias

# It may also be a NumPy array if it is not differentiated, and gradients may be `tf.IndexedSlices`.
Tensor: TypeAlias = Any
