"""`Recenter`: moves the center of a `BitCentered` optimizer while a model trains."""

from collections.abc import Callable
from typing import Any

import keras

from tf_adaptive_ls.backend import keras_internals, trainer
from tf_adaptive_ls.backend.arguments import check_whole
from tf_adaptive_ls.backend.routes import Route, route_of
from tf_adaptive_ls.halp.bit_centered import BitCentered
from tf_adaptive_ls.halp.full_gradient import FullGradients, check_data

Logs = dict[str, Any]


class Recenter(keras.callbacks.Callback):
    """Makes the weights the center of a `BitCentered` optimizer, every so many steps.

    At the first step of `fit`, and whenever `every` steps have been taken since, it takes the
    gradient of the loss over all data. That costs as much as one epoch. A training step costs
    twice what it does with SGD: its gradient is taken at the center, too. For that, `fit` runs
    the `train_step` of the model twice, also if it is your own.

    A model that was saved during `fit`, between two centers, continues bit for bit in another
    `fit`, with this callback. If its weights were replaced, it starts from a new center.

    To the `logs` of every epoch it adds those of the last center: `center_loss`, and
    `full_gradient_norm`, the Euclidean norm of the gradient of all weights.

    ```python
    model = als.plain_copy(model, dtype="float32")
    model.compile(als.BitCentered(0.1, mu=0.5), loss=loss_fn, auto_scale_loss=False)
    history = model.fit(x, y, epochs=4, callbacks=[als.Recenter((x, y), every=2)], verbose=0)
    history.history["full_gradient_norm"]
    ```

    Args:
        data: All examples that `fit` trains on: arrays `(x, y)` or `(x, y, sample_weight)`, or an
            iterable of such batches, such as a `tf.data.Dataset`. They must be the same whenever
            they are iterated over, in any order: no random augmentation.
        every: Int >= 1. Steps of training from one center to the next; one epoch or two is usual.
        batch_size: Int. Of arrays, how many examples at a time.
        verbose: Whether to show progress on the way through `data`.

    Raises:
        ValueError: If an argument is not as said. From `fit`, before any weight changes: if the
            optimizer is no `BitCentered`; if the model computes in less than float32; if a
            training step changes more than weights, as Dropout and BatchNormalization do; if
            `data` have changed since the last center; if the loss is not finite there.
    """

    def __init__(
        self, data: Any, *, every: int, batch_size: int = 128, verbose: bool = True
    ) -> None:
        super().__init__()
        check_data(data, batch_size)
        check_whole("every", every, " of steps")
        if not isinstance(verbose, bool):
            raise ValueError(
                f"Expected `verbose` to be True or False. Received: verbose={verbose!r}."
            )
        self.data, self.every, self.batch_size, self.verbose = data, every, batch_size, verbose
        self._figures: Logs = {}

    def on_train_begin(self, logs: Logs | None = None) -> None:
        _check_model(self.model, self.every)
        optimizer = self.model.optimizer
        optimizer.build(self.model.trainable_variables)
        _check_weights(self.model)
        _end_route(self.model)  # left by a `fit` that ended with an error
        route = _StepFromCenter(self.model)
        self._full_gradients = FullGradients(
            self.model, route.original, self.data, self.batch_size, self.verbose
        )
        self.model.make_train_function(force=True)
        # Checked at the first batch, when other callbacks may have restored the model.
        self._begun = False

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        if not self._begun:
            trainer.sync_state(self.model)
            steps = self.model.optimizer.steps_since_center
            goes_on = steps is not None and self.model.optimizer.is_at_offsets()
            self._steps = steps if goes_on else self.every
            self._begun = True
        if self._steps >= self.every:
            self._recenter()
        self._first = batch

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        self._steps += batch + 1 - self._first

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if logs is not None:
            logs.update(self._figures)

    def on_train_end(self, logs: Logs | None = None) -> None:
        _end_route(self.model)

    def _recenter(self) -> None:
        trainer.sync_state(self.model)
        found = self._full_gradients.at_weights()
        self.model.optimizer.recenter(found.gradients)
        self._figures = {"center_loss": found.loss, "full_gradient_norm": found.norm}
        self._steps = 0


class _StepFromCenter(Route):
    """Runs each training step twice on its batch: at the center, and at the weights.

    It refers to the model itself, because reading `model` of a callback ends a step of `fit` on
    JAX.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__(model, "train_step", self._both)
        self._model = model

    def _both(self, train_step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        model, optimizer = self._model, self._model.optimizer
        arguments = (*args, *kwargs.values())
        if not isinstance(optimizer, BitCentered):  # after an error, or another `compile`
            return train_step(*arguments)
        values = [
            None if center is None else trainer.value_of_optimizer(model, center, arguments)
            for center in optimizer.centers
        ]
        with optimizer.noting_gradients() as at_center:
            trainer.undone_step(model, train_step, arguments, values)
        with optimizer.given_gradients_at_center(at_center):
            return train_step(*arguments)


def _end_route(model: keras.Model) -> None:
    route = route_of(model, "train_step")
    if isinstance(route, _StepFromCenter):
        route.end()
        model.train_function = None


def _check_weights(model: keras.Model) -> None:
    built_for = keras_internals.variables_built_for(model.optimizer)
    if list(map(id, built_for)) != list(map(id, model.trainable_variables)):
        raise ValueError(
            "Recenter expected an optimizer that was built for the trainable weights of model "
            f"'{model.name}'. Received: one for other weights. Compile the model after freezing "
            "or unfreezing layers, with a new BitCentered."
        )


def _check_model(model: keras.Model, every: int) -> None:
    optimizer = model.optimizer
    if not isinstance(optimizer, BitCentered):
        inner = getattr(optimizer, "inner_optimizer", None)
        advice = (
            "HALP computes in float32, which needs no loss scale: train `als.plain_copy(model)`, "
            "or compile with `auto_scale_loss=False`."
            if isinstance(inner, BitCentered)
            else "Compile with `als.BitCentered(learning_rate)`."
        )
        raise ValueError(
            "Recenter expected a model whose optimizer is a BitCentered. Received: model "
            f"'{model.name}' with {type(optimizer).__name__}. {advice}"
        )
    narrow = [
        layer
        for layer in keras_internals.parts_of(model)
        if layer.compute_dtype in ("float16", "bfloat16")
    ]
    if narrow:
        raise ValueError(
            "Recenter expected a model that computes in float32, since differences of gradients "
            f"cancel in 16 bits. Received: layer '{narrow[0].name}', which computes in "
            f"{narrow[0].compute_dtype}. Train `als.plain_copy(model)`."
        )
    if trainer.num_replicas_of(model) > 1:
        raise ValueError(
            "Recenter expected a model on one replica of `tf.distribute`. Received: "
            f"{trainer.num_replicas_of(model)}. Use the JAX backend for several devices."
        )
    at_once = model.steps_per_execution
    if every % at_once:
        raise ValueError(
            f"Recenter expected `every` to be a multiple of `steps_per_execution`, {at_once}. "
            f"Received: every={every!r}."
        )
