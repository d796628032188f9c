"""Second moments of the inputs of a kernel, from which output errors follow."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


class Moments:
    """Sums up products of a kernel's inputs, so that the error of any weights can be told.

    The squared error of a channel's outputs, over all positions, for an error `e` of its weights is
    e^T (X^T X) e, with X the rows of inputs. While there are fewer rows than inputs, they are kept
    as they are.

    Args:
        groups: Of the kernel.
        inputs: Of a channel of the kernel.
    """

    def __init__(self, groups: int, inputs: int) -> None:
        self._kept: list[Floats] = []
        self._gram: Any = None  # float64, of shape (groups, inputs, inputs)
        self._narrow: tuple[int, Floats] | None = None  # the same in float32, of so many positions
        self._shape = groups, inputs
        self.positions = 0

    def add(self, rows: Floats) -> None:
        """Adds rows of inputs, float32 of shape (groups, positions, inputs)."""
        self.positions += rows.shape[1]
        self._kept.append(rows)
        if self._gram is not None or self.positions > self._shape[1]:
            for each in self._kept:
                product = np.matmul(each.transpose(0, 2, 1), each).astype(np.float64)
                self._gram = product if self._gram is None else self._gram + product
            self._kept = []

    @property
    def is_finite(self) -> bool:
        """Whether all inputs are."""
        parts = self._kept if self._gram is None else [self._gram]
        return all(bool(np.isfinite(part).all()) for part in parts)

    def times(self, weights: Floats) -> Floats:
        """Half the gradient of `squares`: of the shape and dtype of weights."""
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
        """Sums over positions of the squared outputs of weights.

        Without any rows, as for inputs that are independent and of variance 1.

        Args:
            weights: Shape (groups, channels, inputs).

        Returns:
            Float64 of shape (groups, channels).
        """
        weights = weights.astype(np.float64)
        return np.maximum((self.times(weights) * weights).sum(axis=-1), 0)
