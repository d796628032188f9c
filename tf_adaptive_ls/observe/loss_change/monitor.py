"""`LossChangeMonitor`: divides the change of the loss among layers during training."""

import os
import warnings
from typing import Any

import keras

from tf_adaptive_ls.backend import devices, trainer
from tf_adaptive_ls.backend.arguments import check_whole
from tf_adaptive_ls.backend.batches import batches_of, check_repeatable
from tf_adaptive_ls.observe.checks import check_path, check_ready
from tf_adaptive_ls.observe.loss_change.allocation import (
    LossPath,
    NonfiniteLossError,
    check_settings,
)
from tf_adaptive_ls.observe.named_layers import scaled_layers
from tf_adaptive_ls.observe.record.writers import RunWriter
from tf_adaptive_ls.observe.sinks import Logs, Sinks
from tf_adaptive_ls.observe.tensorboard import TensorBoardWriter
from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer


class LossChangeMonitor(keras.callbacks.Callback):
    """Divides the change of the loss among the layers of a model during training.

    By default, it follows *chords*, straight lines from the weights at one record to those at the
    next. Chords add up to the whole change of the loss since `fit` began. They do not see weights
    that move back and forth: for the true share of weights that help, use `single_steps=True`.

    Training does not change, bit for bit. A record takes three forward and backward passes over
    `data` in float32, or five where the path is curved.

    It adds `loss_change_error`, the error of the last record, to the `logs` of Keras.

    ```python
    model.compile(optimizer, loss=loss_fn)
    monitor = als.LossChangeMonitor([(x, y)], "changes.jsonl", every=1)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[monitor])
    print(als.load_run("changes.jsonl").loss_changes.allocated)
    ```

    Args:
        data: Data for the loss, as for `fit`: arrays `(x, y)` or `(x, y, sample_weight)`, or such
            batches, the same whenever they are iterated over, such as a list or a
            `tf.data.Dataset`. A few batches are enough for large shares; all shares have standard
            errors.
        path: File to append records to, for `load_run`, `plots` and `python -m tf_adaptive_ls`. It
            may be the file of a `LossScaleMonitor` of the same `fit`. Default: no file.
        every: Int >= 1. Number of steps between two records. There is one more record at the end of
            each epoch, where checkpoints are made.
        tensorboard: Directory for TensorBoard: scalars per layer.
        single_steps: Whether to look at every `every`-th step by itself instead of chords.
        as_trained: Whether to also use gradients in the precision of training. What these shares
            lack was lost to underflow. It takes twice the time.
        tolerance: As in `loss_change`.
        max_intervals: As in `loss_change`, but 4 by default, because the last doubling takes half
            of the time of a record. Raise it if `loss_change_error` is not small.
        batch_size: Int. The batch size, if `data` are arrays.

    Raises:
        ValueError: If an argument is not as described. From `fit`, if the model has no loss.
    """

    async_safe = True

    def __init__(
        self,
        data: Any,
        path: str | os.PathLike[str] | None = None,
        *,
        every: int = 100,
        tensorboard: str | os.PathLike[str] | None = None,
        single_steps: bool = False,
        as_trained: bool = False,
        tolerance: float = 1e-3,
        max_intervals: int = 4,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        batches_of(data, batch_size)
        check_repeatable(data)
        check_whole("every", every, " of steps")
        for name, place in (("path", path), ("tensorboard", tensorboard)):
            if place is not None:
                check_path(name, place)
        for name, value in (("single_steps", single_steps), ("as_trained", as_trained)):
            if not isinstance(value, bool):
                raise ValueError(
                    f"Expected `{name}` to be True or False. Received: {name}={value!r}."
                )
        check_settings(tolerance, max_intervals)
        self.data, self.path, self.every, self.tensorboard = data, path, every, tensorboard
        self.single_steps, self.as_trained = single_steps, as_trained
        self.tolerance, self.max_intervals = tolerance, max_intervals
        self.batch_size = batch_size
        self._figures: Logs = {}

    def on_train_begin(self, logs: Logs | None = None) -> None:
        check_ready(self.model)
        self._epoch = 0
        # Checked at the first batch, when other callbacks may have restored the model.
        self._begun = False

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self._epoch = epoch
        self._batches_done = 0

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        if not self._begun:
            self._begin()
        self._batches += batch - self._batches_done
        self._batches_done = batch
        length = 1 if self.single_steps else self.every
        if self._weights is not None and self._batches >= length:
            self._look()
        if self._weights is None and self._batches >= self.every:
            self._set_out()

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        if logs is not None:
            logs.update(self._figures)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if self._begun and self._weights is not None:
            self._look()
        if logs is not None:
            logs.update(self._figures)

    def on_train_end(self, logs: Logs | None = None) -> None:
        if self._begun:
            self._sinks.close()

    def _begin(self) -> None:
        self._path = LossPath(self.model, self.tolerance, self.max_intervals)
        layers, step = scaled_layers(self.model), self._step()
        self._sinks = Sinks("LossChangeMonitor")
        if devices.is_first_process():
            self._sinks.open(RunWriter.shared, self.path, layers, step)
            self._sinks.open(TensorBoardWriter, self.tensorboard, layers, step)
        self._set_out()
        self._begun = True

    def _step(self) -> int:
        optimizer = self.model.optimizer
        adaptive = isinstance(optimizer, AdaptiveLossScaleOptimizer)
        return optimizer.steps if adaptive else int(optimizer.iterations)

    def _set_out(self) -> None:
        """Starts a path at the current weights."""
        trainer.sync_state(self.model)
        self._weights, self._since, self._batches = self.model.get_weights(), self._step(), 0

    def _look(self) -> None:
        """Records the path up to the current weights. With chords, the next path starts here."""
        before, since = self._weights, self._since
        self._set_out()
        step = self._since
        if step > since:
            batches = batches_of(self.data, self.batch_size)
            try:
                found = self._path.allocate(before, self._weights, batches, self.as_trained)
            except NonfiniteLossError as error:
                warnings.warn(
                    f"LossChangeMonitor leaves out steps {since} to {step}: {error}", stacklevel=2
                )
            else:
                allocation, trained = found[0], found[1] if self.as_trained else None
                self._figures = {"loss_change_error": allocation.error}
                self._sinks.add_loss_change(step, since, self._epoch, allocation, trained)
        if self.single_steps:
            self._weights, self._batches = None, 1
