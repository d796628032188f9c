"""Reports of `quantize_weights`: errors and bytes, per layer and channel."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tf_adaptive_ls.backend.tables import Shown, Table


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedKernel:
    """The quantization of one kernel.

    Attributes:
        name: Path of the weight.
        shape: Shape of the weight.
        bits: Int array `[channels]`. Bits per integer.
        points: Int array `[channels]`. Number of integers, each with a scale, whose sum is the
            weight.
        bytes: Float array `[channels]`. Size of packed integers and float32 scales.
        weight_error: Float array `[channels]`. Norm of the error of the weights, relative to the
            norm of the weights.
        output_error: Float array `[channels]`. Root mean square of the error of the outputs on the
            calibration data, relative to the root mean square of all outputs of the layer.
        positions: Number of input positions on which outputs were compared. 0 if calibration did
            not reach the layer; its inputs were then assumed to be independent.
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
        """Plain Python values, for JSON and `pandas.DataFrame`."""
        fields = dataclasses.asdict(self)
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizationReport(Shown):
    """The report of `quantize_weights`. Prints as a table; notebooks show it as HTML.

    ```python
    plain = als.plain_copy(model, dtype="float32")
    _, report = als.quantize_weights(plain, x, bits=4, method="mse", verbose=False)
    print(report.bytes / report.float32_bytes)
    ```

    Attributes:
        kernels: A `QuantizedKernel` for each quantized kernel, in the order of calls.
        not_quantized: Paths of the other weights, which stay in float32.
        other_bytes: Size of these other weights.
    """

    kernels: tuple[QuantizedKernel, ...]
    not_quantized: tuple[str, ...]
    other_bytes: int

    @property
    def bytes(self) -> float:
        """Size of all weights in bytes, with packed integers."""
        return float(sum(each.bytes.sum() for each in self.kernels) + self.other_bytes)

    @property
    def float32_bytes(self) -> int:
        """Size of all weights in float32, in bytes."""
        return 4 * sum(int(np.prod(each.shape)) for each in self.kernels) + self.other_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for JSON.

        `pandas.DataFrame` accepts the value of "kernels".
        """
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
    """Text such as "4", or "4 (8: 3)" if three channels have 8."""
    most = min(values)
    others = [f"{value}: {(values == value).sum()}" for value in sorted({*values} - {most})]
    return f"{most} ({', '.join(others)})" if others else str(most)
