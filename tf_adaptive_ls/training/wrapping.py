"""`wrap_model` and `strip_model`: a model with a loss scale per layer, and back."""

import collections
import functools
import math
import warnings
from typing import TypeVar

import keras

from tf_adaptive_ls.numerics import backend
from tf_adaptive_ls.numerics.float_format import is_narrow_dtype
from tf_adaptive_ls.training import scale_plan
from tf_adaptive_ls.training.call_tensors import CallTensors
from tf_adaptive_ls.training.float8 import Float8
from tf_adaptive_ls.training.keras_internals import (
    NEVER_REMATERIALISED,
    arguments_of_compile,
    graph_of,
    is_all_config,
    may_be_trained,
    nodes_of,
    own_weights,
    parts_of,
    variables_built_for,
)
from tf_adaptive_ls.training.layer_filter import LayerFilter, check_layer_filter, with_path
from tf_adaptive_ls.training.loss_scaled import LossScaled, is_of_scaling, release, wrapper_of
from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer
from tf_adaptive_ls.training.planning import plan_of
from tf_adaptive_ls.training.products import products_in
from tf_adaptive_ls.training.saved_config import opened, stamped

Model = TypeVar("Model", bound=keras.Model)


def wrap_model(
    model: Model, *, layer_filter: LayerFilter | None = None, float8: Float8 | None = None
) -> Model:
    """Gives every layer with trainable weights a loss scale of its own.

    The result is a model of the same class around the same layers: weights and
    inputs are shared with `model`, outputs and names are as there. It runs its
    graph under a scale plan (see `scale_plan`), also after saving and loading. A
    compiled model comes back compiled, with an `AdaptiveLossScaleOptimizer` around
    a copy of its optimizer and of that one's state, unless its class has a
    `compile` of its own.

    Layers that are wrapped already, in `model` or in another model, keep their
    wrapper. Nested Functional and Sequential models are wrapped in turn, any other
    layer as a whole. A nested one whose class builds its graph in a constructor of its
    own, such as a backbone of KerasHub, becomes a plain Functional or Sequential model.

    Args:
        model: A Functional model or a built Sequential model.
        layer_filter: Function `layer -> bool` or `(layer, path) -> bool`. Layers for
            which it is false are not wrapped; gradients pass them at the optimizer's
            loss scale. `path` is the layer's name, behind those of the models that it is
            nested in, as in `scale_table`: `"encoder/dense_1"`.
        float8: A `Float8`, to compute matrix products and convolutions from numbers of 8
            bits. Layers that keep a wrapper keep what that has.

    Returns:
        The wrapped model. `model` is left as it was.

    Raises:
        ValueError: If `model` is anything else.
    """
    _check_is_graph(model, "wrap_model")
    check_layer_filter(layer_filter, "wrap")
    in_float8 = _layers_for_float8(model, float8)
    wants = with_path(layer_filter)

    def wrapped(operation, path):
        if not isinstance(operation, keras.layers.Layer) or isinstance(operation, LossScaled):
            return operation
        if not may_be_trained(operation):
            return _fresh_if_stateless(operation)
        if _class_of_graph(operation) is not None:
            return rebuilt(operation, f"{path}/")
        if not wants(operation, path):
            left_out.append(operation.name)
            return operation
        if wrapper_of(operation) is None:
            LossScaled(operation, float8=float8 if id(operation) in in_float8 else None)
            newly_wrapped.append(operation)
        return wrapper_of(operation)

    def rebuilt(model, prefix=""):
        planned_class = _planned_class(_class_of_copy(model))
        return _rebuilt(model, lambda each: converted(each, prefix), planned_class)

    newly_wrapped: list[keras.layers.Layer] = []
    left_out: list[str] = []
    converted = _once_per_operation(wrapped)
    try:
        result = rebuilt(model)
        result.left_out = tuple(left_out)
        if model.compiled:
            _compile_like(model, result, AdaptiveLossScaleOptimizer)
    except Exception:
        for layer in newly_wrapped:
            release(layer)
        raise
    return result


def strip_model(model: keras.Model) -> keras.Model:
    """Takes all `LossScaled` layers out of a model again.

    The result is a plain Keras model around the same layers, with the weights as
    they are: it can be saved, exported and loaded without this library. If `model`
    is compiled so is the result, with a copy of the inner optimizer and its state.

    Args:
        model: A Functional model or a built Sequential model.

    Returns:
        The plain model. `model` is left as it was.

    Raises:
        ValueError: If `model` is anything else, or if a layer other than a nested
            model uses `LossScaled` layers inside.
    """
    _check_is_graph(model, "strip_model")

    def stripped(operation, path):
        if isinstance(operation, LossScaled):
            operation = operation.layer
        elif _class_of_graph(operation) is not None:
            return rebuilt(operation)
        if not isinstance(operation, keras.layers.Layer):
            return operation
        _check_has_none_inside(operation)
        return _fresh_if_stateless(operation)

    def rebuilt(model):
        return _rebuilt(model, lambda each: converted(each, ""), _class_of_copy(model))

    converted = _once_per_operation(stripped)
    result = rebuilt(model)
    if model.compiled:
        _compile_like(model, result, lambda inner_optimizer, initial_scale: inner_optimizer)
    return result


def _layers_for_float8(model, float8):
    """By `id` the layers of a model that are to compute in float8."""
    if float8 is None:
        return set()
    if not isinstance(float8, Float8):
        raise ValueError(
            f"Expected `float8` to be a Float8. Received: float8={float8!r} (of type "
            f"{type(float8).__name__}). Use for example Float8()."
        )
    candidates = list(_with_products(model, ""))
    if float8.layer_filter is None:
        # Mellempudi et al. 2019: input and output need more precision.
        candidates = candidates[1:-1]
    wants = with_path(float8.layer_filter)
    chosen = {id(layer) for layer, path in candidates if wants(layer, path)}
    if not chosen:
        raise ValueError(
            "Expected a model with layers to compute in float8: Dense, EinsumDense or convolution "
            f"layers, or such with them inside. Received: model '{model.name}', in which "
            + (
                "there are none but the first and the last. Choose those with `layer_filter`."
                if float8.layer_filter is None
                else "`layer_filter` chooses none."
            )
        )
    return chosen


def _with_products(model, prefix):
    """Layers with products and their paths, once each, in the order that `model` runs them."""
    found = {}
    for node in nodes_of(graph_of(model)):
        operation = node.operation
        path = prefix + operation.name
        if _class_of_graph(operation) is not None:
            found.update(
                (id(each), (each, at)) for each, at in _with_products(operation, f"{path}/")
            )
        elif isinstance(operation, keras.layers.Layer) and products_in(operation):
            found.setdefault(id(operation), (operation, path))
    return found.values()


_registered = keras.saving.register_keras_serializable("tf_adaptive_ls", "LossScaledModel")


@_registered
class LossScaledModel:
    """Mixin for models that run their graph under its scale plan.

    There is one subclass for every class of model, but all are saved under this
    name: it is the only one that is sure to be registered when a file is loaded.
    """

    base_class = None
    # The names of layers that a filter left out when the model was wrapped.
    left_out: tuple[str, ...] = ()
    _plan = None
    # In the backward pass its plan would not hold. Its layers are, each by itself.
    _remat_mode = NEVER_REMATERIALISED

    def call(self, inputs, training=None, mask=None, **kwargs):
        if scale_plan.is_covered(self):
            return super().call(inputs, training=training, mask=mask, **kwargs)
        if self._plan is None or not self._plan.is_current():
            self._plan = plan_of(self)
        from_inputs = backend.is_differentiated(CallTensors(inputs).tensors)
        with scale_plan.running(self._plan, from_inputs):
            return super().call(inputs, training=training, mask=mask, **kwargs)

    def count_params(self):
        return sum(math.prod(v.shape) for v in self.weights if not is_of_scaling(v))

    @property
    def _collected_trainable_weights(self):
        # What `summary` counts, if a model has it.
        return [v for v in self.trainable_weights if not is_of_scaling(v)]

    def make_train_function(self, force=False):
        known = isinstance(self.optimizer, AdaptiveLossScaleOptimizer)
        if not known and any(getattr(each, "float8", None) for each in parts_of(self)):
            raise ValueError(
                "Expected a model with layers that compute in float8 to be compiled with "
                "AdaptiveLossScaleOptimizer: at no other scales are their gradients in the range "
                f"of 8 bits. Received: model '{self.name}' with {type(self.optimizer).__name__}."
            )
        if not known and (self.train_function is None or force):
            warnings.warn(
                f"Model '{self.name}' has LossScaled layers, but is compiled with "
                f"{type(self.optimizer).__name__}, which leaves their scales at 1. "
                "Compile it with AdaptiveLossScaleOptimizer.",
                stacklevel=3,
            )
        if known and (self.train_function is None or force):
            self._name_layers_without_scale()
        num_replicas = backend.num_replicas_of(self)
        if known and self.jit_compile and num_replicas > 1:
            raise ValueError(
                "Expected `jit_compile=False` for a model on several devices: XLA compiles a "
                "step for one, and the variables of the others are out of its reach. Received: "
                f"jit_compile=True for model '{self.name}' on {num_replicas}. Compile it with "
                "`jit_compile=False`."
            )
        if known and num_replicas == 1:
            # TensorFlow traces a function that makes variables twice.
            self.optimizer.build_once(self.trainable_variables)
        return super().make_train_function(force)

    def _name_layers_without_scale(self):
        scaled = {
            id(part)
            for each in parts_of(self)
            if isinstance(each, LossScaled)
            for part in parts_of(each)
        }
        without = [
            part.name
            for part in parts_of(self)
            if id(part) not in scaled
            and part.name not in self.left_out
            and any(v.trainable for v in own_weights(part))
            and is_narrow_dtype(part.compute_dtype)
        ]
        if without:
            warnings.warn(
                f"Layers of model '{self.name}' are trained that have no loss scale of their own: "
                f"{', '.join(without)}. Wrap the model once more: `wrap_model(model)` leaves the "
                "scales that there are.",
                stacklevel=4,
            )

    def quantize(self, *args, **kwargs):
        in_float8 = [each.name for each in parts_of(self) if getattr(each, "float8", None)]
        if in_float8:
            raise ValueError(
                f"Expected model '{self.name}' to be quantised once. Received: `quantize` for a "
                f"model with LossScaled layers that compute in float8 already: {in_float8}. "
                "`strip_model` it before, or leave `float8` out."
            )
        return super().quantize(*args, **kwargs)

    def load_weights(self, filepath, *args, **kwargs):
        """As in Keras, but a file that cannot be read leaves the model as it was."""
        optimizer = getattr(self, "optimizer", None)
        variables = [*self.variables, *(optimizer.variables if optimizer else ())]
        before = [(variable, backend.lasting_value(variable)) for variable in variables]
        try:
            super().load_weights(filepath, *args, **kwargs)
        except Exception:
            for variable, value in before:
                # Processes of JAX assign together: not where but one of them has failed.
                if variable.value is not value:
                    variable.assign(value)
            raise

    def get_config(self):
        base_class = keras.saving.get_registered_name(self.base_class)
        config = stamped({**super().get_config(), "base_class": base_class})
        return config | {"left_out": list(self.left_out)} if self.left_out else config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        if cls.base_class is not None:
            config = dict(config)
            left_out = config.pop("left_out", ())
            model = super().from_config(config, custom_objects=custom_objects)
            model.left_out = tuple(left_out)
            return model
        config = opened(config, "wrapped model", ["base_class"], optional=None)
        name = config.pop("base_class")
        known = {"Functional": _functional_class(), "Sequential": keras.Sequential}
        base_class = known.get(name) or keras.saving.get_registered_object(name, custom_objects)
        if base_class is None:
            raise ValueError(
                f"Expected the class '{name}' of the saved model to be known. Received: "
                "no class registered under that name. Decorate it with "
                "`keras.saving.register_keras_serializable`, or name it in "
                "`custom_objects`."
            )
        return _planned_class(base_class).from_config(config, custom_objects=custom_objects)


@functools.cache
def _planned_class(base_class):
    """The class of wrapped models of `base_class`."""
    name = f"LossScaled{base_class.__name__}"
    planned_class = type(name, (LossScaledModel, base_class), {"base_class": base_class})
    # The name stands for the subclass when saving, for the mixin when loading.
    _registered(planned_class)
    _registered(LossScaledModel)
    return planned_class


def _plain_class(model):
    return getattr(model, "base_class", type(model))


def _class_of_graph(operation):
    """Functional or Sequential, if `operation` is a model that runs its graph as those do."""
    if not isinstance(operation, keras.Model) or graph_of(operation) is None:
        return None
    sequential = isinstance(operation, keras.Sequential)
    known = keras.Sequential if sequential else _functional_class()
    return known if _plain_class(operation).call is known.call else None


def _class_of_copy(model):
    """The class that a copy of the graph of `model` is made with."""
    plain, known = _plain_class(model), _class_of_graph(model)
    return plain if plain.__init__ is known.__init__ else known


@functools.cache
def _functional_class():
    """The class of Functional models, which Keras does not export."""
    tensor = keras.Input(())
    return type(keras.Model(tensor, keras.layers.Identity()(tensor)))


def _once_per_operation(convert):
    """`convert`, but shared layers stay shared."""
    results = {}

    def converted(operation, prefix):
        if id(operation) not in results:
            results[id(operation)] = convert(operation, prefix + operation.name)
        return results[id(operation)]

    return converted


def _rebuilt(model, converted, model_class):
    """A `model_class` with the graph of `model`, each operation `converted`."""
    if isinstance(model, keras.Sequential):
        layers = [model.inputs[0], *map(converted, model.layers)]
        return model_class(layers, trainable=model.trainable, name=model.name)
    # By way of an uncompiled model, since cloning would compile anew.
    graph = keras.models.clone_model(
        keras.Model(model.input, model.output),
        input_tensors=model.input,
        clone_function=converted,
    )
    return model_class(graph.input, graph.output, name=model.name, trainable=model.trainable)


def _fresh_if_stateless(layer):
    """A layer like `layer`, if its config is known to be all there is to it, or `layer` itself.

    So that `layer.output` of a layer of the result belongs to the result's graph.
    """
    if not is_all_config(layer):
        return layer
    return type(layer).from_config(layer.get_config())


def _compile_like(model, result, make_optimizer):
    """Compiles `result` as `model` is, with a copy of its optimizer and its state."""
    if type(model).compile is not keras.Model.compile:
        return  # only its author knows what it takes
    config = arguments_of_compile(model)
    optimizer, loss_scale = model.optimizer, 2.0**15
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        if optimizer.built:
            loss_scale = 2.0 ** math.floor(math.log2(float(optimizer.dynamic_scale.numpy())))
        optimizer = optimizer.inner_optimizer
    if optimizer is None:
        result.compile(**config)
        return
    copy = type(optimizer).from_config(optimizer.get_config())
    result.compile(**{**config, "optimizer": make_optimizer(copy, initial_scale=loss_scale)})
    if optimizer.built:
        # A twin of the old optimizer tells what each of its variables is for.
        twin = type(optimizer).from_config(optimizer.get_config())
        roles = _roles_of_variables(twin, lambda: twin.build(variables_built_for(optimizer)))
        values = dict(zip(roles, optimizer.variables, strict=True))
        roles = _roles_of_variables(
            copy, lambda: result.optimizer.build(result.trainable_variables)
        )
        for role, variable in zip(roles, copy.variables, strict=True):
            if role in values:
                # JAX gives the memory of variables away when it trains: no two may share it.
                variable.assign(keras.ops.copy(values[role]))


def _roles_of_variables(optimizer, build):
    """Builds an optimizer, and tells what each of its variables is for.

    Returns:
        A list of pairs, one for each of `optimizer.variables`: the `id` of the weight
        that it belongs to, or `None`; and how many before it belong to the same.
    """
    weight_of = {}
    add = optimizer.add_variable_from_reference

    def recording(reference_variable, *args, **kwargs):
        variable = add(reference_variable, *args, **kwargs)
        weight_of[id(variable)] = id(reference_variable)
        return variable

    optimizer.add_variable_from_reference = recording
    try:
        build()
    finally:
        del optimizer.add_variable_from_reference
    counts = collections.Counter()
    roles = []
    for variable in optimizer.variables:
        weight = weight_of.get(id(variable))
        roles.append((weight, counts[weight]))
        counts[weight] += 1
    return roles


def _check_is_graph(model, function):
    reason = _why_not_a_graph(model)
    if reason is not None:
        raise ValueError(
            f"`{function}` expected a Functional or a built Sequential model. "
            f"Received: {model!r} (of type {type(model).__name__}), {reason}"
        )


def _why_not_a_graph(model):
    """What keeps `model` from being rebuilt from its graph, `None` if nothing does."""
    if not isinstance(model, keras.Model):
        return "which is not a model. Wrap a single layer with `LossScaled(layer)`."
    plain, functional = _plain_class(model), _functional_class()
    if isinstance(model, keras.Sequential):
        if graph_of(model) is None:
            return (
                "which has no graph yet. Start it with a `keras.Input`, or call "
                "`model.build(input_shape)`, first."
            )
        known_call, signature = keras.Sequential.call, keras.Sequential.__init__
    elif isinstance(model, functional):
        known_call, signature = functional.call, functional.__init__
    else:
        return (
            "which is a subclassed model and has no graph. Wrap its layers where you "
            "create them, in `__init__`: `self.dense = LossScaled(keras.layers.Dense(8))`."
        )
    if plain.call is not known_call or plain.__init__ is not signature:
        return (
            f"whose class {plain.__name__} has a `call` or `__init__` of its own, which a "
            "copy of its graph would not follow. Wrap its layers where you create them, "
            "or wrap `keras.Model(model.input, model.output)`."
        )
    return None


def _check_has_none_inside(layer):
    inside = [each.name for each in parts_of(layer) if isinstance(each, LossScaled)]
    if inside:
        raise ValueError(
            "`strip_model` expected LossScaled layers only in the graph of the model and of "
            f"models nested in it. Received: layer '{layer.name}' (of type "
            f"{type(layer).__name__}), which has some inside: {inside}. Build that layer "
            "without them and copy its weights."
        )
