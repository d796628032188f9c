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
    """The floating-point and complex tensors in a nested structure.

    A ragged or sparse tensor counts as its dense components. Keras computes crossentropies from the
    logits that led to a softmax or sigmoid. Logits that Keras has stored on a tensor are found
    here, too. Where Keras instead looks for the operation that made an output, the input of that
    operation stands for the output.

    Args:
        structure: The nested structure.
        are_outputs: Whether losses may be computed from the tensors.

    Attributes:
        tensors: List of these dense tensors, in the order of `tree.flatten`.
        places: For each of them, the index of the leaf that it belongs to.
        others: List of everything else in the structure.
        masks: The Keras mask of each leaf that contains one of the tensors, otherwise `None`.
        logits: Dict from the index of a leaf to the logits that Keras has stored on it.
    """

    def __init__(self, structure: Any, are_outputs: bool = False) -> None:
        self._structure = structure
        self._originals = tree.flatten(structure)
        # for each leaf: which of its parts are inexact, and a function that rebuilds it
        self._leaves = []
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
        """The same structure with other contents.

        Args:
            tensors: List of tensors to use instead of `self.tensors`.
            others: List to use instead of `self.others`, its default.
            masks: List to use instead of `self.masks`, its default.
            logits: Dict to use instead of `self.logits`, its default.
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
        """Gives the original tensors the masks that their replacements have now.

        Keras's attention permanently removes the masks of the tensors that it is called on.
        """
        for place in set(self.places):
            original, leaf = self._originals[place], self._replaced[place]
            mask = keras_internals.mask_of(leaf)
            # A tensor that was cast is a copy in plain Keras, too, and the original keeps its mask.
            if mask is not self.masks[place] and leaf.dtype == original.dtype:
                keras_internals.set_mask(original, mask)


def _only(parts: list[Any]) -> Any:
    (part,) = parts
    return part


class Arguments(CallTensors):
    """The arguments of a call, and the floating-point and complex tensors among them.

    If the layer computes in a wider format than its inputs have, the tensors are cast as the layer
    would cast them. The gradient is then scaled in the wide format and rounded afterwards.

    Args:
        scaled: The `LayerScaling` of the layer.
        args: Tuple of positional arguments.
        kwargs: Dict of keyword arguments.
        route: The `Route` of the layer, or `None`.

    Attributes:
        narrow: For each of `tensors`, whether its gradient is written in a narrow format.
        groups: For each leaf, the `ScaleGroup` that its gradient leaves to, or `AT_S`.
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
        """`(args, kwargs)` with other contents, see `CallTensors.replaced`."""
        args, *values = super().replaced(tensors, others=others, masks=masks, logits=logits)
        return args, dict(zip(self._names, values, strict=True))


def is_narrow(tensor: Tensor) -> bool:
    """Whether the gradient of `tensor` is written in a format that needs a loss scale."""
    return is_narrow_dtype(keras.backend.standardize_dtype(tensor.dtype))


def is_inexact(x: Tensor) -> bool:
    """Whether `x` is a floating-point or complex tensor."""
    return keras.ops.is_tensor(x) and arrays.is_inexact_dtype(x.dtype)
