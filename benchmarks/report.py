"""What all benchmarks share: options, progress, files and tables of figures."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import sys

import keras
import matplotlib.pyplot as plt
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tabulate import tabulate

from benchmarks import compute


def add_arguments(parser, name):
    """Options that every benchmark has."""
    parser.add_argument("--quick", action="store_true", help="a small part, in under 3 minutes")
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        metavar="FILE",
        help="CIFAR-10 as an .npz of x_train, y_train, x_test, y_test; downloaded if left out",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="DIR",
        default=pathlib.Path("runs") / name,
        help="where to write figures, tables and plots; default: %(default)s",
    )


def progress():
    """A progress bar, a context manager."""
    return Progress(
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )


def provenance():
    """Versions and hardware, for the record."""
    backend = keras.backend.backend()
    program = [pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]]
    if compute.ON_JAX:
        program += ["--backend", "jax"]
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["./dev", "benchmark", *program]),
        "versions": {
            "python": platform.python_version(),
            backend: importlib.metadata.version(backend),
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
        "backend": backend,
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "gpus": compute.gpu_names()},
    }


def _cpu():
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def save_result(directory, result):
    """Writes the figures of one model, with their provenance, as JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "_", result["name"].lower()).strip("_")
    path = directory / f"{name}.json"
    path.write_text(json.dumps({**result, "provenance": provenance()}, separators=(",", ":")))


def load_results(directory, order):
    """All figures in `directory`, in the order of the names in `order`."""
    results = [json.loads(path.read_text()) for path in directory.glob("*.json")]
    by_name = {result["name"]: result for result in results}
    return [by_name[name] for name in order if name in by_name]


def save_plot(directory, name, figure):
    figure.savefig(directory / f"{name}.png", dpi=110)
    plt.close(figure)


def save_text(directory, text):
    """Writes Markdown and prints it."""
    path = directory / "README.md"
    path.write_text(text)
    print(text)
    print(f"Written to {path}, with plots and figures beside it.")


def markdown(header, rows):
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True)


def provenance_text(results):
    """One line per version, hardware and command that results came from."""
    lines = {}
    for p in (p for result in results for p in (*result.get("earlier", ()), result["provenance"])):
        versions = ", ".join(f"{name} {version}" for name, version in p["versions"].items())
        hardware = p["hardware"]
        device = ", ".join(hardware["gpus"]) or f"no GPU, {hardware['cores']} cores"
        line = f"{p['date']}, {hardware['cpu']}, {device}; {versions}."
        lines.setdefault(line, p["command"])
    return "\n".join(f"- `{command}`: {line}" for line, command in lines.items())
