"""Trains the network of digits.py in a custom training loop, on TensorFlow or on JAX.

There are two differences from a loop with plain Keras: the loss is scaled before it is
differentiated, and the optimizer gets all of `model.trainable_variables`, which include the
variables of the scales. The optimizer unscales gradients, skips steps with non-finite gradients,
and adapts the scales. Prints the loss of each epoch, the test accuracy, and the scales of all
layers.
"""

import common
import keras
import numpy as np
from digits import build_model, load_data

import tf_adaptive_ls as als

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def tensorflow_step(model, optimizer):
    """A function `(x, y) -> loss` that updates the model, and a function that does nothing."""
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
            scaled = optimizer.scale_loss(loss)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(scaled, variables), variables)
        return loss

    return step, lambda: None


def jax_step(model, optimizer):
    """A function `(x, y) -> loss` that updates a state, and one that writes it to the model."""
    import jax

    def loss_of(weights, others, optimizer_variables, x, y):
        y_pred, others = model.stateless_call(weights, others, x, training=True)
        loss = LOSS(y, y_pred)
        # The loss scale is a variable of the optimizer.
        with keras.StatelessScope(list(zip(optimizer.variables, optimizer_variables, strict=True))):
            return optimizer.scale_loss(loss), (loss, others)

    @jax.jit
    def compiled(state, x, y):
        weights, others, optimizer_variables = state
        gradients, (loss, others) = jax.grad(loss_of, has_aux=True)(*state, x, y)
        weights, optimizer_variables = optimizer.stateless_apply(
            optimizer_variables, gradients, weights
        )
        return loss, (weights, others, optimizer_variables)

    variables = model.trainable_variables, model.non_trainable_variables, optimizer.variables
    state = [[variable.value for variable in kind] for kind in variables]

    def step(x, y):
        nonlocal state
        loss, state = compiled(state, x, y)
        return loss

    def finish():
        for kind, values in zip(variables, state, strict=True):
            for variable, value in zip(kind, values, strict=True):
                variable.assign(value)

    return step, finish


def main(argv=None):
    args = common.parser(__doc__, 10, 64, "custom_loop.keras").parse_args(argv)
    common.begin(args)
    x_train, x_test, y_train, y_test = load_data()
    x_train, y_train = common.whole_batches(args, x_train, y_train)
    rng = np.random.default_rng(args.seed)

    model = als.wrap_model(build_model())
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(2e-3))
    optimizer.build(model.trainable_variables)
    make_step = jax_step if keras.backend.backend() == "jax" else tensorflow_step
    step, finish = make_step(model, optimizer)
    print("Compiling; the first step takes a while.")
    for epoch in range(args.epochs):
        batches = rng.permutation(len(x_train)).reshape(-1, args.batch_size)
        losses = [float(step(x_train[batch], y_train[batch])) for batch in batches]
        print(f"Epoch {epoch + 1} of {args.epochs}: loss {np.mean(losses):.4f}")
    finish()

    accuracy = np.mean(np.argmax(model.predict(x_test, len(x_test), verbose=0), 1) == y_test)
    print(f"\nTest accuracy: {accuracy:.2%}")
    common.say(model, optimizer)
    common.save(model, args.output)


if __name__ == "__main__":
    main()
