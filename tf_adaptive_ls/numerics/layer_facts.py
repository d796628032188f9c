"""`LayerFacts`: properties of all scaled layers that do not change between steps."""

from typing import NamedTuple

import numpy as np
from keras import ops

from tf_adaptive_ls.backend.arrays import power_of_two
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.float_format import FloatFormat


class Ownership(NamedTuple):
    """Which weights each of several layers has of its own, NumPy arrays.

    A weight belongs to every innermost layer that has it. Its gradient is written there, at the
    scale of that layer times the scales of all layers around it.

    Attributes:
        places: Places of a layer's weights among all, int32 `[layers, most]`; the number
            of all weights stands for none.
        around: Whether layer j is around layer i, float32 `[i, j]`.
        is_weight: Which of `places` are weights, boolean `[layers, most]`.
    """

    places: np.ndarray
    around: np.ndarray
    is_weight: np.ndarray

    @classmethod
    def of(
        cls, weights_of_layers: list[list[int]], inside: list[list[int]], num_weights: int
    ) -> "Ownership":
        """From lists, by layer, of the places of its weights and of the layers inside it."""
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
        """2**r of each layer and of those around it together, `[layers]`."""
        if self.around.any():
            outer = ops.sum(self.around * log2_scales, axis=1)
            log2_scales = ops.clip(log2_scales + outer, -126.0, 127.0)
        return power_of_two(log2_scales)


class Flow(NamedTuple):
    """How gradients flow between layers; NumPy arrays.

    Attributes:
        call_order: The place of each layer in the forward pass, `[layers]`.
        passes_from: Whether what layer j produces is what arrives at layer i, and passes it
            without being looked at on arrival, boolean `[i, j]`.
        held_to: Whether layer i is to work at no larger scale than layer j, `[i, j]`.
    """

    call_order: np.ndarray
    passes_from: np.ndarray
    held_to: np.ndarray

    @classmethod
    def of_unrelated(cls, num_layers: int) -> "Flow":
        """That of layers called one after the other, each of whose gradients are looked at."""
        unrelated = np.zeros((num_layers, num_layers), bool)
        return cls(np.arange(num_layers), unrelated, unrelated)


class LayerFacts(NamedTuple):
    """What the update has to know of layers, besides their state; in lists and NumPy arrays.

    Attributes:
        float_formats: The `FloatFormat` that each layer computes in.
        rounded_formats: The narrower `FloatFormat` that each rounds gradients to, `None` for none.
        narrow: Whether each computes in a format with less range than float32, `[layers]`.
        answerable: Whether all gradients of its weights have come at its own scale, `[layers]`.
            Otherwise only its report tells whether it made what is not finite.
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
        """The narrowest format that gradients of each layer come in."""
        pairs = zip(self.float_formats, self.rounded_formats, strict=True)
        return [rounded or carrier for carrier, rounded in pairs]
