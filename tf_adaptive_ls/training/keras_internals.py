"""Every private of Keras that this library uses, each with the reason why.

`LossScaled` besides overrides `_maybe_build` and `_open_name_scope`, without which a wrapped
layer would be built at another time, and its weights be found under other paths.
`tests/training/test_keras_internals.py` tells what a new Keras has changed.
"""

import contextlib

import keras
from keras.src.backend.common import masking


def parts_of(layer):
    """A layer and all layers inside it, at any depth.

    `layer.layers` is only there for models, and only one level deep.
    """
    return list(layer._flatten_layers())


def graph_of(model):
    """The Functional graph that a model runs, or `None`.

    A Sequential model runs a Functional one that it makes, and shows it to nobody.
    """
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if hasattr(model, "_nodes_by_depth") else None


def nodes_of(graph):
    """The calls in a Functional graph, in an order in which they can be run.

    Layers know only all their calls, in whatever graph, in `_inbound_nodes`; a graph shows
    its layers, but neither its calls nor the operations between layers.
    """
    return [
        node
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
        if not node.is_input
    ]


def _no_mode(layer: keras.layers.Layer) -> None:
    return None


def _take_no_mode(layer: keras.layers.Layer, mode: object) -> None:
    pass


# The mode of what Keras shall not run once more in the backward pass, in whatever
# `keras.RematScope` it is made. A layer takes over the mode of that scope, and has no argument.
NEVER_REMATERIALISED = property(_no_mode, _take_no_mode)


def is_rematerialised(layer, args, kwargs):
    """Whether Keras would run a call of a layer once more in the backward pass.

    As the `keras.RematScope` has it that it was made in, which it does not show. That of an
    activation alone, which takes all that it needs as arguments, does not count.
    """

    def call():
        pass

    modes = [(part, part._remat_mode) for part in parts_of(layer)]
    modes = [(part, mode) for part, mode in modes if mode and mode.mode != "activations"]
    return any(
        mode.mode == "full"
        or part.name in mode.layer_names
        or (part is layer and part.rematerialized_call(call, *args, **kwargs) is not call)
        for part, mode in modes
    )


@contextlib.contextmanager
def not_rematerialised(layer):
    """Keeps Keras from running a layer, or layers inside it, once more in the backward pass."""
    modes = [(part, part._remat_mode) for part in parts_of(layer)]
    modes = [(part, mode) for part, mode in modes if mode and mode.mode != "activations"]
    for part, _ in modes:
        part._remat_mode = None
    try:
        yield
    finally:
        for part, mode in modes:
            part._remat_mode = mode


@contextlib.contextmanager
def computing_in_float32(model):
    """Makes all layers of a model that compute in less than float32 compute in that.

    The setter of `dtype_policy` would write to a policy that layers share, a `DTypePolicyMap`,
    and cannot undo a quantised one.
    """
    policies = [(part, part._dtype_policy) for part in parts_of(model)]
    try:
        for part, policy in policies:
            if policy.compute_dtype in ("float16", "bfloat16"):
                part._dtype_policy = keras.DTypePolicy("float32")
        yield
    finally:
        for part, policy in policies:
            part._dtype_policy = policy


def build_for_call(layer, call_spec):
    """Builds a layer as a call of it would, whatever signature its `build` has.

    `layer.build` wants to be told shapes by the names that it gives its arguments.
    """
    layer._maybe_build(call_spec)


def drop_losses(layer):
    """Makes a layer forget the losses that its call has added.

    Keras's trainers do it once per step, for the whole model.
    """
    layer._clear_losses()


def allow_any_positional_arguments(layer):
    """Lets a layer be called by position with what is not a tensor.

    Keras's own wrappers that take `*args`, and `Layer` for its subclasses, use a flag.
    """
    layer._allow_non_tensor_positional_args = True


def own_value(variable):
    """The value of a variable in no scope, `None` if it has none yet.

    Inside a scope, asking for `value` asks the scope, and would make one.
    """
    return variable._value


def mask_of(tensor):
    """The Keras mask of a tensor, or `None`.

    An attribute where tensors have attributes; JAX's have none, and Keras a table.
    """
    return masking.get_keras_mask(tensor)


def set_mask(tensor, mask):
    """Gives a tensor a Keras mask, see `mask_of`."""
    masking.set_keras_mask(tensor, mask)


def arguments_of_compile(model):
    """What `compile` was called with, a dict.

    `get_compile_config` gives the same serialized, which not every loss can be.
    """
    return dict(model._compile_config.config)


def variables_built_for(optimizer):
    """The variables that an optimizer was built for, in its order."""
    return list(optimizer._trainable_variables)
