"""`FullGradients`: computes the gradient of the loss over all data, batch by batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree
from rich.progress import track

from tf_adaptive_ls.backend import trainer
from tf_adaptive_ls.backend.batches import batches_of, check_repeatable, fingerprint
from tf_adaptive_ls.backend.types import Tensor


class FullGradient(NamedTuple):
    """The loss over all data, and its gradient.

    Attributes:
        loss: Float.
        gradients: List with a float32 tensor, or `None`, for each weight that the optimizer was
            built for.
    """

    loss: float
    gradients: list[Tensor | None]

    @property
    def norm(self) -> float:
        """The Euclidean norm of the gradient of all weights."""
        norms = [np.linalg.norm(ops.convert_to_numpy(g)) for g in self.gradients if g is not None]
        return float(np.linalg.norm(norms))


class FullGradients:
    """Computes full gradients with the training step of a model. The model is not changed.

    Args:
        model: A compiled model whose optimizer is a built `BitCentered`.
        train_step: The `train_step` of the model.
        data: As for `Recenter`.
        batch_size: As for `Recenter`.
        verbose: Whether to show progress.
    """

    def __init__(
        self,
        model: keras.Model,
        train_step: Callable[..., Any],
        data: Any,
        batch_size: int,
        verbose: bool,
    ) -> None:
        self._model, self._train_step = model, train_step
        self._data, self._batch_size, self._verbose = data, batch_size, verbose
        self._run = trainer.compiled_as_steps(model, self._on_batch)
        self._fingerprint: tuple[int, int] | None = None

    def at_weights(self) -> FullGradient:
        """The full gradient at the current weights.

        Raises:
            ValueError: If there are no data, or other data than at the first call; if the loss is
                not finite; or if training steps change more than weights.
        """
        metrics = [(v, trainer.lasting_value(v)) for v in self._model.metrics_variables]
        try:
            return self._mean()
        finally:
            for variable, value in metrics:
                variable.assign(value)

    def _mean(self) -> FullGradient:
        loss, count, code = 0.0, 0, 0
        sums: dict[int, Tensor] = {}
        batches = batches_of(self._data, self._batch_size)
        shown = track(batches, "Full gradient", disable=not self._verbose, transient=True)
        for number, batch in enumerate(shown):
            batch = _as_fit_gives_it(batch)
            size = _size(batch)
            self._model.reset_metrics()
            gradients, logs, left = self._run(*trainer.state_arguments(self._model), batch)
            _check_loss(logs, number)
            if not number:
                self._check_that_nothing_else_changed(left)
            for i, gradient in gradients.items():
                sums[i] = sums.get(i, 0.0) + gradient * size
            loss += float(logs.get("loss", np.nan)) * size
            count, code = count + size, code + fingerprint(batch)
        self._check_data(count, code)
        places = range(len(self._model.optimizer.centers))
        return FullGradient(loss / count, [sums[i] / count if i in sums else None for i in places])

    def _on_batch(self, *arguments: Any) -> tuple[dict[int, Tensor], dict[str, Any], list[Tensor]]:
        """Gradients by index of the weight, logs, and non-trainable weights."""
        with self._model.optimizer.noting_gradients() as gradients:
            logs, left = trainer.undone_step(self._model, self._train_step, arguments)
        return gradients, logs, left

    def _check_that_nothing_else_changed(self, left: list[Tensor]) -> None:
        changed = [
            variable.path
            for variable, value in zip(self._model.non_trainable_variables, left, strict=True)
            if not np.array_equal(ops.convert_to_numpy(variable), ops.convert_to_numpy(value))
        ]
        if changed:
            raise ValueError(
                "HALP takes the gradient of one batch twice, and expected a model for which that "
                "is twice the same function. Received: a training step that changes "
                f"{', '.join(changed)}. Set `rate=0` of Dropout and other random layers, or leave "
                "them out. Freeze BatchNormalization (`layer.trainable = False`), or use "
                "LayerNormalization or GroupNormalization."
            )

    def _check_data(self, count: int, code: int) -> None:
        if not count:
            raise ValueError("Recenter expected at least one example in `data`. Received: none.")
        before, self._fingerprint = self._fingerprint, (count, code)
        if before is not None and before != self._fingerprint:
            raise ValueError(
                "Recenter expected `data` to be the same examples at every center. Received: "
                f"{count} examples, which are not the {before[0]} of the center before. Leave out "
                "random augmentation, and what takes a random part of the data."
            )


def check_data(data: Any, batch_size: int) -> None:
    """Raises a `ValueError` if `data` cannot be training data."""
    batches_of(data, batch_size)
    check_repeatable(data)


def _as_fit_gives_it(batch: Any) -> Any:
    """A batch as `fit` passes it: tensors, with floats of the default dtype."""

    def converted(leaf: Any) -> Any:
        if leaf is None or keras.ops.is_tensor(leaf):
            return leaf
        leaf = np.asarray(leaf)
        is_float = np.issubdtype(leaf.dtype, np.floating)
        return ops.convert_to_tensor(leaf, keras.config.floatx() if is_float else None)

    return tree.map_structure(converted, batch)


def _size(batch: Any) -> int:
    sizes = [leaf.shape[0] for leaf in tree.flatten(batch) if leaf is not None]
    return int(sizes[0]) if sizes else 0


def _check_loss(logs: dict[str, Any], number: int) -> None:
    loss = float(logs.get("loss", 0.0))
    if not np.isfinite(loss):
        raise ValueError(
            f"HALP expected a finite loss at the center. Received: {loss} for batch {number} of "
            "`data`. Lower `learning_rate`, or look for what is not finite in the data or in the "
            "weights: `als.explain_nonfinite(model, x, y)`."
        )
