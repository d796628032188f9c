"""Methods of single objects, led another way: the object stays of its class, and no other knows."""

import functools


class Route:
    """What stands for a method of one object.

    Args:
        original: The method as it was.
        run: Function `(original, args, kwargs)` that is called in its place.
    """

    def __init__(self, original, run):
        functools.update_wrapper(self, original)
        self.original = original
        self._run = run

    def __call__(self, *args, **kwargs):
        return self._run(self.original, args, kwargs)


def lead(thing, name, run):
    """Puts a `Route` in the place of the method `name` of an object."""
    # As it is: Keras keeps track of what is made an attribute of a layer.
    object.__setattr__(thing, name, Route(getattr(thing, name), run))


def route_of(thing, name):
    """The `Route` in the place of a method, or `None`."""
    own = vars(thing).get(name)
    return own if isinstance(own, Route) else None


def take_away(thing, name):
    """Undoes `lead`."""
    original = route_of(thing, name).original
    if getattr(original, "__func__", None) is getattr(type(thing), name, None):
        del vars(thing)[name]
    else:  # somebody else's
        object.__setattr__(thing, name, original)
