import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import ON_JAX
from tests.graphs import floats
from tf_adaptive_ls.backend import keras_internals
from tf_adaptive_ls.training.call_tensors import Arguments, CallTensors, is_inexact, is_narrow
from tf_adaptive_ls.training.scale_plan import AT_S, Route, ScaleGroup


def tensor(dtype="float32"):
    return ops.convert_to_tensor(floats(2, 3), dtype)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (tensor(), True),
        (tensor("float16"), True),
        (ops.ones((2,), "int32"), False),
        (np.ones((2,), "float32"), False),
        (1.5, False),
        (None, False),
        (ops.convert_to_tensor(np.ones(2, "complex64")), True),
    ],
    ids=["float32", "float16", "int32", "array", "number", "none", "complex64"],
)
def test_what_may_have_a_gradient(value, expected):
    assert is_inexact(value) == expected


def test_formats_that_a_scale_matters_to():
    found = {dtype: is_narrow(tensor(dtype)) for dtype in ("float16", "bfloat16", "float32")}
    assert found == {"float16": True, "bfloat16": False, "float32": False}


def test_tensors_are_found_and_replaced_wherever_they_are():
    first, second, third = tensor(), tensor(), tensor()
    number, flag = ops.ones((2,), "int32"), True
    args, kwargs = ([first, number], None), {"state": {"h": second}, "training": flag, "k": third}
    arguments = Arguments(als.LossScaled(layers.Dense(2)), args, kwargs, None)
    assert [id(each) for each in arguments.tensors] == [id(first), id(second), id(third)]
    assert [arguments.groups[place] for place in arguments.places] == [AT_S] * 3

    args, kwargs = arguments.replaced(["a", "b", "c"])
    assert args[0] == ["a", number] and args[1] is None
    assert kwargs == {"state": {"h": "b"}, "training": True, "k": "c"}


def test_groups_are_those_of_the_route():
    scaled = als.LossScaled(layers.Dense(2))
    group = ScaleGroup((scaled,))
    route = Route(args=[AT_S, group], kwargs={"k": [group]})
    values = {"k": tensor(), "not_planned": tensor()}
    # The integers have a place in the route, and no gradient.
    arguments = Arguments(scaled, (ops.ones((2,), "int32"), tensor()), values, route)
    assert [arguments.groups[place] for place in arguments.places] == [group, group, AT_S]


@pytest.mark.parametrize(
    ("dtype", "autocast", "narrow", "seen_in"),
    [
        ("mixed_float16", True, [True, True], ["float16", "float32"]),
        ("float32", True, [True, False], ["float32", "float32"]),
        ("float32", False, [False, False], ["float16", "float32"]),
    ],
    ids=["narrow layer", "wide layer", "wide layer that casts nothing"],
)
def test_gradients_are_shifted_before_they_are_rounded(dtype, autocast, narrow, seen_in):
    scaled = als.LossScaled(layers.Dense(2, dtype=dtype, autocast=autocast))
    arguments = Arguments(scaled, (tensor("float16"), tensor()), {}, None)
    assert arguments.narrow == narrow
    assert [keras.backend.standardize_dtype(each.dtype) for each in arguments.tensors] == seen_in


def test_what_keras_hangs_on_a_tensor_stays_on_it():
    original, other, mask = tensor(), tensor(), ops.ones((2,), "bool")
    keras_internals.set_mask(original, mask)
    (replaced,) = CallTensors([original]).replaced([other])
    assert replaced is other and keras_internals.mask_of(replaced) is mask


@pytest.mark.skipif(ON_JAX, reason="Keras leaves logits on tensors of TensorFlow alone")
def test_logits_belong_to_a_tensor():
    probabilities, other = keras.activations.softmax(tensor()), tensor()
    found = CallTensors({"y": probabilities})
    assert found.logits[0] is probabilities._keras_logits
    assert found.replaced([other])["y"]._keras_logits is probabilities._keras_logits
    assert found.replaced([tensor()], logits={0: other})["y"]._keras_logits is other


def composites():
    """Values with several parts, and the floating-point numbers in them."""
    if ON_JAX:
        from jax.experimental import sparse

        matrix = sparse.BCOO.fromdense(np.float32([[1, 0], [0, 2]]))
        return [(matrix, [1, 2]), ((None, [matrix]), [1, 2])]
    ragged = tf.ragged.constant([[1.0], [2.0, 3.0]])
    nested = tf.ragged.constant([[[1.0], []], [[2.0, 3.0]]])
    matrix = tf.sparse.from_dense([[1.0, 0.0], [0.0, 2.0]])
    slices = tf.IndexedSlices(tf.constant([[1.0], [2.0]]), tf.constant([0, 2]), tf.constant([3, 1]))
    return [
        (ragged, [1, 2, 3]),
        (nested, [1, 2, 3]),
        (matrix, [1, 2]),
        (slices, [1, 2]),
        ({"a": [ragged]}, [1, 2, 3]),
    ]


@pytest.mark.parametrize(("value", "numbers"), composites())
def test_tensors_in_several_parts(value, numbers):
    found = CallTensors(value)
    (part,) = found.tensors
    assert np.ravel(part).tolist() == numbers
    replaced = found.replaced([part * 2])
    keras.tree.assert_same_structure(replaced, value)
    assert np.ravel(CallTensors(replaced).tensors[0]).tolist() == [2 * each for each in numbers]
    # Whole numbers in several parts have no gradients.
    if not ON_JAX:
        integers = tf.ragged.constant([[1], [2, 3]])
        assert CallTensors(integers).tensors == []
        assert CallTensors([integers]).replaced([])[0] is integers


@pytest.mark.skipif(ON_JAX, reason="arrays of tensors are TensorFlow's")
def test_tensors_that_cannot_be_reached_are_refused():
    array = tf.TensorArray("float32", 1)
    with pytest.raises(ValueError, match="Expected a LossScaled layer to take and return tensors"):
        CallTensors([array])
