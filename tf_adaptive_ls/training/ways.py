"""Replaces the `call` of a layer within a context."""

import contextlib
import contextvars
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras

from tf_adaptive_ls.backend import routes

# Replacements of `call` by the `id` of the layer.
_ways: contextvars.ContextVar[Mapping[int, Callable[..., Any]]] = contextvars.ContextVar(
    "ways_of_computing", default=types.MappingProxyType({})
)


def way_of_computing(layer: keras.layers.Layer, call: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of `call` in the current context, or `call` itself."""
    return _ways.get().get(id(layer), call)


@contextlib.contextmanager
def computing(ways: list[tuple[keras.layers.Layer, Callable[..., Any]]]) -> Iterator[None]:
    """Context manager in which layers use another `call`.

    Args:
        ways: List of pairs of a layer and the function that replaces its `call`.
    """
    for layer, _ in ways:
        if routes.route_of(layer, "call") is None:
            # The route stays after the context, because a call in another thread may be using it.
            routes.Route(layer, "call", functools.partial(_run, layer))
    token = _ways.set({**_ways.get(), **{id(layer): way for layer, way in ways}})
    try:
        yield
    finally:
        _ways.reset(token)


def has_own_call(layer: keras.layers.Layer, layer_class: Any) -> bool:
    """Whether a subclass or the layer itself overrides the `call` of `layer_class`."""
    is_set = "call" in vars(layer) and routes.route_of(layer, "call") is None
    return is_set or layer.__class__.call is not layer_class.call


def _run(
    layer: keras.layers.Layer,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    return way_of_computing(layer, original)(*args, **kwargs)
