"""`BitCentered`: an optimizer that stores weights as low-bit offsets from a center."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls.backend import arrays, functions
from tf_adaptive_ls.backend.arguments import is_number, is_whole
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.rounding import NOISE_BITS_OF_16, rounded_to_integers

MOST_BITS = 16

# The value of the step counter before there is a center.
_NO_CENTER = -1


@keras.saving.register_keras_serializable("tf_adaptive_ls")
class BitCentered(keras.optimizers.Optimizer):
    """HALP: SVRG with weights that are a center in float32 plus an offset of few bits.

    Gradients of batches have noise, and low-precision numbers round updates: plain SGD in few
    bits stops at a distance from the optimum. HALP removes both. From time to time, the
    `Recenter` callback takes the gradient `g` of the loss over all data, at the current weights,
    and makes these weights the center `w`:

        s = norm(g) / (mu * (2**(bits - 1) - 1))       for each weight tensor
        z = 0

    Each step takes the gradient of its batch twice, at `w + s * z` and at the center:

        d = gradient(w + s * z) - gradient(w) + g
        v = momentum * v + d
        z = round((s * z - learning_rate * v) / s)     to integers of `bits` bits

    Rounding is stochastic: its mean is exact. What is outside of the integers' range saturates.
    As the gradient shrinks, so does `s`. On a strongly convex loss, weights converge linearly to
    the optimum, in 8 bits as in float32.

    The optimizer works only in `fit`, together with `Recenter`:

    ```python
    model = als.plain_copy(model, dtype="float32")
    model.compile(als.BitCentered(0.1, mu=0.5), loss=loss_fn, auto_scale_loss=False)
    model.fit(x, y, epochs=4, callbacks=[als.Recenter((x, y), every=2)], verbose=0)
    ```

    Gradients and weights are float32: differences of gradients would cancel in 16 bits. Memory
    is not saved, as the gradient `g` and the center are kept in float32, too.

    Args:
        learning_rate: Float, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            that takes no arguments.
        bits: Int in 2 … 16, of an offset. It is stored as int8 up to 8 bits, else as int16.
            `None` keeps offsets in float32: that is SVRG (Johnson and Zhang 2013).
        mu: Float > 0. The constant of strong convexity of the loss, such as twice the factor of
            an L2 penalty, or a number that is found by trial. The offset of a weight tensor is at
            most `norm(g) / mu`: with a larger `mu`, offsets are finer, but more of them saturate.
        momentum: Float in [0, 1). As in `keras.optimizers.SGD`, without Nesterov.
        seed: Int or `None`, for stochastic rounding.
        name: String.

    Raises:
        ValueError: If an argument is not as said; from `fit`, if there is no `Recenter` among
            the callbacks, or if weights are not float32 or have constraints.

    References:
        De Sa, Leszczynski, Zhang, Marzoev, Aberger, Olukotun, Ré, "High-Accuracy Low-Precision
        Training", 2018 (arXiv 1803.03383). Johnson, Zhang, "Accelerating Stochastic Gradient
        Descent using Predictive Variance Reduction", NeurIPS 2013.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        bits: int | None = 8,
        mu: float = 0.1,
        momentum: float = 0.0,
        seed: int | None = None,
        name: str = "bit_centered",
    ) -> None:
        _check_arguments(bits, mu, momentum, seed)
        super().__init__(learning_rate=learning_rate, name=name)
        self.bits, self.mu, self.momentum, self.seed = bits, mu, momentum, seed
        # The gradients of a batch at the center, by index of the weight: those being stored, and
        # those to subtract. The dicts bypass Keras's attribute tracking.
        object.__setattr__(self, "_noted", None)
        object.__setattr__(self, "_at_center", None)

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        weights = [v for v in variables if not self._overwrite_variable_with_gradient(v)]
        _check_weights(weights)
        super().build(variables)
        with functions.outside_of_traces():
            seed = keras.random.SeedGenerator(self.seed).state
            seed = ops.convert_to_numpy(seed).astype("uint32")
        self.rounding_seed = self._added("rounding_seed", seed)
        self._steps = self._added("steps_since_center", np.array(_NO_CENTER, "int32"))
        self.centers = self.add_optimizer_variables(variables, "center")
        self.full_gradients = self.add_optimizer_variables(variables, "full_gradient")
        self.momentums = (
            self.add_optimizer_variables(variables, "momentum") if self.momentum else None
        )
        self.offsets: list[Any] = []
        self.offset_scales: list[Any] = []
        for variable, center in zip(variables, self.centers, strict=True):
            offset = scale = None
            if center is not None:
                name = variable.path.replace("/", "_")
                shape, dtype = tuple(variable.shape), self._offset_dtype
                offset = self.add_variable(shape, dtype=dtype, name=f"{name}_offset")
                scale = self.add_variable((), dtype="float32", name=f"{name}_offset_scale")
            self.offsets.append(offset)
            self.offset_scales.append(scale)

    @property
    def steps_since_center(self) -> int | None:
        """The number of steps since the last center. `None` before the first center."""
        steps = int(self._steps) if self.built else _NO_CENTER
        return None if steps == _NO_CENTER else steps

    def recenter(self, full_gradients: Sequence[Any]) -> None:
        """Makes the current weights the center, and sets all offsets to zero.

        Args:
            full_gradients: List with the gradient of the loss over all data for each trainable
                weight, in order: float32 tensors, or `None` for a weight without a gradient.

        Raises:
            ValueError: If a gradient is not finite.
        """
        weights = [
            (i, v, gradient)
            for i, (v, gradient) in enumerate(
                zip(self._trainable_variables, full_gradients, strict=True)
            )
            if self.centers[i] is not None
        ]
        for _, variable, gradient in weights:
            if gradient is not None and not np.isfinite(ops.convert_to_numpy(gradient)).all():
                raise ValueError(
                    "BitCentered expected a full gradient that is finite. Received: one with NaN "
                    f"or infinity for weight '{variable.path}'. The last epochs diverged: load "
                    "earlier weights, and lower `learning_rate`."
                )
        for i, variable, gradient in weights:
            gradient = ops.zeros(variable.shape) if gradient is None else gradient
            # On JAX, `fit` donates the memory of all variables, so no two may share it.
            self.centers[i].assign(ops.copy(ops.convert_to_tensor(variable)))
            self.full_gradients[i].assign(gradient)
            self.offsets[i].assign(ops.zeros(variable.shape, self._offset_dtype))
            self.offset_scales[i].assign(self._offset_scale(gradient))
        self._steps.assign(np.int32(0))

    def is_at_offsets(self) -> bool:
        """Whether weights equal center plus offset. False if other weights were loaded."""
        for i, variable in enumerate(self._trainable_variables):
            if self.centers[i] is not None:
                expected = ops.convert_to_numpy(self._weight(i, self._offset(i)))
                # Compilers may fuse a multiplication and an addition, with one rounding.
                if not np.allclose(ops.convert_to_numpy(variable.value), expected, 1e-6, 1e-30):
                    return False
        return True

    @contextlib.contextmanager
    def noting_gradients(self) -> Iterator[dict[int, Tensor]]:
        """Context manager in which `apply` does not update, but stores gradients in the given dict.

        The keys are the indices of weights in the list that the optimizer was built for.
        """
        noted: dict[int, Tensor] = {}
        object.__setattr__(self, "_noted", noted)
        try:
            yield noted
        finally:
            object.__setattr__(self, "_noted", None)

    @contextlib.contextmanager
    def given_gradients_at_center(self, gradients: dict[int, Tensor]) -> Iterator[None]:
        """Context manager in which `apply` takes steps.

        Args:
            gradients: Gradients of the same batch at the center, as from `noting_gradients`.
        """
        object.__setattr__(self, "_at_center", gradients)
        try:
            yield
        finally:
            object.__setattr__(self, "_at_center", None)

    def apply(
        self,
        grads: Sequence[Tensor | None],
        trainable_variables: Sequence[keras.Variable] | None = None,
    ) -> None:
        """Takes a step. The gradients at the center must be known.

        Args:
            grads: Gradients of one batch.
            trainable_variables: Their weights. Defaults to those that the optimizer was built for.
        """
        if self._noted is not None:
            variables = self._trainable_variables
            if trainable_variables is not None:
                variables = list(trainable_variables)
            for gradient, variable in zip(grads, variables, strict=True):
                i = self._get_variable_index(variable)
                if gradient is not None and self.centers[i] is not None:
                    self._noted[i] = arrays.dense(gradient)
            return
        if self._at_center is None:
            raise ValueError(
                "BitCentered expected the gradient at the center. Received: a step without it. "
                "Train with `fit`, and give it `callbacks=[als.Recenter(data, every=steps)]`."
            )
        super().apply(grads, trainable_variables)
        self._steps.assign_add(1)

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        i = self._get_variable_index(variable)
        direction = arrays.dense(gradient) - self._at_center[i] + self.full_gradients[i]
        if self.momentums is not None:
            direction = self.momentum * self.momentums[i] + direction
            self.momentums[i].assign(direction)
        moved = self._distance(i, self._offset(i)) - learning_rate * direction
        offset = moved if self.bits is None else self._rounded(i, moved)
        self.offsets[i].assign(ops.cast(offset, self._offset_dtype))
        weight = self._weight(i, ops.cast(offset, "float32"))
        # An integer cannot be NaN, so a NaN is shown by the weight.
        self.assign(variable, ops.where(ops.isnan(moved), moved, weight))

    @property
    def _offset_dtype(self) -> str:
        if self.bits is None:
            return "float32"
        return "int8" if self.bits <= 8 else "int16"

    def _offset(self, i: int) -> Tensor:
        return ops.cast(self.offsets[i], "float32")

    def _distance(self, i: int, offset: Tensor) -> Tensor:
        """The distance of an offset from the center, `s * z`."""
        return offset if self.bits is None else offset * self.offset_scales[i]

    def _weight(self, i: int, offset: Tensor) -> Tensor:
        return self.centers[i] + self._distance(i, offset)

    def _offset_scale(self, gradient: Tensor) -> Tensor:
        """The distance `s` between neighboring offsets. Zero at the optimum."""
        if self.bits is None:
            return ops.ones(())
        # Squares of float32 numbers can overflow or underflow although the root does not.
        largest = ops.max(ops.abs(gradient)) if 0 not in gradient.shape else ops.zeros(())
        unit = ops.where(largest > 0, largest, ops.ones_like(largest))
        norm = largest * ops.sqrt(ops.sum(ops.square(gradient / unit)))
        return norm / (self.mu * (2 ** (self.bits - 1) - 1))

    def _rounded(self, i: int, moved: Tensor) -> Tensor:
        """The integers `z` for given distances, rounded stochastically."""
        assert self.bits is not None
        scale = ops.convert_to_tensor(self.offset_scales[i])
        usable = scale >= np.finfo(np.float32).tiny
        first, second = ops.unstack(ops.convert_to_tensor(self.rounding_seed))
        step = ops.cast(self.iterations, "uint32")
        seed = ops.stack([first + step, second + np.uint32(i)])
        noise = arrays.random_bits(seed, ops.shape(moved), NOISE_BITS_OF_16)
        integers = rounded_to_integers(
            moved / ops.where(usable, scale, ops.ones_like(scale)), self.bits, noise
        )
        return ops.where(usable, integers, ops.zeros_like(integers))

    def _added(self, name: str, value: np.ndarray) -> keras.Variable:
        variable = self.add_variable(value.shape, dtype=str(value.dtype), name=name)
        variable.assign(value)
        return variable

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "learning_rate": super().get_config()["learning_rate"],
            "bits": self.bits,
            "mu": self.mu,
            "momentum": self.momentum,
            "seed": self.seed,
        }


def _check_arguments(bits: Any, mu: Any, momentum: Any, seed: Any) -> None:
    if bits is not None and not (is_whole(bits, 2) and bits <= MOST_BITS):
        raise ValueError(
            f"Expected `bits` to be a whole number in 2 … {MOST_BITS}, or None for float32. "
            f"Received: bits={bits!r}."
        )
    if not is_number(mu) or not 0 < mu < np.inf:
        raise ValueError(
            "Expected `mu` to be a finite number above 0: the constant of strong convexity of "
            f"the loss. Received: mu={mu!r}. Start with 0.1, or with twice the factor of an L2 "
            "penalty."
        )
    if not is_number(momentum) or not 0 <= momentum < 1:
        raise ValueError(
            f"Expected `momentum` to be a number in [0, 1). Received: momentum={momentum!r}."
        )
    if seed is not None and not is_whole(seed):
        raise ValueError(f"Expected `seed` to be a whole number or None. Received: seed={seed!r}.")


def _check_weights(weights: list[keras.Variable]) -> None:
    others = [f"{v.path} of {v.dtype}" for v in weights if str(v.dtype) != "float32"]
    if others:
        raise ValueError(
            "BitCentered expected float32 weights, since differences of gradients cancel in 16 "
            f"bits. Received: {', '.join(others)}. Train `als.plain_copy(model)`."
        )
    bound = [v.path for v in weights if v.constraint is not None]
    if bound:
        raise ValueError(
            "BitCentered expected weights without constraints, which would take them away from "
            f"the center and offset that they are kept as. Received: {', '.join(bound)}. Use a "
            "penalty instead: `kernel_regularizer`."
        )
