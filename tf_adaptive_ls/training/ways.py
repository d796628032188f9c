"""Replaces the `call` of a layer within a context."""

import contextlib
import contextvars
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras

from tf_adaptive_ls.backend import routes

# By the `id` of the layer; all others compute as ever.
_ways: contextvars.ContextVar[Mapping[int, Callable[..., Any]]] = contextvars.ContextVar(
    "ways_of_computing", default=types.MappingProxyType({})
)


def way_of_computing(layer: keras.layers.Layer, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, or what stands for it in the running context."""
    return _ways.get().get(id(layer), call)


@contextlib.contextmanager
def computing(ways: list[tuple[keras.layers.Layer, Callable[..., Any]]]) -> Iterator[None]:
    """Makes layers compute in another way.

    Args:
        ways: List of pairs of a layer and what stands for its `call`.
    """
    for layer, _ in ways:
        if routes.route_of(layer, "call") is None:
            # It is left there, since taking it away would take it from a call that runs meanwhile.
            routes.Route(layer, "call", functools.partial(_run, layer))
    token = _ways.set({**_ways.get(), **{id(layer): way for layer, way in ways}})
    try:
        yield
    finally:
        _ways.reset(token)


def has_own_call(layer: keras.layers.Layer, layer_class: Any) -> bool:
    """Whether a layer has a `call` that is not that of a class, but of its own class or itself."""
    is_set = "call" in vars(layer) and routes.route_of(layer, "call") is None
    return is_set or layer.__class__.call is not layer_class.call


def _run(
    layer: keras.layers.Layer,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    return way_of_computing(layer, original)(*args, **kwargs)
