"""`FloatFormat`: the range of a floating-point format."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import keras
import ml_dtypes

# ml_dtypes has no type hints.
_finfo: Any = ml_dtypes.finfo


@dataclasses.dataclass(frozen=True)
class FloatFormat:
    """A floating-point format and its range in binades.

    A *binade* is the set of magnitudes in `[2**e, 2**(e + 1))`; its name is the exponent `e`. All
    figures are derived from `ml_dtypes.finfo`.

    ```python
    float16 = als.FloatFormat("float16")
    print(float16.min_exponent, float16.max_exponent)  # -24 15
    ```

    Args:
        name: String. A dtype name that `ml_dtypes.finfo` knows, such as `"float16"`, `"bfloat16"`,
            `"float32"` or `"float8_e5m2"`.

    Raises:
        ValueError: If `name` is not a floating-point dtype.
    """

    name: str

    def __post_init__(self) -> None:
        try:
            _finfo(self.name)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "Expected the name of a floating-point dtype. "
                f"Received: name={self.name!r}. Use for example 'float16'."
            ) from error

    @functools.cached_property
    def largest(self) -> float:
        """Largest finite value."""
        return float(_finfo(self.name).max)

    @functools.cached_property
    def smallest_normal(self) -> float:
        """Smallest positive normal value."""
        return float(_finfo(self.name).smallest_normal)

    @functools.cached_property
    def smallest_subnormal(self) -> float:
        """Smallest positive value."""
        return float(_finfo(self.name).smallest_subnormal)

    @property
    def max_exponent(self) -> int:
        """Binade of the largest value."""
        return _exponent(self.largest)

    @property
    def overflow(self) -> float:
        """Smallest power of two that overflows."""
        return 2.0 ** (self.max_exponent + 1)

    @property
    def min_normal_exponent(self) -> int:
        """Binade of the smallest normal value."""
        return _exponent(self.smallest_normal)

    @property
    def min_exponent(self) -> int:
        """Binade of the smallest subnormal value."""
        return _exponent(self.smallest_subnormal)

    @property
    def mantissa_bits(self) -> int:
        """Number of bits after the leading bit of a normal value."""
        return self.min_normal_exponent - self.min_exponent

    @property
    def is_narrow(self) -> bool:
        """Whether it has less range than float32, so that gradients need a loss scale."""
        return self.max_exponent < FloatFormat("float32").max_exponent

    @property
    def exponents(self) -> range:
        """All binades from `min_exponent` to `max_exponent`, a `range`."""
        return range(self.min_exponent, self.max_exponent + 1)


# Spectra of layers of different formats are counted in this format, because it has the binades of
# all narrow formats. It also stands for the format of layers that compute in a wide format, because
# their neighbors may compute in a narrow one.
COUNTING_FORMAT = FloatFormat("float16")


def narrowest(dtypes: Iterable[str]) -> FloatFormat:
    """The `FloatFormat` with the least range among several dtypes; float32 if none is a float."""
    formats = [FloatFormat(dtype) for dtype in dtypes if keras.backend.is_float_dtype(dtype)]
    widest = FloatFormat("float32")
    return min(formats, key=lambda each: (each.max_exponent, -each.min_exponent), default=widest)


def is_narrow_dtype(dtype: str) -> bool:
    """Whether a dtype is a floating-point dtype with less range than float32."""
    return keras.backend.is_float_dtype(dtype) and FloatFormat(dtype).is_narrow


def _exponent(value: float) -> int:
    return math.frexp(value)[1] - 1
