"""What quantization made of a model, per layer and channel."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tf_adaptive_ls.backend.tables import Shown, Table


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedKernel:
    """One kernel of a layer.

    Attributes:
        name: Path of the weight.
        shape: Of the weight.
        bits: Int array of shape (channels,): bits of the integers of each channel.
        points: Int array of shape (channels,): how many multiples of integers are summed up.
        bytes: Float array of shape (channels,): of integers, packed, and of scales in float32.
        weight_error: Float array of shape (channels,): norm of the error of weights, as a share of
            the norm of the weights.
        output_error: Float array of shape (channels,): root mean square of the error of outputs on
            the calibration data, as a share of the root mean square of the outputs of the layer.
        positions: On how many positions of inputs outputs were compared; 0 if the layer was not
            seen, and its inputs were taken to be independent.
    """

    name: str
    shape: tuple[int, ...]
    bits: NDArray[np.int64]
    points: NDArray[np.int64]
    bytes: NDArray[np.floating]
    weight_error: NDArray[np.floating]
    output_error: NDArray[np.floating]
    positions: int

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values: JSON and `pandas.DataFrame` take them."""
        fields = dataclasses.asdict(self)
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizationReport(Shown):
    """What `quantize_weights` made of a model. Prints as a table, and is one in a notebook.

    Attributes:
        kernels: A `QuantizedKernel` for each kernel that was quantized, in the order of calls.
        not_quantized: Paths of the other weights, which stay in float32.
        other_bytes: Of these.
    """

    kernels: tuple[QuantizedKernel, ...]
    not_quantized: tuple[str, ...]
    other_bytes: int

    @property
    def bytes(self) -> float:
        """Of all weights, with integers packed."""
        return float(sum(each.bytes.sum() for each in self.kernels) + self.other_bytes)

    @property
    def float32_bytes(self) -> int:
        """Of all weights in float32."""
        return 4 * sum(int(np.prod(each.shape)) for each in self.kernels) + self.other_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values: JSON takes them, and `pandas.DataFrame` those of "kernels"."""
        return {
            "kernels": [each.to_dict() for each in self.kernels],
            "not_quantized": list(self.not_quantized),
            "bytes": self.bytes,
            "float32_bytes": self.float32_bytes,
        }

    def _parts(self) -> list[str | Table]:
        columns = {
            "kernel": "left",
            "shape": "left",
            "bits": "right",
            "points": "right",
            "bytes": "right",
            "weight error": "right",
            "output error": "right",
            "worst channel": "right",
        }
        table = Table(columns, [_row(each) for each in self.kernels])
        share = self.bytes / self.float32_bytes
        summary = (
            f"All weights: {self.bytes:,.0f} bytes, {share:.1%} of float32; "
            f"{self.other_bytes:,} of these are not quantized."
        )
        return [table, summary]


def _row(kernel: QuantizedKernel) -> tuple[str, ...]:
    return (
        kernel.name,
        "x".join(map(str, kernel.shape)),
        _counted(kernel.bits),
        _counted(kernel.points),
        f"{kernel.bytes.sum():,.0f}",
        f"{_rms(kernel.weight_error):.2%}",
        f"{_rms(kernel.output_error):.2%}" if kernel.positions else "not seen",
        f"{kernel.output_error.max():.2%}" if kernel.positions else "",
    )


def _rms(values: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _counted(values: NDArray[np.int64]) -> str:
    """Such as "4", or "4 (8: 3)" for three channels of 8."""
    most = min(values)
    others = [f"{value}: {(values == value).sum()}" for value in sorted({*values} - {most})]
    return f"{most} ({', '.join(others)})" if others else str(most)
