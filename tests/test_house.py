"""The layout that ARCHITECTURE.md draws: wings on a ground floor, and nothing points upward."""

import ast
import importlib
import inspect
import pathlib
import socket

import keras
import pytest
from pytest_socket import SocketConnectBlockedError

import tf_adaptive_ls

PACKAGE = pathlib.Path(tf_adaptive_ls.__file__).parent
GROUND = "backend"
WINGS = [GROUND, "numerics", "training", "models", "deploy", "halp", "observe"]
MODULES = [path for wing in WINGS for path in (PACKAGE / wing).rglob("*.py")]


def name_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def wing_of(path):
    return path.relative_to(PACKAGE).parts[0]


def imported_by(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("tf_adaptive_ls"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_module_imports_nothing_of_a_wing_above():
    for path in MODULES:
        wing = WINGS.index(wing_of(path))
        for module in imported_by(path):
            _, other, *_ = module.split(".")
            assert other in WINGS[: wing + 1], f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("wing", ["deploy", "halp"])
def test_some_wings_stand_beside_training(wing):
    for path in (PACKAGE / wing).rglob("*.py"):
        for module in imported_by(path):
            assert module.split(".")[1] in ("backend", "numerics", wing), name_of(path)


def test_no_module_imports_itself_through_others():
    modules = {name_of(path): path for path in MODULES}
    edges = {
        name: {
            m for m in modules if any(i == m or i.startswith(m + ".") for i in imported_by(path))
        }
        for name, path in modules.items()
    }
    while edges:
        leaves = {name for name, needed in edges.items() if not needed & edges.keys()}
        assert leaves, f"in a circle: {sorted(edges)}"
        edges = {name: needed for name, needed in edges.items() if name not in leaves}


def test_a_module_says_what_it_is():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), name_of(path)


def test_every_module_is_on_the_map():
    written = (pathlib.Path(__file__).parents[1] / "ARCHITECTURE.md").read_text()
    missing = [name_of(path) for path in MODULES if f"`{path.name}`" not in written]
    assert [name for name in missing if not name.endswith("__init__")] == []


def functions_of(path):
    return (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef))


def test_functions_are_short():
    for path in MODULES:
        lines = path.read_text().splitlines()
        for function in functions_of(path):
            body = function.body[bool(ast.get_docstring(function)) :] or function.body
            code = [line.strip() for line in lines[body[0].lineno - 1 : function.end_lineno]]
            length = sum(bool(line) and not line.startswith("#") for line in code)
            assert length <= 50, f"{name_of(path)}.{function.name}: {length} lines of code"


def test_functions_inside_take_few_arguments():
    public = {"loss_change", "LossChangeMonitor", "quantize_weights"}  # their options, by keyword
    for path in MODULES:
        tree = ast.parse(path.read_text())
        theirs = [f for n in tree.body if getattr(n, "name", "") in public for f in ast.walk(n)]
        for function in functions_of(path):
            arguments = [a.arg for a in [*function.args.args, *function.args.kwonlyargs]]
            number = len([name for name in arguments if name not in ("self", "cls")])
            known = any(function.lineno == getattr(f, "lineno", 0) for f in theirs)
            assert number <= 7 or known, f"{name_of(path)}.{function.name}: {number} arguments"


# Of named tuples, and the one that tells a layer's wrapper.
NOT_PRIVATE = {"_asdict", "_fields", "_replace", "_loss_scaled"}


def test_privates_of_others_are_on_the_ground_floor():
    for path in MODULES:
        if wing_of(path) == GROUND:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                ours = ast.unparse(node.value) in ("self", "cls") or node.attr in NOT_PRIVATE
                public = node.attr.endswith("__") and node.attr != "__internal__"
                assert ours or public, f"{name_of(path)}: {ast.unparse(node)}"
            if isinstance(node, ast.ImportFrom):
                assert not node.module.startswith("keras.src"), name_of(path)


def test_overriding_privates_of_keras_is_on_the_ground_floor():
    for path in MODULES:
        if wing_of(path) == GROUND:
            continue
        module = importlib.import_module(name_of(path))
        for kind in filter(inspect.isclass, vars(module).values()):
            if kind.__module__ != module.__name__:
                continue
            theirs = [c for c in kind.__mro__ if c.__module__.startswith("keras")]
            for name in vars(kind):
                known = any(name in vars(c) for c in theirs) or hasattr(keras.Model, name)
                is_private = name.startswith("_") and not name.endswith("__")
                assert not (known and is_private), f"{kind.__name__}.{name}"
            scopes = vars(kind).keys() & {"add_update", "add_loss", "get_current_value"}
            assert not scopes, f"{kind.__name__}.{scopes}"


# What tensors of one backend have and those of another have not.
OF_BACKENDS = {"aval", "dense_shape", "flat_values", "graph", "indices", "op", "rank", "sharding"}


def test_tensors_of_backends_are_told_apart_on_the_ground_floor():
    for path in MODULES:
        if wing_of(path) == GROUND:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
                name = getattr(node.args[1], "value", None)
                assert name not in OF_BACKENDS, f"{name_of(path)}: {ast.unparse(node)}"


def test_what_depends_on_the_backend_is_on_the_ground_floor():
    for path in MODULES:
        if wing_of(path) == GROUND:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called != "keras.backend.backend", f"{name_of(path)}: {called}()"
            # Writing for TensorBoard takes TensorFlow on every backend.
            if isinstance(node, ast.Import) and path.name != "tensorboard.py":
                imported = {alias.name.partition(".")[0] for alias in node.names}
                assert not imported & {"tensorflow", "jax", "torch"}, name_of(path)


@pytest.mark.filterwarnings("ignore:A test tried to use socket")
def test_no_test_reaches_another_machine():
    with pytest.raises(SocketConnectBlockedError):
        socket.create_connection(("192.0.2.1", 443), timeout=1)
