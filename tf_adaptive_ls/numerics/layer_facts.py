"""`LayerFacts`: properties of all scaled layers that do not change between steps."""

from typing import NamedTuple

import numpy as np
from keras import ops

from tf_adaptive_ls.backend.arrays import power_of_two
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.float_format import FloatFormat


class Ownership(NamedTuple):
    """Which weights belong to each of several layers; NumPy arrays.

    A weight belongs to the innermost layers that contain it. Its gradient is written there, at the
    scale of that layer times the scales of all layers around it.

    Attributes:
        places: Positions of a layer's weights among all weights, int32 `[layers, most]`; padded
            with the number of all weights.
        around: Whether layer j is around layer i, float32 `[i, j]`.
        is_weight: Which of `places` are not padding, boolean `[layers, most]`.
    """

    places: np.ndarray
    around: np.ndarray
    is_weight: np.ndarray

    @classmethod
    def of(
        cls, weights_of_layers: list[list[int]], inside: list[list[int]], num_weights: int
    ) -> "Ownership":
        """From lists, per layer, of the positions of its weights and of the layers inside of it."""
        own = [
            sorted(set(weights).difference(*(weights_of_layers[other] for other in others)))
            for weights, others in zip(weights_of_layers, inside, strict=True)
        ]
        most = max(1, *map(len, own))
        places = np.full((len(own), most), num_weights, "int32")
        around = np.zeros((len(own), len(own)), "float32")
        for layer, (weights, others) in enumerate(zip(own, inside, strict=True)):
            places[layer, : len(weights)] = weights
            around[others, layer] = 1.0
        return cls(places, around, places < num_weights)

    def scales(self, log2_scales: Tensor) -> Tensor:
        """Product of 2**r of each layer and of the layers around it, `[layers]`."""
        if self.around.any():
            outer = ops.sum(self.around * log2_scales, axis=1)
            log2_scales = ops.clip(log2_scales + outer, -126.0, 127.0)
        return power_of_two(log2_scales)


class Flow(NamedTuple):
    """How gradients flow between layers; NumPy arrays.

    Attributes:
        call_order: Position of each layer in the forward pass, `[layers]`.
        passes_from: Whether layer i receives the gradients that layer j produces, and passes them
            on without a report on arrival, boolean `[i, j]`.
        limited_by: Whether the scale of layer i must not exceed that of layer j, `[i, j]`.
    """

    call_order: np.ndarray
    passes_from: np.ndarray
    limited_by: np.ndarray

    @classmethod
    def of_unrelated(cls, num_layers: int) -> "Flow":
        """The flow of layers that are called one after the other, each with reports on arrival."""
        unrelated = np.zeros((num_layers, num_layers), bool)
        return cls(np.arange(num_layers), unrelated, unrelated)


class LayerFacts(NamedTuple):
    """Properties of layers that the update needs, as lists and NumPy arrays.

    Attributes:
        float_formats: The `FloatFormat` that each layer computes in.
        rounded_formats: The narrower `FloatFormat` that each layer rounds gradients to, or `None`.
        narrow: Whether each layer computes in a format with less range than float32, `[layers]`.
        answerable: Whether all weight gradients of a layer have its own scale, `[layers]`. If not,
            only its report shows whether it made gradients non-finite.
        ownership: The `Ownership` of weights.
        flow: The `Flow` of gradients.
    """

    float_formats: list[FloatFormat]
    rounded_formats: list[FloatFormat | None]
    narrow: np.ndarray
    answerable: np.ndarray
    ownership: Ownership
    flow: Flow

    @property
    def any_rounded(self) -> bool:
        """Whether any layer rounds gradients."""
        return any(self.rounded_formats)

    @property
    def narrowest_formats(self) -> list[FloatFormat]:
        """The narrowest format that gradients of each layer have anywhere."""
        pairs = zip(self.float_formats, self.rounded_formats, strict=True)
        return [rounded or carrier for carrier, rounded in pairs]
