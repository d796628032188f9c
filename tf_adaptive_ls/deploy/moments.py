"""Second moments of the inputs of a kernel, which give output errors."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


class Moments:
    """Sums of products of a kernel's inputs, from which the output error of any weights follows.

    For an error `e` of the weights of a channel, the squared error of the outputs, summed over
    positions, is e^T (X^T X) e, where X is the matrix of all rows. As long as there are fewer rows
    than inputs, the rows themselves are stored.

    Args:
        groups: Number of groups of the kernel.
        inputs: Number of inputs of a channel.
    """

    def __init__(self, groups: int, inputs: int) -> None:
        self._kept: list[Floats] = []
        self._gram: Any = None  # float64, `[groups, inputs, inputs]`
        # the same in float32, for this number of positions
        self._narrow: tuple[int, Floats] | None = None
        self._shape = groups, inputs
        self.positions = 0

    def add(self, rows: Floats) -> None:
        """Adds rows of inputs, a float32 array `[groups, positions, inputs]`."""
        self.positions += rows.shape[1]
        self._kept.append(rows)
        if self._gram is not None or self.positions > self._shape[1]:
            for each in self._kept:
                product = np.matmul(each.transpose(0, 2, 1), each).astype(np.float64)
                self._gram = product if self._gram is None else self._gram + product
            self._kept = []

    @property
    def is_finite(self) -> bool:
        """Whether all added inputs were finite."""
        parts = self._kept if self._gram is None else [self._gram]
        return all(bool(np.isfinite(part).all()) for part in parts)

    def times(self, weights: Floats) -> Floats:
        """Half of the gradient of `squares`, with the shape and dtype of `weights`."""
        if not self.positions:
            return weights
        if self._gram is not None:
            return np.matmul(weights, self._gram_as(weights.dtype))
        products = np.zeros_like(weights)
        for rows in self._kept:
            outputs = np.matmul(weights, rows.transpose(0, 2, 1))
            products += np.matmul(outputs, rows)
        return products

    def _gram_as(self, dtype: Any) -> Floats:
        if dtype == np.float64:
            return self._gram
        if self._narrow is None or self._narrow[0] != self.positions:
            self._narrow = self.positions, self._gram.astype(dtype)
        return self._narrow[1]

    def squares(self, weights: Floats) -> Floats:
        """The squared outputs of weights, summed over positions.

        If no rows were added, inputs are assumed to be independent, with variance 1.

        Args:
            weights: Float array `[groups, channels, inputs]`.

        Returns:
            Float64 array `[groups, channels]`.
        """
        weights = weights.astype(np.float64)
        return np.maximum((self.times(weights) * weights).sum(axis=-1), 0)
