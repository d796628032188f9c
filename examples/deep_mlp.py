"""Trains a deep network that plain float16 cannot train.

The network has seventeen layers with small weights, each of which divides the gradient by five in
the backward pass. The gradient of the first layer is 2^37 times smaller than that of the last one,
and the gradients of one layer spread over twenty binades, but float16 has only 40 binades. At
first, no single loss scale fits all layers. The example trains the network on handwritten digits in
four ways, and prints how many weights ever had a non-zero gradient, and the accuracy. Keras's
single loss scale reaches all weights in the end, once gradients have grown. The accuracy differs
more between seeds than between the ways that train at all.
"""

import common
import keras
from digits import load_data
from keras import layers

import tf_adaptive_ls as als

WAYS = ("float32", "float16, no scaling", "float16, Keras's loss scale", "float16, adaptive")


def build_model(depth=17):
    inputs = x = keras.Input((64,))
    for i in range(depth - 1):
        x = layers.Dense(
            64,
            "relu",
            kernel_initializer=keras.initializers.VarianceScaling(2 * 0.2**2),
            bias_initializer=keras.initializers.Constant(0.5),
            name=f"hidden_{i + 1}",
        )(x)
    return keras.Model(inputs, layers.Dense(10, dtype="float32", name="scores")(x))


def train(way, args, x, y):
    """A model trained in one of `WAYS`, and its inner optimizer."""
    keras.utils.set_random_seed(args.seed)
    keras.config.set_dtype_policy("float32" if way == WAYS[0] else "mixed_float16")
    model = build_model()
    # Adam takes steps of the same size for small and large gradients, as long as they are not zero.
    inner = optimizer = keras.optimizers.Adam(1e-3, epsilon=1e-20)
    if way == WAYS[2]:
        optimizer = keras.optimizers.LossScaleOptimizer(inner)
    elif way == WAYS[3]:
        model, optimizer = als.wrap_model(model), als.AdaptiveLossScaleOptimizer(inner)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=True, auto_scale_loss=False)
    print(f"\n{way}:")
    model.fit(x, y, args.batch_size, epochs=args.epochs, verbose=2 if args.tiny else 1)
    return model, inner


def share_reached(optimizer):
    """The share of weights whose mean squared gradient in Adam is not zero."""
    seen = [v.numpy() > 0 for v in optimizer.variables if v.path.endswith("kernel_velocity")]
    return sum(each.sum() for each in seen) / sum(each.size for each in seen)


def main(argv=None):
    args = common.parser(__doc__, 60, 64, "deep_mlp.keras").parse_args(argv)
    common.begin(args)
    x_train, x_test, y_train, y_test = load_data()
    x_train, x_test = (x.reshape(len(x), 64) - 0.3 for x in (x_train, x_test))
    x_train, y_train = common.whole_batches(args, x_train, y_train)

    lines = []
    for way in WAYS:
        model, inner = train(way, args, x_train, y_train)
        _, accuracy = model.evaluate(x_test, y_test, len(x_test), verbose=0)
        lines.append(f"{way:30} {share_reached(inner):12.2%} {accuracy:14.2%}")
    print(f"\n{'':30} {'ever reached':>12} {'test accuracy':>14}")
    print("\n".join(lines), "\n")
    common.say(model, model.optimizer)
    common.save(model, args.output)


if __name__ == "__main__":
    main()
