"""What a type checker, or an editor, is told of the public API."""

import functools
import inspect
import pathlib

import pytest

import tf_adaptive_ls as als
from tf_adaptive_ls import plots

CALLED = ("__init__", "__call__")
PUBLIC = {name: getattr(als, name) for name in als.__all__} | {
    f"plots.{name}": getattr(plots, name) for name in plots.__all__
}


def functions_of(public):
    """The functions of ours that make up a public class or function."""
    if not inspect.isclass(public):
        return [public]
    functions = []
    for name, member in vars(public).items():
        if isinstance(member, property):
            functions += [each for each in (member.fget, member.fset) if each]
        elif isinstance(member, functools.cached_property):
            functions.append(member.func)
        elif isinstance(member, classmethod):
            functions.append(member.__func__)
        elif inspect.isfunction(member) and (name in CALLED or not name.startswith("_")):
            functions.append(member)
    return functions


@pytest.mark.parametrize("public", PUBLIC.values(), ids=PUBLIC)
def test_public_signatures_are_annotated(public):
    for function in functions_of(public) if callable(public) else ():
        function = inspect.unwrap(function)
        signature = inspect.signature(function)
        untyped = [
            name
            for name, each in signature.parameters.items()
            if name not in ("self", "cls") and each.annotation is each.empty
        ]
        assert not untyped, f"{function.__qualname__}: {untyped}"
        made = function.__name__ == "__init__"
        assert made or signature.return_annotation is not signature.empty, function.__qualname__


def test_annotations_are_announced():
    assert (pathlib.Path(als.__file__).parent / "py.typed").exists()
