"""`TensorBoardWriter`: writes a run for TensorBoard."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.observe.loss_change.allocation import Allocation
from tf_adaptive_ls.observe.record.snapshot import Snapshot
from tf_adaptive_ls.training.layer_scaling import LayerScaling


class TensorBoardWriter:
    """Writes scalars and histograms of each layer.

    A histogram shows the number of gradients in each binade. Its axis is the log2 of their
    magnitude, without any scale.

    Args:
        path: Directory to write event files to.
        layers: Pairs of a name and a `LayerScaling`.
        step: Number of steps before the first record.

    Raises:
        OSError: If files cannot be written, now or later.
    """

    def __init__(
        self, path: str | os.PathLike[str], layers: list[tuple[str, LayerScaling]], step: int
    ) -> None:
        # Imported here, so that other backends need TensorFlow only for TensorBoard.
        import tensorflow as tf

        self.path = path
        self._tf = tf
        self._names = [name for name, _ in layers]
        with self._as_os_errors():
            self._writer = tf.summary.create_file_writer(str(path))
            self._writer.init()

    def add(self, snapshot: Snapshot, epoch: int, logs: dict[str, Any]) -> None:
        """Adds a `Snapshot`. Keras's own callback adds the logs."""
        values = [
            self._scalar("log2_loss_scale", snapshot.log2_loss_scale),
            self._scalar("skipped_steps", snapshot.skipped_steps),
        ]
        for name, layer in zip(self._names, snapshot.layers, strict=True):
            values += [
                self._scalar(f"log2_scale/{name}", snapshot.log2_loss_scale + layer.log2_scale),
                self._scalar(f"overflows/{name}", layer.overflows),
            ]
            if layer.spectrum.nonzero:
                values += [
                    self._scalar(f"underflow/{name}", layer.spectrum.underflow_share),
                    self._scalar(f"subnormal/{name}", layer.spectrum.subnormal_share),
                    self._histogram(f"gradient_binades/{name}", layer),
                ]
            if layer.operands is not None and layer.operands.nonzero:
                values += [
                    self._scalar(f"float8_saturations/{name}", layer.saturations),
                    self._scalar(f"float8_flushed/{name}", layer.flushed_share),
                ]
        self._write(snapshot.step, values)

    def add_loss_change(
        self,
        step: int,
        since: int,
        epoch: int,
        allocation: Allocation,
        as_trained: Allocation | None,
    ) -> None:
        """Adds the share of each layer, see `RunWriter.add_loss_change`."""
        values = [
            self._scalar("loss_change/error", allocation.error),
            self._scalar("loss_change/helping", allocation.helping),
        ]
        kinds = {"loss_change": allocation, "loss_change_as_trained": as_trained}
        for kind, found in kinds.items():
            if found is not None:
                values += [
                    self._scalar(f"{kind}/{name}", value) for name, value in found.layers.items()
                ]
        self._write(step, values)

    def add_forward_rooms(self, step: int, epoch: int, rooms: dict[str, float]) -> None:
        """Adds the room of each part of the forward pass, in binades, by name."""
        values = {name: room for name, room in rooms.items() if math.isfinite(room)}
        self._write(
            step, [self._scalar(f"forward_room/{name}", room) for name, room in values.items()]
        )

    def close(self) -> None:
        with self._as_os_errors():
            self._writer.close()

    def _write(self, step: int, values: list[Any]) -> None:
        summary = self._tf.compat.v1.Summary(value=values).SerializeToString()
        with self._as_os_errors(), self._writer.as_default():
            self._tf.summary.experimental.write_raw_pb(summary, step)
            self._writer.flush()

    @contextlib.contextmanager
    def _as_os_errors(self) -> Iterator[None]:
        try:
            yield
        except self._tf.errors.OpError as error:
            raise OSError(error.message) from error

    def _scalar(self, tag: str, value: float | np.ndarray) -> Any:
        return self._value(tag, "scalars", self._tf.make_tensor_proto(value, "float32"))

    def _histogram(self, tag: str, layer: keras.layers.Layer) -> Any:
        counts = layer.spectrum.counts[1 : spectrum.NONFINITE]
        exponents = layer.spectrum.float_format.exponents
        # The left edge, right edge and count of each bin, as TensorBoard's plugin stores them
        # (tensorboard/plugins/histogram/summary_v2.py).
        bins = [
            (
                binade - layer.log2_sampled_at,
                binade + 1 - layer.log2_sampled_at,
                count,
            )
            for binade, count in zip(exponents, counts, strict=True)
        ]
        return self._value(tag, "histograms", self._tf.make_tensor_proto(bins, "float64"))

    def _value(self, tag: str, plugin: str, tensor: Tensor) -> Any:
        summary = self._tf.compat.v1.SummaryMetadata
        metadata = summary(plugin_data=summary.PluginData(plugin_name=plugin))
        return self._tf.compat.v1.Summary.Value(tag=tag, tensor=tensor, metadata=metadata)
