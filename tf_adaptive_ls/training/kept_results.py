"""Results that the second run of a layer takes from the first run.

Some layers run a second time in the backward pass (see `functional_call`). A layer with a ReLU
would compute its matmul again only for the derivative of the ReLU, which can also be computed from
the ReLU's result. A batch normalization would reduce its whole input again to a few statistics.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import layers, ops

from tf_adaptive_ls.backend import autodiff, functions, keras_internals
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.packing import packed, unpacked
from tf_adaptive_ls.training.ways import computing, has_own_call

_WITH_ACTIVATION = (
    layers.Dense,
    layers.EinsumDense,
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
    layers.SeparableConv1D,
    layers.SeparableConv2D,
)


class KeptResults:
    """The results that one call keeps for its second run.

    Attributes:
        noted: List of the results of the latest first run, each a list of tensors.
    """

    def __init__(self) -> None:
        self.noted: list[Sequence[Tensor]] = []
        self._given: Sequence[Sequence[Tensor]] | None = None
        self._left: Iterator[Sequence[Tensor]] | None = None
        self._trace: Any = None

    @property
    def noted_bits(self) -> list[Tensor]:
        """List of the noted tensors that are in 8 bits."""
        noted = (tensor for tensors in self.noted for tensor in tensors)
        return [x for x in noted if keras.backend.standardize_dtype(x.dtype) == "uint8"]

    def give(self, noted: Sequence[Sequence[Tensor]]) -> None:
        """Makes the next run a second run, which takes the results `noted`."""
        self._given = noted

    @contextlib.contextmanager
    def running(self, layer: keras.layers.Layer) -> Iterator[None]:
        """Context manager around a run of a layer."""
        given, self._given = self._given, None
        self._left = None if given is None else iter(given)
        self._trace = functions.current_trace()
        if given is None:
            self.noted = []
        _route_moments(layer)
        token = _of_call.set(self)
        try:
            with computing(_ways_of_keeping(layer)):
                yield
        finally:
            _of_call.reset(token)

    def result(
        self,
        compute: Callable[[], Sequence[Tensor]],
        given: Callable[[Sequence[Tensor]], Any],
    ) -> Any:
        """Computes and notes a result in the first run, and restores it in the second run.

        Args:
            compute: Function that returns the result and the list of tensors to note.
            given: Function from these tensors to the result, with the right gradient.
        """
        if functions.current_trace() is not self._trace:
            return compute()[0]  # tensors of a loop cannot be used outside of it
        if self._left is not None:
            return given(next(self._left))
        result, noted = compute()
        self.noted.append(noted)
        return result


_of_call: contextvars.ContextVar[KeptResults | None] = contextvars.ContextVar(
    "kept_results", default=None
)


def is_repeatable(activation: Any) -> bool:
    """Whether an activation has the same value and derivative at its result as at its input."""
    return activation is keras.activations.relu


def activation_of(layer: keras.layers.Layer) -> Any:
    """The activation of a layer. In a call that keeps results, it keeps its result."""
    kept = _of_call.get()
    if kept is None or not is_repeatable(layer.activation):
        return layer.activation
    return functools.partial(_activate, kept, layer.activation)


def _ways_of_keeping(layer: keras.layers.Layer) -> list[tuple[keras.layers.Layer, Any]]:
    """Pairs for `computing`: a layer inside of `layer` with an activation, its new `call`."""
    return [
        (part, functools.partial(_call, part))
        for part in keras_internals.parts_of(layer)
        if type(part) in _WITH_ACTIVATION and not has_own_call(part, type(part))
        if is_repeatable(part.activation)
    ]


def _route_moments(layer: keras.layers.Layer) -> None:
    """Routes the moments of all batch normalizations inside of `layer` through `_moments`."""
    for part in keras_internals.parts_of(layer):
        if type(part) is layers.BatchNormalization and not part.synchronized:
            keras_internals.route_moments(part, functools.partial(_moments, part))


class _WithActivation:
    """A layer with another activation, for its `call`."""

    def __init__(self, layer: keras.layers.Layer, activation: Any) -> None:
        self._layer, self.activation = layer, activation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _call(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
    layer_to_call = _WithActivation(layer, activation_of(layer))
    return type(layer).call(layer_to_call, *args, **kwargs)


def _activate(kept: KeptResults, activation: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    def compute() -> Any:
        result = activation(x)
        return result, [packed(result)]

    def given(noted: Sequence[Tensor]) -> Tensor:
        result = unpacked(noted[0], keras.backend.standardize_dtype(x.dtype))

        def function(constants: Sequence[Tensor], x: Tensor) -> Any:
            (value,) = constants
            return value, lambda gradient: [autodiff.pulled_back(activation, value, gradient)]

        return autodiff.custom_gradient(function, [result])(x)

    return kept.result(compute, given)


def _moments(
    layer: keras.layers.Layer,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Mean and variance over all axes but the channels. Masked moments are not kept."""
    kept, (x, mask) = _of_call.get(), args
    if kept is None or mask is not None:
        return original(*args, **kwargs)
    axis = layer.axis % len(x.shape)
    others = [each for each in range(len(x.shape)) if each != axis]

    def compute() -> Any:
        moments = original(*args, **kwargs)
        return moments, list(moments)

    def given(noted: Sequence[Tensor]) -> Any:
        def function(constants: Sequence[Tensor], x: Tensor) -> Any:
            mean, variance = constants

            def backward(of_mean: Tensor, of_variance: Tensor) -> list[Tensor]:
                wide, slope, shift = (
                    ops.expand_dims(each, others) for each in (mean, of_variance, of_mean)
                )
                count = ops.cast(ops.size(x) / ops.shape(x)[axis], x.dtype)
                return [(2 * (x - wide) * slope + shift) / count]

            return (mean, variance), backward

        return autodiff.custom_gradient(function, noted)(x)

    return kept.result(compute, given)
