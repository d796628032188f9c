"""Kernels as matrices: outputs are their products with rows of inputs."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_adaptive_ls.deploy.kernels import kernels_of
from tf_adaptive_ls.deploy.moments import Moments

CASES = {
    "dense": (lambda: layers.Dense(5), (3, 7)),
    "dense of more axes": (lambda: layers.Dense(5), (3, 4, 7)),
    "einsum, two axes of channels": (
        lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3)),
        (2, 4, 5),
    ),
    "einsum, two axes of inputs": (
        lambda: layers.EinsumDense("abcd,cde->abe", (None, 6)),
        (2, 4, 3, 5),
    ),
    "einsum, groups": (lambda: layers.EinsumDense("abc,bcd->abd", (4, 6)), (2, 4, 5)),
    "einsum, ellipsis": (lambda: layers.EinsumDense("...x,xy->...y", 6), (2, 4, 5)),
    "conv 1d, causal": (lambda: layers.Conv1D(4, 3, padding="causal", dilation_rate=2), (2, 9, 5)),
    "conv 2d, groups": (
        lambda: layers.Conv2D(6, 3, strides=2, padding="same", groups=2),
        (2, 9, 8, 4),
    ),
    "conv 2d, dilated": (lambda: layers.Conv2D(6, (3, 2), dilation_rate=2), (2, 9, 8, 4)),
    "conv 3d": (lambda: layers.Conv3D(3, 2), (2, 4, 4, 4, 2)),
    "depthwise 2d": (
        lambda: layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2),
        (2, 6, 6, 3),
    ),
    "depthwise 1d": (lambda: layers.DepthwiseConv1D(3, strides=2), (2, 6, 3)),
    "separable 2d": (
        lambda: layers.SeparableConv2D(5, 3, padding="same", depth_multiplier=2),
        (2, 6, 6, 3),
    ),
    "separable 1d": (lambda: layers.SeparableConv1D(5, 3, strides=2), (2, 6, 3)),
    "transposed 1d": (lambda: layers.Conv1DTranspose(4, 3, strides=2), (2, 5, 3)),
    "transposed 2d": (
        lambda: layers.Conv2DTranspose(4, 3, strides=2, padding="same"),
        (2, 5, 5, 3),
    ),
    "transposed 2d, padded": (
        lambda: layers.Conv2DTranspose(4, (2, 3), strides=3, padding="same", output_padding=1),
        (2, 5, 5, 3),
    ),
    "transposed 3d": (lambda: layers.Conv3DTranspose(4, 3, strides=2), (2, 3, 3, 3, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_products_of_rows(name):
    make, shape = CASES[name]
    layer, x = make(), np.random.default_rng(0).normal(size=shape).astype("float32")
    expected = keras.ops.convert_to_numpy(layer(x))
    *_, last = kernels_of(layer)
    matrix = last.matrix(last.variable.numpy())
    rows = np.concatenate(list(last.rows(x)), axis=1)
    outputs = np.einsum("gpi,gci->pgc", rows, matrix)
    np.testing.assert_allclose(outputs.ravel(), expected.ravel(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_matrix_goes_back(name):
    make, shape = CASES[name]
    layer = make()
    layer.build(shape)
    for kernel in kernels_of(layer):
        value = kernel.variable.numpy()
        np.testing.assert_array_equal(kernel.kernel(kernel.matrix(value)), value)


def test_layers_without_a_kernel_and_calls_of_an_authors_own():
    class Own(layers.Dense):
        def call(self, x):
            return keras.ops.matmul(x, self.kernel * 2)

    for layer in (layers.BatchNormalization(), layers.Embedding(3, 2), Own(3)):
        layer.build((2, 4))
        assert kernels_of(layer) == []


@pytest.mark.parametrize("positions", [0, 3, 40])
def test_moments_tell_the_error_of_outputs(rng, positions):
    """With fewer rows than inputs, and with more; without any, of independent inputs."""
    moments = Moments(2, 10)
    rows = rng.normal(size=(2, positions, 10)).astype("float32")
    for start in range(0, positions, 7):
        moments.add(rows[:, start : start + 7])
    weights = rng.normal(size=(2, 4, 10))
    outputs = np.einsum("gpi,gci->gpc", rows if positions else np.eye(10)[None], weights)
    np.testing.assert_allclose(moments.squares(weights), np.square(outputs).sum(axis=1), rtol=1e-5)
