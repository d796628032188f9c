"""What all pictures share: colors, layer names along an axis, time axes."""

from typing import Any

import matplotlib
import matplotlib.style
import numpy as np

# The palette of Okabe and Ito (2008), which color-blind people can tell apart.
BLUE, GREEN, ORANGE, RED = "#0072B2", "#009E73", "#E69F00", "#D55E00"

_INCHES_PER_LAYER = 0.2
_MOST_LABELS = 50


def style(dark: bool) -> Any:
    """Context manager to draw on a white or black background."""
    if not isinstance(dark, (bool, np.bool_)):
        raise ValueError(f"Expected `dark` to be True or False. Received: dark={dark!r}.")
    return matplotlib.style.context("dark_background" if dark else "default")


def height_of(layers: int) -> float:
    """The height in inches of a picture with this many rows."""
    return float(np.clip(_INCHES_PER_LAYER * layers, 1.6, 10.5))


def label_layers(axes: Any, names: list[str], places: Any) -> None:
    """Labels the y axis with as many names as there is space for."""
    every = -(-len(names) // _MOST_LABELS)
    size = "small" if len(names) <= 40 else "x-small"
    axes.set_yticks(places[::every], [shortened(name) for name in names[::every]], fontsize=size)


def shortened(name: str, most: int = 32) -> str:
    """The end of a name that is too long."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def edges_of(steps: np.ndarray) -> np.ndarray:
    """The edges of the columns that `steps` are the centers of."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    return np.concatenate([[first], steps])
