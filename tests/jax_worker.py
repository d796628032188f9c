"""One process of a run on JAX: trains, and writes what it ended with to a file.

`test_distribution.py` starts it, alone with several devices or as one of several processes.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import traceback

import jax
import keras
import numpy as np
from keras import distribution

import tf_adaptive_ls as als

parser = argparse.ArgumentParser()
parser.add_argument("output", type=pathlib.Path)
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--process", type=int, default=0)
parser.add_argument("--port", type=int, default=0)
parser.add_argument("--model-parallel", action="store_true")
parser.add_argument("--subclass", action="store_true", help="a model without a graph")
parser.add_argument("--saved-activations", action="store_true", help="keep 8 bits of them")
parser.add_argument("--weights", choices=["float16", "bfloat16"], help="rounded stochastically")
parser.add_argument("--plain", action="store_true", help="Keras's own loss scale")
parser.add_argument("--count", action="store_true", help="count collectives, too")
parser.add_argument("--nan-on", type=int, help="a process whose first batch is not finite")
parser.add_argument("--die-at", type=int, help="kill the last process at that batch")
parser.add_argument("--stuck", action="store_true", help="no batch is finite")
args = parser.parse_args()

BATCH, EXAMPLES, EPOCHS = 32, 256, 3


def distribute():
    if args.processes > 1:
        distribution.initialize(f"127.0.0.1:{args.port}", args.processes, args.process)
    if args.model_parallel:
        mesh = distribution.DeviceMesh((2, args.devices // 2), ["batch", "model"])
        layouts = distribution.LayoutMap(mesh)
        layouts["hidden.*/kernel"] = (None, "model")
        distribution.set_distribution(
            distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
        )
    elif args.devices * args.processes > 1:
        parallel = distribution.DataParallel(auto_shard_dataset=args.processes == 1)
        distribution.set_distribution(parallel)


@keras.saving.register_keras_serializable("jax_worker")
class Subclass(keras.Model):
    """Made of the same layers as the other model, called in its own `call`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = layers_of_network()

    def call(self, x):
        for layer in self.parts:
            x = layer(x)
        return x


def layers_of_network():
    hidden = [keras.layers.Dense(16, "relu", name=f"hidden_{i}") for i in range(3)]
    return [*hidden, keras.layers.Dense(1, dtype="float32", name="score")]


def network():
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy(args.weights or "mixed_float16")
    if args.subclass:
        model = Subclass()
        model.build((None, 8))  # as it is in the other model, before anything is compiled
    else:
        model = keras.Sequential([keras.Input((8,)), *layers_of_network()])
    inner = keras.optimizers.SGD(0.05, momentum=0.9)
    if args.plain:
        optimizer = keras.optimizers.LossScaleOptimizer(inner, 2.0**10)
    else:
        saved = "float8_e5m2" if args.saved_activations else None
        model = als.wrap_model(model, saved_activations=saved)
        optimizer = als.AdaptiveLossScaleOptimizer(
            inner, 2.0**10, stochastic_rounding=args.weights is not None
        )
    model.compile(optimizer, loss="mse")
    return model


def data():
    """The part of every batch that this process has."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, 8)).astype("float32")
    y = x[:, :1] * x[:, 1:2]
    x, y = (each.reshape(EXAMPLES // BATCH, args.processes, -1, each.shape[-1]) for each in (x, y))
    x, y = (np.array(each[:, args.process]) for each in (x, y))
    if args.nan_on == args.process:
        x[0] = np.nan
    if args.stuck:
        x[:] = np.nan
    return tuple(each.reshape(-1, each.shape[-1]) for each in (x, y))


class Die(keras.callbacks.Callback):
    batches = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.batches += 1
        if self.batches == args.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def collectives(model, x, y):
    """The collectives of a compiled step, each with the shapes that it sends."""
    layout = distribution.distribution().get_data_layout
    x, y = (jax.device_put(a, layout(a.shape).backend_layout) for a in (x[:BATCH], y[:BATCH]))
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    text = jax.jit(model.train_step).lower(state, (x, y, None)).compile().as_text()
    kinds = "all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter"
    return re.findall(rf"= (.*) (?:{kinds})(?:-start)?\(", text)


def is_equal_on_devices(variable):
    """Whether devices that hold the same part of a variable hold the same numbers."""
    parts = {}
    for shard in variable.value.addressable_shards:
        parts.setdefault(str(shard.index), []).append(np.array(shard.data).astype("float32"))
    return all(np.array_equal(one, copies[0]) for copies in parts.values() for one in copies)


def main():
    distribute()
    model, (x, y) = network(), data()
    own = args.output / str(args.process)
    # A process that outlives another may not finish writing its last one.
    backup = {"delete_checkpoint": False, "double_checkpoint": True}
    callbacks = [keras.callbacks.BackupAndRestore(own / "backup", **backup)]
    if not args.plain:
        callbacks.append(als.LossScaleMonitor(args.output / "run", every=4, stuck_after=5))
    if args.die_at is not None and args.process == args.processes - 1:
        callbacks.append(Die())
    result = {}
    try:
        history = model.fit(
            x, y, BATCH // args.processes, EPOCHS, shuffle=False, verbose=0, callbacks=callbacks
        )
        result["loss"] = history.history.get("loss")
    except als.StuckTrainingError as error:
        result["stuck"] = str(error)
    if not args.plain:
        dense = [each for each in model._flatten_layers() if isinstance(each, keras.layers.Dense)]
        result["log2_scales"] = [each.loss_scaling.log2_scale for each in dense]
        result["loss_scale"] = model.optimizer.loss_scale
        result["skipped_steps"] = model.optimizer.skipped_steps
        result["steps"] = model.optimizer.steps
        result["replicated"] = all(
            v.value.sharding.is_fully_replicated for v in model.variables if "scale" in v.path
        )
        result["equal"] = all(map(is_equal_on_devices, model.variables))
        model.save(own / "model.keras")
        loaded = keras.saving.load_model(own / "model.keras")
        result["saved"] = all(
            np.array_equal(a.value, b.value)
            for a, b in zip(model.variables, loaded.variables, strict=True)
        )
    if args.count:
        result["collectives"] = collectives(model, x, y)
    # NumPy has no bfloat16 in its files.
    kept = [v for v in model.variables if "loss_scale" not in v.path]
    weights = [np.array(v.value).astype("float32") for v in kept]
    state = [np.array(v.value) for v in model.optimizer.variables]
    np.savez(own / "end.npz", *weights, *state)
    (own / "end.json").write_text(json.dumps(result))


try:
    main()
except Exception:
    traceback.print_exc()
    # JAX would wait here for a process that is lost, for five minutes.
    os._exit(1)
