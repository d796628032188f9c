"""Finds the tensors with gradients among the arguments or outputs of a call."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import tree

from tf_adaptive_ls.backend import arrays, keras_internals
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.float_format import is_narrow_dtype
from tf_adaptive_ls.training.scale_plan import AT_S, Route, ScaleGroup


class CallTensors:
    """The inexact tensors that a nested structure is made of: floating-point and complex ones.

    Those of a ragged or a sparse tensor are its components. Keras computes crossentropies from
    the logits behind the result of a softmax or sigmoid: those that it has left on a tensor belong
    to that; where it looks for an operation behind an output, what comes into it stands for that.

    Args:
        structure: The structure.
        are_outputs: Whether losses may be computed from the tensors.

    Attributes:
        tensors: List of the dense ones, in the order of `tree.flatten`.
        places: Which leaf of the structure each belongs to.
        others: List of all else that the structure is made of.
        masks: The Keras mask of each leaf that is or has a tensor, or `None`.
        logits: Dict of the logits that Keras has left on leaves, by place.
    """

    def __init__(self, structure: Any, are_outputs: bool = False) -> None:
        self._structure = structure
        self._originals = tree.flatten(structure)
        self._leaves = []  # of each: which of its parts are inexact, and what makes it of all
        self._replaced: list[Any] = []
        self.tensors: list[Tensor] = []
        self.places: list[int] = []
        self.others: list[Any] = []
        self.masks: list[Any] = []
        self.logits: dict[int, Tensor] = {}
        for place, leaf in enumerate(self._originals):
            logits = keras_internals.logits_of(leaf)
            behind = arrays.behind_activation(leaf) if are_outputs and logits is None else None
            parts, rebuild = behind or arrays.dense_parts(leaf)
            inexact = list(map(is_inexact, parts))
            if not any(inexact):
                parts, inexact, rebuild = [leaf], [False], _only
            for part, yes in zip(parts, inexact, strict=True):
                (self.tensors if yes else self.others).append(part)
            self._leaves.append((inexact, rebuild))
            self.places += [place] * sum(inexact)
            self.masks.append(keras_internals.mask_of(leaf) if any(inexact) else None)
            if logits is not None:
                self.logits[place] = logits

    def replaced(
        self,
        tensors: Sequence[Tensor],
        *,
        others: Any = None,
        masks: Any = None,
        logits: dict[int, Any] | None = None,
    ) -> Any:
        """The structure with other things in place of these.

        Args:
            tensors: List of tensors in place of `self.tensors`.
            others: List as the attribute, which it defaults to.
            masks: List as the attribute, which it defaults to.
            logits: Dict as the attribute, which it defaults to.
        """
        left, others_left = iter(tensors), iter(self.others if others is None else others)
        masks = self.masks if masks is None else masks
        logits = self.logits if logits is None else logits
        leaves = []
        for place, (inexact, rebuild) in enumerate(self._leaves):
            leaf = rebuild([next(left if yes else others_left) for yes in inexact])
            if any(inexact) and masks[place] is not None:
                keras_internals.set_mask(leaf, masks[place])
            if place in logits:
                keras_internals.set_logits(leaf, logits[place])
            leaves.append(leaf)
        self._replaced = leaves
        return tree.pack_sequence_as(self._structure, leaves)

    def return_masks(self) -> None:
        """Gives the tensors the masks that those in their place have now.

        Keras's attention takes away the masks of tensors that it is called on, for good.
        """
        for place in set(self.places):
            original, leaf = self._originals[place], self._replaced[place]
            mask = keras_internals.mask_of(leaf)
            # What had to be cast would be a copy in plain Keras, too.
            if mask is not self.masks[place] and leaf.dtype == original.dtype:
                keras_internals.set_mask(original, mask)


def _only(parts: list[Any]) -> Any:
    (part,) = parts
    return part


class Arguments(CallTensors):
    """The arguments of a call, and the inexact tensors among them.

    Args:
        scaled: The `LossScaled` layer.
        args: A tuple of arguments by position.
        kwargs: A dict of arguments by name.
        route: The `Route` of the layer, or `None`.

    The tensors are cast as the layer would cast them if it computes in a wider format
    than they have: a gradient is then still wide when it is shifted, and rounded
    only after that.

    Attributes:
        narrow: Whether the gradient of each of `tensors` is written in a narrow format.
        groups: The `ScaleGroup` that the gradient of each leaf leaves for, or `AT_S`.
    """

    def __init__(
        self,
        scaled: keras.layers.Layer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        route: Route | None,
    ) -> None:
        self._names = list(kwargs)
        super().__init__((args, *kwargs.values()))
        self.groups: list[ScaleGroup] = []
        for name, value in [(None, args), *kwargs.items()]:
            planned = route and (route.args if name is None else route.kwargs.get(name))
            self.groups += planned or [AT_S] * len(tree.flatten(value))
        self.narrow = [scaled.is_narrow] * len(self.tensors)
        layer = scaled.layer
        if scaled.casts_inputs and not scaled.is_narrow:
            self.narrow = [is_narrow(tensor) for tensor in self.tensors]
            self.tensors = [
                keras.ops.cast(tensor, layer.compute_dtype) if narrow else tensor
                for tensor, narrow in zip(self.tensors, self.narrow, strict=True)
            ]

    def replaced(
        self,
        tensors: Sequence[Tensor],
        *,
        others: Any = None,
        masks: Any = None,
        logits: dict[int, Any] | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` with other tensors in place of these, see `CallTensors`."""
        args, *values = super().replaced(tensors, others=others, masks=masks, logits=logits)
        return args, dict(zip(self._names, values, strict=True))


def is_narrow(tensor: Tensor) -> bool:
    """Whether the gradient of `tensor` is written in a format that a scale matters to."""
    return is_narrow_dtype(keras.backend.standardize_dtype(tensor.dtype))


def is_inexact(x: Tensor) -> bool:
    """Whether `x` is a tensor of floating-point or complex numbers."""
    return keras.ops.is_tensor(x) and arrays.is_inexact_dtype(x.dtype)
