"""Models of every kind that people write, with data: the zoo of `test_any_model.py`.

Each builder returns a model and a batch to train it on. `LOSSES` names losses other than the mean
squared error. `FORKS` names models in which a tensor goes to several scaled layers, so that plain
Keras adds up gradients in another order. `AT_S` names those without a plan, with a part of the
reason.
"""

import keras
import numpy as np
from keras import layers, ops

RELU = {"activation": "relu"}


def floats(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype("float32")


def tokens(*shape, low=0, high=7):
    return np.random.default_rng(0).integers(low, high, shape).astype("int32")


X, Y = floats(8, 4), floats(8, 2) * 0.1


class Called(keras.Model):
    """A model with a function for its call."""

    def __init__(self, parts, call):
        super().__init__()
        self.parts = parts
        self._call = call

    def call(self, x, training=False):
        return self._call(self.parts, x)


def in_turn(parts, x):
    for part in parts:
        x = part(x)
    return x


class Attributes(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Dense(5, **RELU), layers.Dense(5)
        self.act, self.last = layers.ReLU(), layers.Dense(2)

    def call(self, x):
        return self.last(self.act(self.second(self.first(x))))


def attributes():
    return Attributes(), (X, Y)


def in_list():
    return Called([layers.Dense(5, **RELU) for _ in range(4)] + [layers.Dense(2)], in_turn), (X, Y)


def in_tuples():
    parts = ((layers.Dense(5), layers.ReLU()), (layers.Dense(5), (layers.Dense(2),)))
    return Called(parts, lambda p, x: p[1][1][0](p[1][0](p[0][1](p[0][0](x))))), (X, Y)


def in_dicts():
    parts = {"a": {"b": layers.Dense(5, **RELU)}, "c": [layers.Dense(4), layers.Dense(2)]}
    return Called(parts, lambda p, x: in_turn([p["a"]["b"], *p["c"]], x)), (X, Y)


def shared():
    parts = [layers.Dense(4, **RELU), layers.Dense(2)]
    return Called(parts, lambda p, x: p[1](p[0](p[0](x)))), (X, Y)


def tied_by_reference():
    """One layer under two names."""
    model = Attributes()
    model.second = model.first
    model.first.units = 4
    return model, (X, Y)


class MadeInBuild(keras.Model):
    def build(self, shape):
        self.first = layers.Dense(5, **RELU)
        self.last = layers.Dense(2)
        self.first.build(shape)
        self.last.build((None, 5))

    def call(self, x):
        return self.last(self.first(x))


def made_in_build():
    return MadeInBuild(), (X, Y)


class BlockBuilt(layers.Layer):
    """Has no layer inside before it is built."""

    def build(self, shape):
        self.up, self.down = layers.Dense(5, **RELU), layers.Dense(4)
        self.up.build(shape)
        self.down.build((*shape[:-1], 5))

    def call(self, x):
        return self.down(self.up(x))


def made_in_build_of_a_block():
    return Called([layers.Dense(3), BlockBuilt(), layers.Dense(2)], in_turn), (X, Y)


class OwnGradient(layers.Layer):
    """Makes gradients smaller between a layer and a weight of its own."""

    def __init__(self):
        super().__init__()
        self.inside = layers.Dense(4)

    def build(self, shape):
        self.inside.build(shape)
        self.factor = self.add_weight(shape=(4,), initializer="ones", name="factor")

    def call(self, x):
        @ops.custom_gradient
        def small_gradient(x):
            def backward(*args, upstream=None):
                return 0.5 * (args[0] if upstream is None else upstream)

            return 1 * x, backward

        return small_gradient(self.inside(x)) * self.factor


def own_gradient():
    return Called([layers.Dense(4), OwnGradient(), layers.Dense(2)], in_turn), (X, Y)


def in_closure():
    parts = [layers.Dense(5, **RELU), layers.Dense(4), layers.Dense(2)]
    run = lambda x: in_turn(parts, x)  # noqa: E731
    return Called(parts, lambda p, x: run(x)), (X, Y)


class Residual(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.norm, self.up = layers.BatchNormalization(), layers.Dense(2 * units, **RELU)
        self.down, self.add = layers.Dense(units), layers.Add()

    def build(self, shape):
        self.norm.build(shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], 2 * self.units))

    def call(self, x):
        return self.add([x, self.down(self.up(self.norm(x)))])


def residual_blocks():
    parts = [layers.Dense(5), Residual(5), Residual(5), layers.Dense(2)]
    return Called(parts, in_turn), (X, Y)


class Transformer(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.norms = [layers.LayerNormalization() for _ in range(2)]
        self.attention = layers.MultiHeadAttention(2, units // 2)
        self.mlp = keras.Sequential([layers.Dense(2 * units, "gelu"), layers.Dense(units)])

    def call(self, x):
        y = self.norms[0](x)
        x = x + self.attention(y, y)
        return x + self.mlp(self.norms[1](x))


class ViT(keras.Model):
    """With weights of its own, and a token in front."""

    def __init__(self):
        super().__init__()
        self.patches, self.head = layers.Conv2D(6, 2, strides=2), layers.Dense(2)
        self.blocks = [Transformer(6) for _ in range(2)]

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, 6), name="token")
        self.positions = self.add_weight(shape=(1, 5, 6), name="positions")

    def call(self, x):
        x = self.patches(x)
        x = ops.reshape(x, (ops.shape(x)[0], 4, 6))
        token = ops.cast(ops.broadcast_to(self.token, (ops.shape(x)[0], 1, 6)), x.dtype)
        x = ops.concatenate([token, x], axis=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def vit():
    return ViT(), (floats(8, 4, 4, 1), Y)


def functional_of_blocks():
    x = inputs = keras.Input((3, 6))
    for _ in range(2):
        x = Transformer(6)(x)
    return keras.Model(inputs, layers.Dense(2)(x)), (floats(4, 3, 6), floats(4, 3, 2))


class Sampling(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seeds = keras.random.SeedGenerator(1)

    def call(self, mean, log_variance):
        noise = keras.random.normal(ops.shape(mean), seed=self.seeds, dtype=mean.dtype)
        return mean + ops.exp(0.5 * log_variance) * noise


class VAE(keras.Model):
    """Two Functional models and a loss of its own."""

    def __init__(self):
        super().__init__()
        x = inputs = keras.Input((4,))
        x = layers.Dense(6, **RELU)(x)
        mean, log_variance = layers.Dense(2)(x), layers.Dense(2)(x)
        z = Sampling()(mean, log_variance)
        self.encoder = keras.Model(inputs, [mean, log_variance, z])
        self.decoder = keras.Sequential(
            [keras.Input((2,)), layers.Dense(6, **RELU), layers.Dense(4)]
        )

    def call(self, x):
        mean, log_variance, z = self.encoder(x)
        mean, log_variance = ops.cast(mean, "float32"), ops.cast(log_variance, "float32")
        divergence = -0.5 * (1 + log_variance - ops.square(mean) - ops.exp(log_variance))
        self.add_loss(ops.mean(divergence))
        return self.decoder(z)


def vae():
    return VAE(), (X, X)


class Functional(keras.Model):
    """A graph made in a constructor of its own, and methods."""

    def __init__(self, units=5, **kwargs):
        inputs = keras.Input((4,))
        x = layers.Dense(units, **RELU)(inputs)
        super().__init__(inputs, layers.Dense(2)(layers.Dense(units)(x)), **kwargs)
        self.units = units

    def get_config(self):
        return {"units": self.units, "name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def doubled(self, x):
        return 2 * self(x)


def own_constructor():
    return Functional(), (X, Y)


class InAndOut(keras.Model):
    def __init__(self):
        super().__init__()
        self.left, self.right = layers.Dense(4), layers.Dense(4, **RELU)
        self.heads = {"first": layers.Dense(2), "second": layers.Dense(3)}

    def call(self, inputs):
        x = ops.concatenate([self.left(inputs["a"]), self.right(inputs["b"])], axis=-1)
        return {name: head(x) for name, head in self.heads.items()}


def dicts_in_and_out():
    return InAndOut(), ({"a": X, "b": floats(8, 3)}, {"first": Y, "second": floats(8, 3)})


def recurrent():
    parts = [
        layers.Embedding(7, 4, mask_zero=True),
        layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
        layers.GRU(4),
        layers.Dense(2),
    ]
    return Called(parts, in_turn), (tokens(8, 5), Y)


class Cell(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.state_size, self.dense = units, layers.Dense(units)

    def build(self, shape):
        self.dense.build((None, shape[-1] + self.state_size))

    def call(self, x, states):
        y = ops.tanh(self.dense(ops.concatenate([x, states[0]], axis=-1)))
        return y, [y]


def own_cell():
    parts = [layers.Dense(4), layers.RNN(Cell(3)), layers.Dense(2)]
    return Called(parts, in_turn), (floats(8, 5, 4), Y)


def tied_embedding():
    """A weight of a layer is read directly."""

    def call(parts, x):
        embedding, dense = parts
        x = dense(embedding(x))
        return ops.matmul(x, ops.transpose(ops.cast(embedding.embeddings, x.dtype)))

    parts = [layers.Embedding(7, 4), layers.Dense(4, **RELU)]
    return Called(parts, call), (tokens(8, 5), floats(8, 5, 7))


class Penalized(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = layers.Dense(5, activity_regularizer="l2", dtype="float32", **RELU)
        self.second = layers.Dense(5, kernel_regularizer="l2")
        self.last = layers.Dense(2)

    def call(self, x):
        x = self.first(x)
        self.add_loss(ops.mean(ops.square(ops.cast(x, "float32"))))
        return self.last(self.second(self.second(x)))


def losses_inside():
    return Penalized(), (X, Y)


def submodel_twice():
    branch = keras.Sequential([layers.Dense(5, **RELU), layers.Dense(4)])
    once = keras.Sequential([layers.Dense(4), layers.ReLU(), layers.Dense(2)])
    return Called([branch, once], lambda p, x: p[1](p[0](p[0](x)))), (X, Y)


class Scaled(layers.Layer):
    """With a weight of its own, beside a layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4)

    def build(self, shape):
        self.gain = self.add_weight(shape=(4,), initializer="ones", name="gain")
        self.dense.build(shape)

    def call(self, x):
        return self.gain * self.dense(x)


def weights_between():
    parts = [layers.Dense(4), Scaled(), Scaled(), layers.Dense(2)]
    return Called(parts, in_turn), (X, Y)


class OwnDense(layers.Layer):
    """All weights are its own; what is inside has none."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units, self.dropout = units, layers.Dropout(0.0)

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")

    def call(self, x):
        return self.dropout(ops.relu(ops.matmul(x, self.kernel)))


def own_layers():
    return Called([OwnDense(5), OwnDense(5), layers.Dense(2)], in_turn), (X, Y)


class Doubled(layers.Dense):
    def call(self, x, training=None):
        return 2 * super().call(x)


def subclass_of_dense():
    return Called([Doubled(5), layers.Dense(4), Doubled(2)], in_turn), (X, Y)


class Squared(layers.Layer):
    """Without weights, from operations of Keras."""

    def call(self, x):
        return ops.square(x) * 0.5


def own_activation():
    parts = [layers.Dense(5), Squared(), layers.Dense(4), layers.Dense(2)]
    return Called(parts, in_turn), (X, Y)


def ops_cond():
    def call(parts, x):
        x = parts[0](x)
        x = ops.cond(ops.sum(ops.abs(x)) < 0, lambda: ops.zeros_like(x), lambda: ops.tanh(x))
        return parts[2](parts[1](x))

    return Called([layers.Dense(5), layers.Dense(4), layers.Dense(2)], call), (X, Y)


class InCond(keras.Model):
    """A layer is called in a branch of a conditional."""

    def __init__(self):
        super().__init__()
        self.first, self.extra = layers.Dense(4), layers.Dense(4, **RELU)
        self.last = layers.Dense(2)

    def build(self, shape):
        for layer in (self.first, self.extra, self.last):
            layer.build((None, 4))

    def call(self, x):
        x = self.first(x)
        x = ops.cond(ops.sum(ops.abs(x)) > 0, lambda: self.extra(x), lambda: x)
        return self.last(x)


def layer_in_cond():
    return InCond(), (X, Y)


class InTrainingOnly(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.extra = layers.Dense(4), layers.Dense(4, **RELU)
        self.last = layers.Dense(2)

    def call(self, x, training=False):
        x = self.first(x)
        if training:
            x = self.extra(x)
        return self.last(x)


def branch_in_training():
    return InTrainingOnly(), (X, Y)


class Kept(Attributes):
    """A tensor is kept in an attribute, and comes into the loss from there."""

    def call(self, x):
        self.latent = self.first(x)
        return self.last(self.act(self.second(self.latent)))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + ops.mean(ops.square(ops.cast(self.latent, "float32")))


def kept_in_attribute():
    return Kept(), (X, Y)


_SEEN = []


class Leaking(Attributes):
    """A tensor comes into the loss by way of a global list."""

    def call(self, x):
        x = self.first(x)
        _SEEN[:] = [x]
        return self.last(self.act(self.second(x)))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + ops.mean(ops.square(ops.cast(_SEEN[-1], "float32")))


def kept_in_global():
    return Leaking(), (X, Y)


def frozen():
    model = Attributes()
    model.second.trainable = False
    return model, (X, Y)


def deferred_sequential():
    return keras.Sequential(
        [layers.Dense(5, **RELU), layers.Dropout(0.1, seed=1), layers.Dense(2)]
    ), (X, Y)


def never_called():
    model = Attributes()
    model.spare = layers.Dense(3)
    return model, (X, Y)


def remat_layers(mode="full"):
    with keras.RematScope(mode):
        parts = [layers.Dense(5, activation="tanh") for _ in range(3)]
    return Called([*parts, layers.Dense(2)], in_turn), (X, Y)


def remat_block(mode="full"):
    with keras.RematScope(mode):
        block = Residual(4)
    return Called([layers.Dense(4), block, layers.Dense(2)], in_turn), (X, Y)


class Loop(keras.Model):
    """Runs one layer as often as it is told."""

    def __init__(self):
        super().__init__()
        self.times = 1
        self.step, self.last = layers.Dense(4, activation="tanh"), layers.Dense(2)

    def call(self, x):
        for _ in range(self.times):
            x = self.step(x)
        self.times += 1
        return self.last(x)


def loop_of_varying_length():
    return Loop(), (X, Y)


def adapted():
    """LoRA."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, **RELU), layers.Dense(2)])
    model.layers[0].enable_lora(2)
    return model, (X, Y)


def time_distributed():
    block = keras.Sequential([layers.Dense(5, **RELU), layers.Dense(3)])
    parts = [layers.TimeDistributed(block), layers.Flatten(), layers.Dense(2)]
    return Called(parts, in_turn), (floats(8, 3, 4), Y)


class Twice(layers.Wrapper):
    def call(self, x):
        return self.layer(x) + x


def own_wrapper():
    parts = [layers.Dense(4), Twice(layers.Dense(4, **RELU)), layers.Dense(2)]
    return Called(parts, in_turn), (X, Y)


def wrapped_by_hand():
    import tf_adaptive_ls as als

    parts = [als.LossScaled(layers.Dense(5)), layers.Dense(4, **RELU), layers.Dense(2)]
    return Called(parts, in_turn), (X, Y)


class ManyArguments(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.query, self.key = layers.Dense(4), layers.Dense(4)

    def call(self, query, key=None, *, scale=1.0, return_both=False):
        query, key = self.query(query), self.key(key)
        product = query * key * scale
        return (product, key) if return_both else product


def many_arguments():
    def call(parts, x):
        first, both, last = parts
        x = first(x, key=2 * x, scale=0.05)
        product, key = both(x, x, return_both=True)
        return last(product + key)

    return Called([ManyArguments(), ManyArguments(), layers.Dense(2)], call), (X, Y)


def model_in_list_of_models():
    towers = [keras.Sequential([layers.Dense(4, **RELU), layers.Dense(2)]) for _ in range(2)]
    return Called(towers, lambda p, x: p[0](x) * p[1](x)), (X, Y)


class Distiller(keras.Model):
    """Two models inside, of which one learns, and a `train_step` of its own."""

    def __init__(self):
        super().__init__()
        self.teacher = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(2)])
        self.student = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2)])
        self.teacher.trainable = False

    def call(self, x, training=False):
        return self.student(x, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        taught = ops.cast(self.teacher(x), "float32")
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + ops.mean(ops.square(taught - ops.cast(y_pred, "float32")))


def distiller():
    return Distiller(), (X, Y)


def softmax_at_the_end():
    parts = [layers.Dense(5, **RELU), layers.Dense(3, activation="softmax")]
    return Called(parts, in_turn), (X, tokens(8, high=3))


class ToldLate(keras.Model):
    """Keras tells all layers that follow what one is told of training, but none before."""

    def __init__(self):
        super().__init__()
        self.norm, self.still = layers.BatchNormalization(), layers.BatchNormalization()
        self.last = layers.Dense(2)

    def call(self, x, training=None):
        return self.last(self.still(self.norm(x), training=False))


def told_late():
    return ToldLate(), (X, Y)


KINDS = (
    attributes, in_list, in_tuples, in_dicts, shared, made_in_build, in_closure, residual_blocks,
    vit, functional_of_blocks, vae, own_constructor, dicts_in_and_out, recurrent, own_cell,
    tied_embedding, losses_inside, submodel_twice, weights_between, own_layers, subclass_of_dense,
    own_activation, ops_cond, layer_in_cond, branch_in_training, kept_in_attribute,
    kept_in_global, frozen, deferred_sequential, never_called, remat_layers, remat_block,
    loop_of_varying_length, adapted, time_distributed, own_wrapper, wrapped_by_hand,
    many_arguments, model_in_list_of_models, distiller, softmax_at_the_end,
    told_late, made_in_build_of_a_block, own_gradient,
)  # fmt: skip
LOSSES = {softmax_at_the_end: "sparse_categorical_crossentropy"}
FORKS = (residual_blocks, vit, functional_of_blocks, vae, many_arguments, model_in_list_of_models)
# Keras runs a block again without what it was told of training, and in another dtype.
PLAIN = {
    remat_block: lambda: remat_block(mode=None),
    remat_layers: lambda: remat_layers(mode=None),
}
# No two calls of them give the same, or Keras cannot call them in a graph.
CHANGING = (vae, loop_of_varying_length, remat_layers, remat_block)
# Keras 3.15 builds them wrongly on JAX: its symbolic call is not a training one.
NOT_ON_JAX = (branch_in_training,)
AT_S = {ops_cond: "cond", layer_in_cond: "cond"}
# JAX has no attention in float16 on a CPU.
WITH_ATTENTION = (vit, functional_of_blocks)
