"""One of several processes of a run on TensorFlow: trains in a loop of its own.

`test_strategies.py` starts it. Plain Keras cannot `fit` with this strategy.
"""

import argparse
import json
import os
import pathlib

parser = argparse.ArgumentParser()
parser.add_argument("output", type=pathlib.Path)
parser.add_argument("--process", type=int)
parser.add_argument("--ports", nargs="+")
args = parser.parse_args()

os.environ["TF_CONFIG"] = json.dumps(
    {
        "cluster": {"worker": [f"127.0.0.1:{port}" for port in args.ports]},
        "task": {"type": "worker", "index": args.process},
    }
)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before anything else

import tf_adaptive_ls as als  # noqa: E402

keras.config.set_dtype_policy("mixed_float16")
keras.utils.set_random_seed(1)
with strategy.scope():
    x = inputs = keras.Input((8,))
    for _ in range(3):
        x = keras.layers.Dense(16, "relu")(x)
    model = als.wrap_model(keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(x)))
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(0.05), 2.0**10)
    optimizer.build(model.trainable_variables)
loss_fn = keras.losses.MeanSquaredError()


@tf.function
def step(batch):
    def on_replica(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(loss_fn(y, model(x, training=True)))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)

    strategy.run(on_replica, args=(batch,))


rng = np.random.default_rng(0)
x = rng.normal(size=(64, 8)).astype("float32")
options = tf.data.Options()
options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
batches = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(16).with_options(options)
for _ in range(3):
    for batch in strategy.experimental_distribute_dataset(batches):
        step(batch)
x[5] = np.nan  # one of the examples of one process
batches = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(16).with_options(options)
step(next(iter(strategy.experimental_distribute_dataset(batches))))

layers = [layer.loss_scaling for layer in model.layers if layer.weights]
result = {
    "loss_scale": optimizer.loss_scale,
    "log2_scales": [layer.log2_scale for layer in layers],
    "overflows": [layer.overflows for layer in layers],
    "steps": [optimizer.steps, optimizer.skipped_steps],
    "weights": [v.numpy().tolist() for v in model.trainable_variables],
}
(args.output / f"{args.process}.json").write_text(json.dumps(result))
