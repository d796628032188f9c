"""`Site`: a kernel to quantize, with statistics of its inputs."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tf_adaptive_ls.deploy.grids import Points
from tf_adaptive_ls.deploy.kernels import Kernel
from tf_adaptive_ls.deploy.moments import Moments


@dataclasses.dataclass(eq=False)
class Site:
    """A kernel to quantize, with statistics of its inputs.

    Attributes:
        layer: The layer of the kernel.
        kernel: The kernel.
        weights: The matrix of the kernel, float32.
        moments: `Moments` of the inputs.
    """

    layer: Any
    kernel: Kernel
    weights: NDArray[np.float32]
    moments: Moments

    @property
    def flat(self) -> NDArray[np.float32]:
        """The weights as an array `[channels of all groups, inputs]`."""
        return self.weights.reshape(-1, self.weights.shape[-1])

    def output_errors(self, points: Points) -> NDArray[np.floating]:
        """The squared output error of each channel, relative to the outputs of the layer."""
        error = points.values.astype(np.float64).reshape(self.weights.shape) - self.weights
        power = self.moments.squares(self.weights).mean()
        return np.asarray(self.moments.squares(error).reshape(-1) / (power or 1.0))
