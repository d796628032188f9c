"""`Float8Call`: seeds and reports of the matmuls in one call of a layer."""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from tf_adaptive_ls.backend import arrays
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.gradient_tap import rounding_tap
from tf_adaptive_ls.numerics.report import report_of_rounded
from tf_adaptive_ls.numerics.rounding import NOISE_BITS
from tf_adaptive_ls.training.float8.settings import Float8


@dataclasses.dataclass(frozen=True)
class Float8Call:
    """One call of a layer that computes matmuls from float8 operands.

    Attributes:
        float8: The `Float8`.
        num_products: Number of matmuls and convolutions in the layer.
        receiver: Tensor whose "gradient" is the report on the quantized gradients. `None` if no
            scale depends on it.
        seed: Uint32 tensor `[2]` for stochastic rounding, otherwise `None`.
    """

    float8: Float8
    num_products: int
    receiver: Tensor | None
    seed: Tensor | None = None

    @property
    def receivers(self) -> tuple[Tensor, ...]:
        """Tuple of the receiver, or an empty tuple."""
        return () if self.receiver is None else (self.receiver,)

    def with_receivers(self, receivers: tuple[Tensor, ...]) -> "Float8Call":
        """The same call with other `receivers`."""
        return dataclasses.replace(self, receiver=receivers[0]) if receivers else self

    def tap(self, tensor: Tensor, place: int, cast: bool) -> Tensor:
        """The output of a matmul, whose gradient is quantized and reported.

        Args:
            tensor: The output.
            place: Index of the matmul in the layer.
            cast: As in `numerics.rounding.rounded`.
        """
        operand = self.float8.backward_operand

        def round_gradient(gradient: Tensor) -> Tensor:
            return operand.rounded(gradient, self.noise(ops.shape(gradient), place), cast)

        def report(gradient: Tensor) -> Tensor:
            return report_of_rounded(gradient, operand.float_format, place, self.num_products)

        return rounding_tap(tensor, self.receiver, round_gradient, report)

    def noise(self, shape: Any, place: int, use: int = 0) -> Tensor | None:
        """Random bits to quantize a gradient of one matmul with. `None` for rounding to nearest.

        Each `use` of the same gradient needs other bits.
        """
        if self.seed is None:
            return None
        own = np.array([place + use * self.num_products, 0], "uint32")
        return arrays.random_bits(self.seed + own, shape, NOISE_BITS)


def next_seed(variable: Any) -> Tensor | None:
    """The seed in `variable`, shape `[2]`, which is then advanced. `None` for `None`."""
    if variable is None:
        return None
    seed = ops.copy(variable.value)
    variable.assign(seed + np.array([0, 1], "uint32"))
    return seed
