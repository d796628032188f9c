"""Replaces a method of a single object; its class, and all other objects, stay the same."""

import functools
from collections.abc import Callable
from typing import Any

import keras


class Route:
    """What stands for a method of one object.

    Args:
        thing: The object.
        name: The name of the method.
        run: Function `(original, args, kwargs)` that is called in its place.

    Attributes:
        original: The method as it was.
    """

    def __init__(self, thing: keras.layers.Layer, name: str, run: Callable[..., Any]) -> None:
        functools.update_wrapper(self, getattr(thing, name))  # first: it copies all attributes
        self.original = getattr(thing, name)
        self._thing, self._name, self._run = thing, name, run
        # As it is: Keras keeps track of what is made an attribute of a layer.
        object.__setattr__(thing, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.original, args, kwargs)

    def end(self) -> None:
        """The method is again what it was. A function set since stays, and may call the route."""
        self._run = _straight_on
        if route_of(self._thing, self._name) is not self:
            return
        if getattr(self.original, "__func__", None) is getattr(type(self._thing), self._name, None):
            del vars(self._thing)[self._name]
        else:  # somebody else's
            object.__setattr__(self._thing, self._name, self.original)


def _straight_on(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return original(*args, **kwargs)


def behind(method: Route) -> Callable[..., Any]:
    """What a method leads to in the end."""
    while isinstance(method, Route):
        method = method.original
    return method


def route_of(thing: keras.layers.Layer, name: str) -> Route | None:
    """The `Route` in the place of a method, or `None`."""
    own = vars(thing).get(name)
    return own if isinstance(own, Route) else None
