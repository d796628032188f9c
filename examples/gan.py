"""Trains a conditional GAN on handwritten digits in float16: two models and two optimizers.

A generator draws a given digit from noise, and a discriminator tells drawings from real images
(Goodfellow et al. 2014). Both know the digit (Mirza and Osindero 2014; Miyato and Koyama 2018), so
the generator cannot collapse to a single one. Each model has its own optimizer; the gradients of
the generator pass through the discriminator. Prints drawings of all digits and the scales of all
layers. For TensorFlow.
"""

import common
import keras
import numpy as np
from digits import load_data
from keras import layers, ops

import tf_adaptive_ls as als

NOISE = 16
DIGITS = 10
LOSS = keras.losses.BinaryCrossentropy(from_logits=True)


def build_generator():
    """Noise `[NOISE]` and a digit to images `[8, 8, 1]` in [0, 1]."""
    noise, digit = keras.Input((NOISE,)), keras.Input((), dtype="int32")
    x = layers.Concatenate()([noise, layers.Embedding(DIGITS, NOISE)(digit)])
    x = layers.Dense(2 * 2 * 64)(x)
    x = layers.Reshape((2, 2, 64))(layers.ReLU()(layers.BatchNormalization()(x)))
    x = layers.Conv2DTranspose(32, 4, 2, padding="same")(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2DTranspose(16, 4, 2, padding="same")(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(1, 3, padding="same")(x)
    return keras.Model([noise, digit], layers.Activation("sigmoid", dtype="float32")(x))


def build_discriminator():
    """Images `[8, 8, 1]` and a digit to a score: positive for real images of it."""
    image, digit = keras.Input((8, 8, 1)), keras.Input((), dtype="int32")
    x = layers.GaussianNoise(0.3)(image)  # or it tells them apart too soon
    x = layers.Conv2D(16, 3, padding="same", activation="leaky_relu")(x)
    x = layers.Conv2D(32, 4, 2, padding="same", activation="leaky_relu")(x)
    x = layers.Conv2D(64, 4, 2, padding="same", activation="leaky_relu")(x)
    x = layers.Dropout(0.3)(layers.Flatten()(x))
    score = layers.Dense(1, dtype="float32", name="score")(x)
    # Miyato and Koyama's projection: how well the features match those of the digit.
    match = layers.Dot(1, dtype="float32")([x, layers.Embedding(DIGITS, 256)(digit)])
    return keras.Model([image, digit], layers.Add(dtype="float32")([score, match]))


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

    def draw(self, digits, training=True):
        """Drawings of given digits."""
        noise = keras.random.normal((ops.shape(digits)[0], NOISE), seed=self.seeds)
        return self.generator([noise, digits], training=training)

    def train_step(self, data):
        import tensorflow as tf

        images, digits = data
        number = ops.shape(images)[0]
        real, drawn = ops.ones((number, 1)), ops.zeros((number, 1))
        both = ops.concatenate([images, self.draw(digits)]), ops.concatenate([digits, digits])
        with tf.GradientTape() as tape:
            scores = self.discriminator(both, training=True)
            loss_d = LOSS(ops.concatenate([real, drawn]), scores)
            scaled = self.for_discriminator.scale_loss(loss_d)
        variables = self.discriminator.trainable_variables
        self.for_discriminator.apply(tape.gradient(scaled, variables), variables)

        with tf.GradientTape() as tape:
            scores = self.discriminator([self.draw(digits), digits], training=True)
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
    args = common.parser(__doc__, 60, 64, "gan.keras").parse_args(argv)
    if keras.backend.backend() != "tensorflow":
        raise SystemExit("Expected KERAS_BACKEND=tensorflow, whose tape this example uses.")
    common.begin(args)
    images, _, labels, _ = load_data()
    images, labels = common.whole_batches(args, images, labels.astype("int32"))

    gan = GAN(als.wrap_model(build_generator()), als.wrap_model(build_discriminator()))
    gan.compile(
        als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(2e-3, beta_1=0.5)),
        als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(5e-4, beta_1=0.5)),
    )
    print("Compiling; the first step takes a while.")
    gan.fit(images, labels, args.batch_size, args.epochs, verbose=2)

    print(f"\nThe digits 0 to 9:\n\n{as_text(gan.draw(ops.arange(DIGITS), training=False))}\n")
    print("Scales of the discriminator.")
    common.say(gan.discriminator, gan.for_discriminator)
    print("\nScales of the generator.")
    common.say(gan.generator, gan.for_generator)
    common.save(gan.generator, args.output)


if __name__ == "__main__":
    main()
