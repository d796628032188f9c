"""Pytest plugin: Keras's own tests, with this library's classes in the place of Keras's.

`./dev test --peers` runs it on the tests in Keras's wheel.

- In tests of layers, every `run_layer_test` first compares the layer with itself in a
  `LossScaled`: outputs, gradients of all weights and inputs, state, added losses, bit for bit, at
  two scales. It then tests the `LossScaled` layer as if it were the layer. Every other direct call
  of a layer goes through a `LossScaled` around it.
- In all tests `keras.optimizers.LossScaleOptimizer` is `AdaptiveLossScaleOptimizer`, and in those
  of models, trainers and saving `compile` puts one around every optimizer.

What fails for the harness, or on purpose, is in `known.py`, with the reason.
"""

import functools
import importlib.util
import inspect
import re
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src import backend, optimizers
from keras.src.backend import in_stateless_scope
from keras.src.layers.layer import Layer
from keras.src.optimizers import loss_scale_optimizer
from keras.src.testing import test_case
from keras.src.trainers import trainer

import tf_adaptive_ls as als
from tests.backends import value_and_gradients
from tests.peers.known import reason_for
from tf_adaptive_ls.backend.arrays import dense_parts, is_inexact_dtype, real_numbers
from tf_adaptive_ls.training.loss_scaled import wrapper_of

SCALES = (0, 5)
OTHERS = ("grain", "pandas", "torch")
MISSING = [name for name in OTHERS if importlib.util.find_spec(name) is None]


def pytest_configure(config):
    for marker in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{marker}: Keras's own")
    loss_scale_optimizer.LossScaleOptimizer = als.AdaptiveLossScaleOptimizer
    optimizers.LossScaleOptimizer = als.AdaptiveLossScaleOptimizer
    test_case.TestCase.run_layer_test = also_scaled(test_case.TestCase.run_layer_test)
    Layer.__call__ = through_a_wrapper(Layer.__call__)
    trainer.optimizers = _Optimizers()
    sys.modules["conftest"] = types.ModuleType("conftest")  # Keras's is not in the wheel
    sys.modules["conftest"].skip_if_backend = skip_if_backend


def skip_if_backend(name, reason):
    return pytest.mark.skipif(backend.backend() == name, reason=reason)


def pytest_ignore_collect(collection_path):
    if collection_path.suffix != ".py" or not MISSING:
        return None
    imports = re.search(rf"^import ({'|'.join(MISSING)})$", collection_path.read_text(), re.M)
    return True if imports else None


def pytest_collection_modifyitems(items):
    for item in items:
        reason = reason_for(item.nodeid)
        if "multi_device" in item.keywords:
            reason = "for several devices"
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    _Wrapping.direct_calls = "/layers/" in item.nodeid
    _Wrapping.optimizers = "/layers/" not in item.nodeid and "/optimizers/" not in item.nodeid
    try:
        return (yield)
    finally:
        _Wrapping.direct_calls = _Wrapping.optimizers = False


class _Wrapping:
    """What is put in the place of Keras's at present."""

    direct_calls = optimizers = False


class _Optimizers:
    """`keras.optimizers` as the trainer sees it."""

    def __getattr__(self, name):
        return getattr(optimizers, name)

    def get(self, identifier):
        optimizer = optimizers.get(identifier)
        scales = isinstance(optimizer, als.AdaptiveLossScaleOptimizer)
        if optimizer is None or scales or not _Wrapping.optimizers:
            return optimizer
        return als.AdaptiveLossScaleOptimizer(optimizer)


def through_a_wrapper(call):
    """`Layer.__call__`, the outermost of which goes through a `LossScaled` layer."""

    @functools.wraps(call)
    def wrapped_call(self, *args, **kwargs):
        if not _Wrapping.direct_calls:
            return call(self, *args, **kwargs)
        _Wrapping.direct_calls = False  # of what is inside
        try:
            return call(_scaled(self, args, kwargs), *args, **kwargs)
        finally:
            _Wrapping.direct_calls = True

    return wrapped_call


def _scaled(layer, args, kwargs):
    """The `LossScaled` layer around one that is called, or that one itself."""
    symbolic = any(isinstance(x, keras.KerasTensor) for x in keras.tree.flatten((args, kwargs)))
    if isinstance(layer, (als.LossScaled, keras.Model)) or symbolic or in_stateless_scope():
        return layer
    if not layer.built or not layer.trainable_weights or not _is_eager():
        return layer
    if wrapper_of(layer) is None:
        als.LossScaled(layer).log2_scale = SCALES[-1]
    return wrapper_of(layer)


def _is_eager():
    return keras.backend.backend() != "tensorflow" or tf.executing_eagerly()


def also_scaled(run_layer_test):
    signature = inspect.signature(run_layer_test)

    @functools.wraps(run_layer_test)
    def run(self, layer_cls, init_kwargs, *args, **kwargs):
        bound = signature.bind(self, layer_cls, init_kwargs, *args, **kwargs)
        bound.apply_defaults()
        before, _Wrapping.direct_calls = _Wrapping.direct_calls, False
        try:
            run_layer_test(*bound.args, **bound.kwargs)
            compare(**bound.arguments)
            run_layer_test(*_of_wrapper(bound).args, **bound.kwargs)
        finally:
            _Wrapping.direct_calls = before

    return run


def _of_wrapper(bound):
    """The arguments of `run_layer_test` for the layer in a `LossScaled`."""
    layer_cls, arguments = bound.arguments["layer_cls"], bound.arguments

    def make(**kwargs):
        return als.LossScaled(layer_cls(**kwargs))

    make.__name__ = layer_cls.__name__
    arguments["layer_cls"] = make
    if arguments["expected_num_trainable_weights"] is not None:
        arguments["expected_num_trainable_weights"] += 2
    if arguments["supports_masking"] is not None:
        arguments["supports_masking"] = True  # and asks the layer
    arguments["assert_built_after_instantiation"] = False
    return bound


def compare(
    layer_cls,
    init_kwargs,
    input_shape,
    input_dtype,
    input_sparse,
    input_ragged,
    input_data,
    call_kwargs,
    **_,
):
    """Asserts that a layer computes the same in a `LossScaled` one."""
    if input_data is None and input_shape is None:
        return
    keras.utils.set_random_seed(3)
    if input_data is None:
        if input_dtype is None:
            input_dtype = keras.tree.map_shape_structure(lambda _: "float32", input_shape)
        input_data = test_case.create_eager_tensors(
            input_shape, input_dtype, input_sparse, input_ragged
        )
    layer, call_kwargs = layer_cls(**(init_kwargs or {})), dict(call_kwargs or {})
    step = functools.partial(_step, input_data, layer)
    _call(layer, input_data, call_kwargs)  # builds it
    if not layer.trainable_variables:
        return
    modes = [call_kwargs]
    if layer._call_has_training_arg and "training" not in call_kwargs:
        modes.append({**call_kwargs, "training": True})
    scaled = als.LossScaled(layer)
    for kwargs in modes:
        expected = step(layer, kwargs)
        if any(not _same(a, b) for a, b in zip(expected, step(layer, kwargs), strict=True)):
            continue  # nor does the layer compute the same twice
        for r in SCALES:
            scaled.log2_scale = r
            for (name, a), (_, b) in zip(step(scaled, kwargs), expected, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"{name}, {kwargs}, log2_scale={r}")


def _same(a, b):
    return a[1] is b[1] or np.array_equal(a[1], b[1], equal_nan=np.asarray(a[1]).dtype.kind == "f")


def _step(data, layer, call, kwargs):
    """Pairs of a name and an array: all that a call computes, which is then undone."""
    weights = layer.trainable_variables
    leaves = keras.tree.flatten(data)
    floats = [leaf for leaf in map(_dense_float, leaves) if leaf is not None]

    def loss_of(*floats):
        remaining = iter(floats)
        filled = [x if _dense_float(x) is None else next(remaining) for x in leaves]
        given = keras.tree.pack_sequence_as(data, filled)
        outputs = _call(call, given, kwargs)
        numbers = [part for y in keras.tree.flatten(outputs) for part in dense_parts(y)[0]]
        loss = keras.ops.zeros(())
        for place, y in enumerate(numbers):
            if is_inexact_dtype(y.dtype):
                y = real_numbers(y)
                noise = np.random.default_rng(place).normal(size=y.shape).astype("float32")
                loss += keras.ops.sum(keras.ops.cast(y, "float32") * noise)
        return loss, (numbers, list(call.losses))

    state = [(v, v.numpy()) for v in _state_of(layer)]
    (_, (numbers, losses)), gradients = value_and_gradients(loss_of, weights, floats)
    after = [(v.path, v.numpy()) for v, _ in state]
    for variable, value in state:
        variable.assign(value)
    names = [*(f"gradient of {v.path}" for v in weights), *["gradient of an input"] * len(floats)]
    return [
        *(("output", _array(y)) for y in numbers),
        *zip(names, map(_array, gradients), strict=True),
        *(("added loss", _array(loss)) for loss in losses),
        *after,
    ]


def _call(call, data, kwargs):
    return call(**data, **kwargs) if isinstance(data, dict) else call(data, **kwargs)


def _state_of(layer):
    return list({id(v): v for v in [*layer.variables, *layer.metrics_variables]}.values())


def _dense_float(x):
    """`x` as a tensor, if it is a dense one of floating-point numbers."""
    if len(dense_parts(x)[0]) != 1 or not hasattr(x, "dtype"):
        return None
    return backend.convert_to_tensor(x) if is_inexact_dtype(x.dtype) else None


def _array(x):
    return None if x is None else np.array(backend.convert_to_numpy(x))
