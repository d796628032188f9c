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
    """One call of a layer whose products compute in float8.

    Attributes:
        float8: The `Float8`.
        num_products: How many products the layer has.
        receiver: Tensor whose "gradient" is the report of what is rounded; `None` if there is
            nothing to choose a scale for.
        seed: Uint32 tensor `[2]`, if they are rounded at random.
    """

    float8: Float8
    num_products: int
    receiver: Tensor | None
    seed: Tensor | None = None

    @property
    def receivers(self) -> tuple[Tensor, ...]:
        """The receiver, if there is one."""
        return () if self.receiver is None else (self.receiver,)

    def with_receivers(self, receivers: tuple[Tensor, ...]) -> "Float8Call":
        """The same call, with others in the place of `receivers`."""
        return dataclasses.replace(self, receiver=receivers[0]) if receivers else self

    def tap(self, tensor: Tensor, place: int, cast: bool) -> Tensor:
        """`tensor`, the output of a product, whose gradient is rounded and reported.

        Args:
            tensor: The output.
            place: Which of the products of the layer it is of.
            cast: As that of `numerics.rounding.rounded`.
        """
        operand = self.float8.backward_operand

        def round_gradient(gradient: Tensor) -> Tensor:
            return operand.rounded(gradient, self.noise(ops.shape(gradient), place), cast)

        def report(gradient: Tensor) -> Tensor:
            return report_of_rounded(gradient, operand.float_format, place, self.num_products)

        return rounding_tap(tensor, self.receiver, round_gradient, report)

    def noise(self, shape: Any, place: int, use: int = 0) -> Tensor | None:
        """What the gradient of the product at a place is rounded by, `None` if to nearest.

        It is another each time that it is rounded: its `use` then counts these.
        """
        if self.seed is None:
            return None
        own = np.array([place + use * self.num_products, 0], "uint32")
        return arrays.random_bits(self.seed + own, shape, NOISE_BITS)


def next_seed(variable: Any) -> Tensor | None:
    """The seed in a variable `[2]`, which is another from then on; `None` for `None`."""
    if variable is None:
        return None
    seed = ops.copy(variable.value)
    variable.assign(seed + np.array([0, 1], "uint32"))
    return seed
