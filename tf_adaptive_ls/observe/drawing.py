"""Colors, layer names along an axis, and time axes, for all pictures."""

from typing import Any

import matplotlib
import matplotlib.style
import numpy as np

# Of Okabe and Ito (2008), which the colour-blind can tell apart.
BLUE, GREEN, ORANGE, RED = "#0072B2", "#009E73", "#E69F00", "#D55E00"

_INCHES_PER_LAYER = 0.2
_MOST_LABELS = 50


def style(dark: bool) -> Any:
    """A context in which pictures are drawn on white or black."""
    if not isinstance(dark, (bool, np.bool_)):
        raise ValueError(f"Expected `dark` to be True or False. Received: dark={dark!r}.")
    return matplotlib.style.context("dark_background" if dark else "default")


def height_of(layers: int) -> float:
    """Inches for so many rows."""
    return float(np.clip(_INCHES_PER_LAYER * layers, 1.6, 10.5))


def label_layers(axes: Any, names: list[str], places: Any) -> None:
    """Names along the y axis, as many as there is space for."""
    every = -(-len(names) // _MOST_LABELS)
    size = "small" if len(names) <= 40 else "x-small"
    axes.set_yticks(places[::every], [shortened(name) for name in names[::every]], fontsize=size)


def shortened(name: str, most: int = 32) -> str:
    """The end of a long name."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def edges_of(steps: np.ndarray) -> np.ndarray:
    """Where the columns of `steps` begin and end."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    return np.concatenate([[first], steps])
