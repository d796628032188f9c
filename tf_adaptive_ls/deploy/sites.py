"""A kernel to quantize, with statistics of the inputs of its layer."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tf_adaptive_ls.deploy.grids import Points
from tf_adaptive_ls.deploy.kernels import Kernel
from tf_adaptive_ls.deploy.moments import Moments


@dataclasses.dataclass(eq=False)
class Site:
    """A kernel that is quantized, and what it is multiplied with.

    Attributes:
        layer: Whose kernel it is.
        kernel: The kernel.
        weights: Its matrix, float32.
        moments: Of its inputs.
    """

    layer: Any
    kernel: Kernel
    weights: NDArray[np.float32]
    moments: Moments

    @property
    def flat(self) -> NDArray[np.float32]:
        """The weights, of shape (channels of all groups, inputs)."""
        return self.weights.reshape(-1, self.weights.shape[-1])

    def output_errors(self, points: Points) -> NDArray[np.floating]:
        """Squared errors of the channels' outputs, as shares of those of the layer's outputs."""
        error = points.values.astype(np.float64).reshape(self.weights.shape) - self.weights
        power = self.moments.squares(self.weights).mean()
        return np.asarray(self.moments.squares(error).reshape(-1) / (power or 1.0))
