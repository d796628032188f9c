"""Trains a GAN on handwritten digits in float16: two models, each with scales of its own.

A generator draws images from noise, a discriminator tells them from real ones, and each learns
from the other (Goodfellow et al. 2014). Each is wrapped and has an optimizer of its own; the
generator's gradients come to it through the discriminator. Prints some of what is drawn, and
what each layer's gradients do. For TensorFlow.
"""

import common
import keras
import numpy as np
from digits import load_data
from keras import layers, ops

import tf_adaptive_ls as als

NOISE = 16
LOSS = keras.losses.BinaryCrossentropy(from_logits=True)


def build_generator():
    """Noise `[NOISE]` to images `[8, 8, 1]` in [0, 1]."""
    inputs = keras.Input((NOISE,))
    x = layers.Dense(2 * 2 * 64, "relu")(inputs)
    x = layers.Reshape((2, 2, 64))(x)
    x = layers.Conv2DTranspose(32, 4, 2, padding="same", activation="relu")(x)
    x = layers.Conv2DTranspose(16, 4, 2, padding="same", activation="relu")(x)
    x = layers.Conv2D(1, 3, padding="same")(x)
    return keras.Model(inputs, layers.Activation("sigmoid", dtype="float32")(x))


def build_discriminator():
    """Images `[8, 8, 1]` to a score: positive for real ones."""
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, padding="same", activation="leaky_relu")(inputs)
    x = layers.Conv2D(32, 4, 2, padding="same", activation="leaky_relu")(x)
    x = layers.Conv2D(64, 4, 2, padding="same", activation="leaky_relu")(x)
    x = layers.Dropout(0.3)(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(1, dtype="float32", name="score")(x))


class GAN(keras.Model):
    """Both, trained in turn."""

    def __init__(self, generator, discriminator):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.seeds = keras.random.SeedGenerator(0)

    def compile(self, for_generator, for_discriminator):
        super().compile(jit_compile=True)
        self.for_generator, self.for_discriminator = for_generator, for_discriminator
        for_generator.build(self.generator.trainable_variables)
        for_discriminator.build(self.discriminator.trainable_variables)

    def train_step(self, images):
        import tensorflow as tf

        number = ops.shape(images)[0]
        real, drawn = ops.ones((number, 1)), ops.zeros((number, 1))
        fake = self.generator(keras.random.normal((number, NOISE), seed=self.seeds), training=True)
        with tf.GradientTape() as tape:
            scores = self.discriminator(ops.concatenate([images, fake]), training=True)
            loss_d = LOSS(ops.concatenate([real, drawn]), scores)
            scaled = self.for_discriminator.scale_loss(loss_d)
        variables = self.discriminator.trainable_variables
        self.for_discriminator.apply(tape.gradient(scaled, variables), variables)

        noise = keras.random.normal((number, NOISE), seed=self.seeds)
        with tf.GradientTape() as tape:
            scores = self.discriminator(self.generator(noise, training=True), training=True)
            loss_g = LOSS(real, scores)
            scaled = self.for_generator.scale_loss(loss_g)
        variables = self.generator.trainable_variables
        self.for_generator.apply(tape.gradient(scaled, variables), variables)
        return {"discriminator": loss_d, "generator": loss_g}


def as_text(images):
    """Images side by side, a character per pixel."""
    shades = np.array(list(" .:-=+*%@@"))
    rows = np.concatenate(list(shades[(np.array(images)[..., 0] * 9.99).astype(int)]), axis=1)
    return "\n".join("".join(row) for row in rows)


def main(argv=None):
    args = common.parser(__doc__, 150, 64, "gan.keras").parse_args(argv)
    if keras.backend.backend() != "tensorflow":
        raise SystemExit("Expected KERAS_BACKEND=tensorflow, whose tape this example uses.")
    common.begin(args)
    images, _, _, _ = load_data()
    (images,) = common.whole_batches(args, images)

    gan = GAN(als.wrap_model(build_generator()), als.wrap_model(build_discriminator()))
    adam = {"learning_rate": 1e-3, "beta_1": 0.5}
    gan.compile(
        als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(**adam)),
        als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(**adam)),
    )
    print("Compiling; the first step takes a while.")
    gan.fit(images, batch_size=args.batch_size, epochs=args.epochs)

    noise = np.random.default_rng(args.seed).normal(size=(8, NOISE)).astype("float32")
    print(f"\nDrawn from noise:\n\n{as_text(gan.generator(noise))}\n")
    print("The discriminator.")
    common.say(gan.discriminator, gan.for_discriminator)
    print("\nThe generator.")
    common.say(gan.generator, gan.for_generator)
    common.save(gan.generator, args.output)


if __name__ == "__main__":
    main()
