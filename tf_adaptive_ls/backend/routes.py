"""Replaces a method of a single object; its class, and all other objects, stay the same."""

import functools
from collections.abc import Callable
from typing import Any

import keras


class Route:
    """Replaces a method of one object.

    Args:
        thing: The object.
        name: Name of the method.
        run: Function `(original, args, kwargs)` that is called instead.

    Attributes:
        original: The method before it was replaced.
    """

    def __init__(self, thing: keras.layers.Layer, name: str, run: Callable[..., Any]) -> None:
        # before other attributes are set, because it copies all of them
        functools.update_wrapper(self, getattr(thing, name))
        self.original = getattr(thing, name)
        self._thing, self._name, self._run = thing, name, run
        # Bypasses Keras's attribute tracking.
        object.__setattr__(thing, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.original, args, kwargs)

    def end(self) -> None:
        """Restores the method, unless someone replaced it since; theirs may call this route."""
        self._run = _straight_on
        if route_of(self._thing, self._name) is not self:
            return
        if getattr(self.original, "__func__", None) is getattr(type(self._thing), self._name, None):
            del vars(self._thing)[self._name]
        else:  # someone else has replaced it since
            object.__setattr__(self._thing, self._name, self.original)


def _straight_on(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return original(*args, **kwargs)


def behind(method: Route) -> Callable[..., Any]:
    """The method that a chain of routes leads to."""
    while isinstance(method, Route):
        method = method.original
    return method


def route_of(thing: keras.layers.Layer, name: str) -> Route | None:
    """The `Route` that replaces a method, or `None`."""
    own = vars(thing).get(name)
    return own if isinstance(own, Route) else None
