"""`wrap_model` and `strip_model`: add and remove a loss scale for each layer."""

from collections.abc import Iterator
from typing import Any, TypeVar

import keras

from tf_adaptive_ls.backend.keras_internals import graph_of, nodes_of, parts_of
from tf_adaptive_ls.backend.layer_filter import LayerFilter, check_layer_filter, with_path
from tf_adaptive_ls.models.carry_over import compile_like
from tf_adaptive_ls.models.float8_layers import float8_layers
from tf_adaptive_ls.models.planned_model import scale, unscale
from tf_adaptive_ls.models.walk import Choice
from tf_adaptive_ls.training.float8.settings import Float8
from tf_adaptive_ls.training.layer_scaling import LayerScaling, check_saved_activations
from tf_adaptive_ls.training.loss_scaled import LossScaled
from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer

Model = TypeVar("Model", bound=keras.Model)


def wrap_model(
    model: Model,
    *,
    layer_filter: LayerFilter | None = None,
    float8: Float8 | None = None,
    plan: bool = True,
    saved_activations: str | None = None,
) -> Model:
    """Gives every layer with trainable weights its own loss scale.

    The model is changed in place and returned. Its class (by `isinstance`), attributes, methods,
    `train_step`, `compile`, layers, weights and names stay the same. Each scaled layer gets an
    attribute `loss_scaling`. Layers inside of nested models, and inside of your own layers, are
    scaled one by one; any other layer, such as `MultiHeadAttention`, is scaled as a whole. Layers
    that are built or created later are scaled when they are first called.

    If the model can be called on symbolic tensors, gradients travel between layers at the scales of
    the layers. Otherwise they return to the loss scale S between layers, and `scale_table` says
    why.

    A compiled model is compiled again, with an `AdaptiveLossScaleOptimizer` around a copy of its
    optimizer and the optimizer's state, unless the model's class overrides `compile`.

    ```python
    model = als.wrap_model(build_model())
    model.compile(als.AdaptiveLossScaleOptimizer("adam"), loss="mse", jit_compile=True)
    ```

    Args:
        model: Any `keras.Model`, built or not. Layers that are already scaled stay as they are.
        layer_filter: Function `layer -> bool` or `(layer, path) -> bool`. Layers for which it
            returns false are not scaled, and gradients pass them at the loss scale S. `path` is the
            name of the layer after the names of the models and layers that contain it, as in
            `scale_table`: `"encoder/dense_1"`.
        float8: A `Float8`, to compute matmuls and convolutions from float8 operands. Layers that
            are already scaled stay as they are.
        plan: Whether gradients may travel between layers at the scales of the layers.
        saved_activations: "float8_e5m2" to save only the inputs of layers for the backward pass,
            in 8 bits, and to compute the rest again there. The forward pass does not change.
            `None` saves what Keras saves.

    Returns:
        The model.

    Raises:
        ValueError: If an argument is not as described, or a layer cannot be scaled. The model is
            then unchanged.
    """
    check_is_model(model, "wrap_model")
    check_layer_filter(layer_filter, "wrap")
    check_saved_activations(saved_activations)
    in_float8 = set() if float8 is None else float8_layers(model, float8)
    choice = Choice(
        wants=with_path(layer_filter),
        float8_of=lambda layer, path: float8 if id(layer) in in_float8 else None,
        plans=plan,
        saved_activations=saved_activations,
    )
    scale(model, choice)
    _forget_functions(model)
    if model.compiled and not _is_compiled_for_layers(model):
        compile_like(model, model, AdaptiveLossScaleOptimizer)
    return model


def strip_model(model: Model) -> Model:
    """Undoes `wrap_model`: removes all scales from a model.

    The model is changed in place and returned: a plain Keras model with the current weights, which
    can be saved, exported and loaded without this library. A compiled model is compiled again, with
    a copy of the inner optimizer and its state.

    If the graph of the model contains `LossScaled` layers, the model is unchanged, and another
    model around the same layers is returned.

    ```python
    plain = als.strip_model(model)
    plain.save("plain.keras")
    ```

    Args:
        model: Any `keras.Model`.

    Returns:
        The plain model.

    Raises:
        ValueError: If `model` is not a model, or if it contains `LossScaled` layers outside of its
            graph and the graphs of nested models.
    """
    check_is_model(model, "strip_model")
    if any(isinstance(part, LossScaled) for part in parts_of(model)):
        return _without_wrappers(model)
    unscale(model)
    _forget_functions(model)
    if model.compiled and isinstance(model.optimizer, AdaptiveLossScaleOptimizer):
        compile_like(model, model, lambda inner_optimizer, initial_scale: inner_optimizer)
    return model


def _forget_functions(model: keras.Model) -> None:
    """Drops compiled steps, which would run as they were traced before."""
    for part in parts_of(model):
        if isinstance(part, keras.Model):
            part.train_function = part.test_function = part.predict_function = None


def _is_compiled_for_layers(model: keras.Model) -> bool:
    """Whether the optimizer is built with all scales, or not built yet."""
    optimizer = model.optimizer
    if not isinstance(optimizer, AdaptiveLossScaleOptimizer):
        return False
    scaled = {id(each) for each in parts_of(model) if isinstance(each, LayerScaling)}
    return not optimizer.built or scaled <= set(map(id, optimizer.scaled_layers))


def _without_wrappers(model: keras.Model) -> keras.Model:
    """A model around the same layers, without the `LossScaled` layers of the graph."""
    _check_has_them_in_graphs_alone(model)

    def plain(operation: Any) -> Any:
        if isinstance(operation, LossScaled):
            return operation.layer
        if isinstance(operation, keras.Model) and graph_of(operation) is not None:
            return _without_wrappers(operation)
        return operation

    unscale(model)
    if isinstance(model, keras.Sequential):
        layers = [model.inputs[0], *map(plain, model.layers)]
        result = type(model)(layers, trainable=model.trainable, name=model.name)
    else:
        # Of an uncompiled model, because cloning would compile it again.
        graph = keras.models.clone_model(
            keras.Model(model.input, model.output),
            input_tensors=model.input,
            clone_function=plain,
        )
        result = type(model)(graph.input, graph.output, name=model.name, trainable=model.trainable)
    if model.compiled:
        compile_like(model, result, lambda inner_optimizer, initial_scale: inner_optimizer)
    return result


def _check_has_them_in_graphs_alone(model: keras.Model) -> None:
    in_graphs = set(_wrappers_in_graphs(model))
    others = [p for p in parts_of(model) if isinstance(p, LossScaled) and id(p) not in in_graphs]
    if others:
        raise ValueError(
            "`strip_model` expected LossScaled layers only in the graph of the model and of "
            f"models nested in it. Received: model '{model.name}' (of type "
            f"{type(model).__name__}), which has others: {[each.name for each in others]}. Build "
            "it without them and copy its weights; `wrap_model` scales layers wherever they are, "
            "and can be undone."
        )


def _wrappers_in_graphs(model: keras.Model) -> Iterator[int]:
    """The `id` of each `LossScaled` layer in the graph of a model and of nested models."""
    graph = graph_of(model)
    for node in nodes_of(graph) if graph is not None else ():
        if isinstance(node.operation, keras.Model):
            yield from _wrappers_in_graphs(node.operation)
        yield id(node.operation)


def check_is_model(model: Any, function: str) -> None:
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`{function}` expected a keras.Model. Received: {model!r} (of type "
            f"{type(model).__name__}), which is not a model. Wrap a single layer with "
            "`LossScaled(layer)`."
        )
