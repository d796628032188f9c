"""The class of wrapped models: what it remembers, and how it is saved."""

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras

from tf_adaptive_ls.backend import keras_internals, routes, trainer
from tf_adaptive_ls.backend.keras_internals import WithHiddenVariables, may_be_trained, parts_of
from tf_adaptive_ls.models.found_optimizers import adaptive_optimizers
from tf_adaptive_ls.models.planned_call import planned_call_of
from tf_adaptive_ls.models.walk import Choice, Walk
from tf_adaptive_ls.training.companion import companion_of, detach
from tf_adaptive_ls.training.float8.settings import Float8
from tf_adaptive_ls.training.layer_scaling import LayerScaling, is_of_scaling
from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer
from tf_adaptive_ls.training.saved_bytes import forget_saved
from tf_adaptive_ls.training.saved_config import (
    WITH_WRAPPERS,
    checked_config,
    is_with_wrappers,
    with_version,
)

_registered = keras.saving.register_keras_serializable("tf_adaptive_ls", "LossScaledModel")
_WALK = "_walk_of_model"


def _rounds_at_its_scale(part: Any) -> bool:
    return isinstance(part, LayerScaling) and part.operand_format is not None


@_registered
class LossScaledModel(WithHiddenVariables):
    """Mixin of wrapped models.

    For each class of model there is one subclass of the mixin and that class. A model gets this
    subclass when it is wrapped, and its own class again when it is stripped. All subclasses are
    saved under the name of the mixin, because only this name is certain to be registered when a
    file is loaded.
    """

    base_class: Any = None
    # Whether it was loaded from a file whose graph contains `LossScaled` layers.
    is_with_wrappers = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Copies that Keras makes of a wrapped model are plain.
        return cls.base_class(*args, **kwargs)

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        # TensorFlow's trainer differentiates by these.
        weights = super().trainable_weights
        known = set(map(id, weights))
        of_scaling = [v for v in self.trainable_variables if is_of_scaling(v)]
        return [*weights, *(v for v in of_scaling if weights and id(v) not in known)]

    def count_params(self) -> int:
        return sum(math.prod(v.shape) for v in self.weights if not is_of_scaling(v))

    @property
    def shown_trainable_weights(self) -> list[keras.Variable]:
        return [v for v in self.trainable_weights if not is_of_scaling(v)]

    def make_train_function(self, force: bool = False) -> Callable[..., Any] | None:
        find_layers(self)
        known = isinstance(self.optimizer, AdaptiveLossScaleOptimizer)
        # A user-defined `compile` may leave Keras's default optimizer in `self.optimizer`.
        adaptive = known or bool(adaptive_optimizers(self))
        if not adaptive and any(_rounds_at_its_scale(each) for each in parts_of(self)):
            raise ValueError(
                "Expected a model with layers that compute in float8 to be compiled with "
                "AdaptiveLossScaleOptimizer, without which gradients are outside of the range of "
                f"float8. Received: model '{self.name}' with {type(self.optimizer).__name__}."
            )
        if not adaptive and (self.train_function is None or force):
            warnings.warn(
                f"Model '{self.name}' has LossScaled layers, but is compiled with "
                f"{type(self.optimizer).__name__}, which leaves their scales at 1. "
                "Compile it with AdaptiveLossScaleOptimizer.",
                stacklevel=3,
            )
        num_replicas = trainer.num_replicas_of(self)
        if known and self.jit_compile and num_replicas > 1:
            raise ValueError(
                "Expected `jit_compile=False` for a model on several devices: XLA compiles a "
                "step for one device, and cannot use the variables of others. Received: "
                f"jit_compile=True for model '{self.name}' on {num_replicas}. Compile it with "
                "`jit_compile=False`."
            )
        if known and num_replicas == 1 and all(part.built for part in parts_of(self)):
            # TensorFlow would trace the step twice if it created variables.
            self.optimizer.build_once(self.trainable_variables)
        return super().make_train_function(force)

    def load_weights(self, filepath: str, *args: Any, **kwargs: Any) -> None:
        """Loads weights as Keras does. If the file cannot be read, the model is unchanged."""
        optimizer = getattr(self, "optimizer", None)
        variables = [*self.variables, *(optimizer.variables if optimizer else ())]
        before = [(variable, trainer.lasting_value(variable)) for variable in variables]
        try:
            super().load_weights(filepath, *args, **kwargs)
        except Exception:
            for variable, value in before:
                # On JAX, all processes must assign together, but this process may be the only one
                # whose load failed.
                if variable.value is not value:
                    variable.assign(value)
            raise

    def build_from_config(self, config: dict[str, Any]) -> None:
        super().build_from_config(config)
        find_layers(self)

    def __reduce__(self) -> Any:
        # Keras would refer to a method of this class, which pickle cannot find.
        return keras_internals.unpickled_model, super().__reduce__()[1]

    def get_config(self) -> dict[str, Any]:
        registered = keras.saving.get_registered_name(self.base_class)
        walked = vars(self)[_WALK]
        config = {**super().get_config(), "base_class": registered}
        config |= walked.walk.config(walked.path)
        return (
            with_version(config, WITH_WRAPPERS) if self.is_with_wrappers else with_version(config)
        )

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> keras.Model:
        with_wrappers = is_with_wrappers(config)
        config = checked_config(config, "wrapped model", ["base_class"], optional=None)
        choice = _choice_of(config)
        if with_wrappers:  # in such a file, the scaled layers are already wrapped
            choice = dataclasses.replace(choice, wants=lambda layer, path: False)
        name = config.pop("base_class")
        known = {"Functional": functional_class(), "Sequential": keras.Sequential}
        base_class = known.get(name) or keras.saving.get_registered_object(name, custom_objects)
        if base_class is None:
            raise ValueError(
                f"Expected the class '{name}' of the saved model to be known. Received: "
                "no class registered under that name. Decorate it with "
                "`keras.saving.register_keras_serializable`, or name it in "
                "`custom_objects`."
            )
        with keras.saving.custom_object_scope(custom_objects or {}):
            model = base_class.from_config(config)
        # A copy that Keras makes stays plain.
        return model if cls.base_class is not None else scale(model, choice, with_wrappers)


@dataclasses.dataclass(frozen=True)
class _Walked:
    """The `Walk` that wrapped a model, the model's path in it, and a function to undo it."""

    walk: Walk
    path: str
    undo: Callable[[], None]


@functools.cache
def _planned_class(base_class: Any, with_wrappers: bool) -> type:
    """The class of wrapped models of class `base_class`."""

    def get_config(self: Any) -> dict[str, Any]:
        return LossScaledModel.get_config(self)

    # Keras creates a config automatically only for classes that do not define `get_config`.
    vars(get_config).update(vars(base_class.get_config))
    names = {name: getattr(base_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = {**names, "base_class": base_class, "get_config": get_config}
    members["is_with_wrappers"] = with_wrappers
    if hasattr(base_class, "save_to_preset"):
        members["save_to_preset"] = _save_to_preset
    # Files name the variables of a nested model after its class.
    name = f"LossScaled{base_class.__name__}" if with_wrappers else base_class.__name__
    planned_class = type(name, (LossScaledModel, base_class), members)
    # The registered name refers to the subclass for saving, and to the mixin for loading.
    _registered(planned_class)
    _registered(LossScaledModel)
    return planned_class


def scale(model: keras.Model, choice: Choice, with_wrappers: bool = False) -> keras.Model:
    """Scales all layers of a model in place. If it fails, the model is unchanged.

    Args:
        model: A `keras.Model`. Layers that are already scaled stay as they are.
        choice: The `Choice`.
        with_wrappers: Whether the graph of the model contains `LossScaled` layers, as in old files.

    Returns:
        The model.
    """
    walk = Walk(choice, functools.partial(exchange, with_wrappers=with_wrappers))
    try:
        walk.visit(model, is_root=True)
        find_layers(model)
    except Exception:
        walk.undo()
        raise
    return model


def unscale(model: keras.Model) -> None:
    """Undoes `scale`."""
    for part in parts_of(model):
        if planned_call_of(part) is not None:
            planned_call_of(part).undo()
        if companion_of(part) is not None:
            detach(part)
        if isinstance(part, LossScaledModel):
            vars(part)[_WALK].undo()
        forget_saved(part)
        for name in ("call", "rematerialized_call", keras_internals.MOMENTS):
            route = routes.route_of(part, name)
            if route is not None:
                route.end()  # companions inside of layers that have already run


def find_layers(model: keras.Model) -> None:
    """Scales layers that were added to a model after it was wrapped."""
    for part in parts_of(model):
        if planned_call_of(part) is not None:
            planned_call_of(part).find_layers()
    for part in parts_of(model):
        companion = companion_of(part)
        if companion is not None and part.built and may_be_trained(part):
            companion.start()


@contextlib.contextmanager
def without_companions(model: keras.Model) -> Iterator[None]:
    """Context manager in which layers have no companions.

    Keras's `quantize` skips layers that have sublayers.
    """
    companions = [each for each in map(companion_of, parts_of(model)) if each is not None]
    for companion in companions:
        companion.leave()
    try:
        yield
    finally:
        for companion in companions:
            companion.join()


@contextlib.contextmanager
def as_plain(model: keras.Model) -> Iterator[None]:
    """Context manager in which a model is as it was before it was wrapped."""
    exchanged = [
        (part, type(part)) for part in parts_of(model) if isinstance(part, LossScaledModel)
    ]
    with without_companions(model):
        for part, planned_class in exchanged:
            object.__setattr__(part, "__class__", planned_class.base_class)
        try:
            yield
        finally:
            for part, planned_class in exchanged:
                object.__setattr__(part, "__class__", planned_class)


def _save_to_preset(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Saves a KerasHub preset of the plain model, which loads without this library."""
    with as_plain(self):
        return self.save_to_preset(*args, **kwargs)


def _choice_of(config: dict[str, Any]) -> Choice:
    """Removes the `Choice` from the config of a wrapped model, and returns it."""
    left_out = set(config.pop("left_out", ()))
    float8 = {path: Float8.from_config(each) for path, each in config.pop("float8", {}).items()}
    return Choice(
        wants=lambda layer, path: path not in left_out,
        float8_of=lambda layer, path: float8.get(path),
        plans=config.pop("plan", True),
        saved_activations=config.pop("saved_activations", None),
    )


def exchange(
    model: keras.Model, walk: Walk, path: str, with_wrappers: bool
) -> Callable[[], None] | None:
    """Gives a model the class of wrapped models, and returns a function that undoes it."""
    plain_class: Any = type(model)
    if issubclass(plain_class, LossScaledModel):
        return None

    def quantize(
        original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        in_float8 = [each.name for each in parts_of(model) if getattr(each, "float8", None)]
        if in_float8:
            raise ValueError(
                f"Expected model '{model.name}' to be quantized once. Received: `quantize` for a "
                f"model with LossScaled layers that compute in float8 already: {in_float8}. "
                "`strip_model` it before, or leave `float8` out."
            )
        with without_companions(model):
            return original(*args, **kwargs)

    def undo() -> None:
        route.end()
        object.__setattr__(model, "__class__", plain_class)
        del vars(model)[_WALK]

    # Bypass Keras's tracking of a model's attributes.
    object.__setattr__(model, "__class__", _planned_class(plain_class, with_wrappers))
    object.__setattr__(model, _WALK, _Walked(walk, path, undo))
    route = routes.Route(model, "quantize", quantize)  # Keras gives every layer its own
    return undo


@functools.cache
def functional_class() -> type:
    """The class of Functional models, which has no public name in Keras."""
    tensor = keras.Input(())
    return type(keras.Model(tensor, keras.layers.Identity()(tensor)))
