"""The floating-point tensors in the arguments of a call, and what there is to know of one."""

import keras
from keras import ops, tree

from tf_adaptive_ls.numerics.float_format import FloatFormat
from tf_adaptive_ls.training import keras_internals
from tf_adaptive_ls.training.scale_plan import AT_S


class Arguments:
    """The arguments of a call, and the floating-point tensors among them.

    The tensors are cast as the layer would cast them if it computes in a wider format
    than they have: a gradient is then still wide when it is shifted, and rounded
    only after that.

    Attributes:
        tensors: List of the tensors, in the order that `tree.flatten` finds them in.
        narrow: Whether the gradient of each is written in a narrow format.
        groups: The `ScaleGroup` that the gradient of each leaves for, or `AT_S`.
    """

    def __init__(self, scaled, args, kwargs, route):
        self._args, self._kwargs = args, kwargs
        self._leaves = []
        groups = []
        for name, value in [(None, args), *kwargs.items()]:
            leaves = tree.flatten(value)
            planned = route and (route.args if name is None else route.kwargs.get(name))
            self._leaves += leaves
            groups += planned or [AT_S] * len(leaves)
        self._places = [i for i, leaf in enumerate(self._leaves) if is_float_tensor(leaf)]
        self.tensors = [self._leaves[i] for i in self._places]
        self.narrow = [scaled.is_narrow] * len(self.tensors)
        layer = scaled.layer
        if layer.autocast and not scaled.is_narrow:
            self.narrow = [is_narrow(tensor) for tensor in self.tensors]
            self.tensors = [
                ops.cast(tensor, layer.compute_dtype) if narrow else tensor
                for tensor, narrow in zip(self.tensors, self.narrow, strict=True)
            ]
        self.groups = [groups[i] for i in self._places]

    def replaced(self, tensors):
        """`(args, kwargs)` with `tensors` in place of `self.tensors`."""
        leaves = list(self._leaves)
        for i, tensor in zip(self._places, tensors, strict=True):
            leaves[i] = with_mask_of(leaves[i], tensor)
        leaves = iter(leaves)

        def refilled(value):
            return tree.pack_sequence_as(value, [next(leaves) for _ in tree.flatten(value)])

        return refilled(self._args), {name: refilled(v) for name, v in self._kwargs.items()}


def is_narrow(tensor):
    """Whether the gradient of `tensor` is written in a format that a scale matters to."""
    return FloatFormat(keras.backend.standardize_dtype(tensor.dtype)).is_narrow


def is_float_tensor(x):
    """Whether `x` is a dense tensor that may have a gradient."""
    return (
        ops.is_tensor(x)
        and keras.backend.is_float_dtype(x.dtype)
        # Sparse and ragged tensors carry data, not gradients.
        and not hasattr(x, "dense_shape")
        and not hasattr(x, "row_splits")
    )


def with_mask_of(original, tensor):
    """`tensor`, with the Keras mask of `original` if it has one."""
    mask = keras_internals.mask_of(original)
    if mask is not None:
        keras_internals.set_mask(tensor, mask)
    return tensor
