"""The part of a record about gradients in float8."""

import dataclasses
import math
from typing import Any

import numpy as np

from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT, FloatFormat
from tf_adaptive_ls.numerics.spectrum import Spectrum, num_bins
from tf_adaptive_ls.training.readings import LayerSnapshot


@dataclasses.dataclass(frozen=True, eq=False)
class Float8Record:
    """The gradients that layers have quantized to float8, during a run.

    Arrays of the N snapshots and L layers of the `Run`.

    Attributes:
        forward, backward: Lists of L float8 `FloatFormat`s, of inputs and kernels, and of
            gradients; `None` for layers that do not use float8.
        saturations: `[N, L]`, number of steps on which a gradient saturated.
        flushed: `[N, L]`, share of gradients that became zero; NaN if none were seen.
        spectra: `[N, L, bins]`, the last sample of gradients before quantization, at the scale
            `Run.log2_sampled_at`, counted in the binades of float16, see `Spectrum`.
    """

    forward: list[FloatFormat | None]
    backward: list[FloatFormat | None]
    saturations: np.ndarray
    flushed: np.ndarray
    spectra: np.ndarray


def last_of_layer(record: Float8Record | None, place: int) -> dict[str, Any]:
    """The fields of the last `LayerSnapshot` of a layer that a `Float8Record` has, a dict."""
    if record is None or record.backward[place] is None:
        return {}
    return {
        "operands": Spectrum(record.spectra[-1, place], COUNTING_FORMAT),
        "operand_format": record.backward[place],
        "saturations": int(record.saturations[-1, place]),
    }


def formats_of(layers: list[Any]) -> dict[str, list[list[str] | None]]:
    """What the first line of a record says about scaled layers that use float8, a dict."""
    formats = [layer.float8 and [layer.float8.forward, layer.float8.backward] for layer in layers]
    return {"float8": formats} if any(formats) else {}


def line_of(layer_snapshots: list[LayerSnapshot]) -> dict[str, list[Any]]:
    """What a line of a record says about float8 in `LayerSnapshot`s, a dict."""
    rounding = [each if each.operands else None for each in layer_snapshots]
    if not any(rounding):
        return {}
    return {
        "saturations": [each and each.saturations for each in rounding],
        "flushed": [each and _number(each.flushed_share) for each in rounding],
        "operand_spectra": [
            each.operands and each.operands.counts.astype(int).tolist() for each in layer_snapshots
        ],
    }


def float8_of(start: dict[str, Any], lines: list[dict[str, Any]]) -> Float8Record | None:
    """The `Float8Record` of what `formats_of` and `line_of` made. `None` if there was no float8."""
    if "float8" not in start:
        return None
    shape = (len(lines), len(start["float8"]))
    saturations, flushed = np.zeros(shape, int), np.full(shape, np.nan, "float32")
    spectra = np.zeros((*shape, num_bins(COUNTING_FORMAT)), "float32")
    for at, line in enumerate(lines):
        # Missing until a gradient has been quantized.
        for place, counts in enumerate(line.get("operand_spectra", ())):
            if counts is not None:
                saturations[at, place] = line["saturations"][place]
                share = line["flushed"][place]
                flushed[at, place] = np.nan if share is None else share
                spectra[at, place] = counts
    pairs = [formats or (None, None) for formats in start["float8"]]
    forward, backward = (
        [name and FloatFormat(name) for name in names] for names in zip(*pairs, strict=True)
    )
    return Float8Record(forward, backward, saturations, flushed, spectra)


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
