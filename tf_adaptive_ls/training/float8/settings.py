"""`Float8`: settings of float8 training."""

import dataclasses
from typing import Any

import keras

from tf_adaptive_ls.backend.arguments import checked_settings
from tf_adaptive_ls.backend.layer_filter import LayerFilter, check_layer_filter
from tf_adaptive_ls.numerics.float_format import FloatFormat
from tf_adaptive_ls.training.float8.operand import Operand

E4M3, E5M2 = FORMATS = ("float8_e4m3fn", "float8_e5m2")
ROUNDINGS = ("nearest", "stochastic")
_SAVED = ("forward", "backward", "rounding", "block_size")


@keras.saving.register_keras_serializable("tf_adaptive_ls")
@dataclasses.dataclass(frozen=True)
class Float8:
    """Settings for training with float8 operands of matmuls and convolutions.

    In the chosen layers, inputs and kernels of each matmul are quantized to the format `forward`,
    each scaled by the power of two that brings its amax to the top of the format. The gradient of
    the output of the matmul is quantized to `backward` as it is: the loss scale of the layer has
    already brought it into the range of the format. Gradients of inputs and kernels are
    straight-through. Biases, activations, normalization, attention weights, and the results of
    matmuls stay in the dtype that the layer computes in.

    With a `block_size`, each operand of each matmul, also each gradient, is quantized in blocks
    along the axes that the matmul sums over. Each block has its own power-of-two scale. The matmuls
    of the forward pass, of the gradient of inputs, and of the gradient of the kernel sum over
    different axes, so each tensor is quantized twice. The loss scale of the layer then only matters
    between matmuls.

    Values that are too large saturate; infinities and NaN are kept.

    Float8 numbers are stored in tensors of the layer's dtype. On devices with float8 matmuls, XLA
    can use these; see the guide.

    ```python
    model = als.wrap_model(build_model(), float8=als.Float8())
    ```

    Args:
        forward: Format of inputs and kernels: `"float8_e4m3fn"` (3 bits of mantissa, largest value
            448) or `"float8_e5m2"` (2 bits, 57344).
        backward: Format of gradients, likewise.
        rounding: Rounding of gradients: `"nearest"`, or `"stochastic"` with an exact mean. Inputs
            and kernels are always rounded to nearest.
        layer_filter: Function `layer -> bool` or `(layer, path) -> bool`, as for `wrap_model`, that
            chooses layers. By default, all layers with matmuls or convolutions except the first and
            the last one of the model. It is not saved: each layer's config records whether it uses
            float8.
        block_size: Int > 0. How many numbers share a scale: along channels of convolutions, and
            along examples and positions for the gradient of the kernel. `None` for one scale per
            tensor of inputs and kernels, and the loss scale of the layer for gradients.

    Raises:
        ValueError: If an argument is not as described.

    Reference: Mellempudi et al., "Mixed Precision Training With 8-bit Floating Point", 2019
    (arXiv 1905.12334); formats: Micikevicius et al., "FP8 Formats for Deep Learning", 2022
    (arXiv 2209.05433).
    """

    forward: str = "float8_e4m3fn"
    # In e4m3, gradients that are in range have half the error of e5m2, but a deep network without
    # normalization trains worse. Others train equally well (`./dev benchmark float8`).
    backward: str = "float8_e5m2"
    rounding: str = "nearest"
    layer_filter: LayerFilter | None = dataclasses.field(default=None, compare=False)
    block_size: int | None = None

    def __post_init__(self) -> None:
        choices = {"forward": FORMATS, "backward": FORMATS, "rounding": ROUNDINGS}
        for name, known in choices.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(
                    f"Expected `{name}` to be one of {', '.join(map(repr, known))}. "
                    f"Received: {name}={value!r}."
                )
        size = self.block_size
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(
                "Expected `block_size` to be a positive int or None. "
                f"Received: block_size={size!r}. MXFP8 has 32."
            )
        check_layer_filter(self.layer_filter, "compute in float8")

    @classmethod
    def mellempudi(cls, layer_filter: LayerFilter | None = None) -> "Float8":
        """The settings of Mellempudi et al. 2019: e5m2, gradients rounded stochastically."""
        return cls("float8_e5m2", "float8_e5m2", "stochastic", layer_filter)

    @classmethod
    def hybrid(cls, layer_filter: LayerFilter | None = None) -> "Float8":
        """The defaults, as in Micikevicius et al. 2022: e5m2 for gradients, otherwise e4m3."""
        return cls("float8_e4m3fn", "float8_e5m2", "nearest", layer_filter)

    @classmethod
    def mx(cls, layer_filter: LayerFilter | None = None) -> "Float8":
        """MXFP8: e4m3, with one power-of-two scale for 32 numbers.

        The formats are those of the OCP Microscaling specification (Rouhani et al.,
        "Microscaling Data Formats for Deep Learning", 2023, arXiv 2310.10537). As in Mishra et al.,
        "Recipes for Pre-training LLMs with MXFP8", 2025 (arXiv 2506.08027), gradients are e4m3, and
        scales are such that nothing saturates.
        """
        return cls(E4M3, E4M3, "nearest", layer_filter, block_size=32)

    @property
    def forward_format(self) -> FloatFormat:
        """The `FloatFormat` of inputs and kernels."""
        return FloatFormat(self.forward)

    @property
    def backward_format(self) -> FloatFormat:
        """The `FloatFormat` of gradients."""
        return FloatFormat(self.backward)

    @property
    def forward_operand(self) -> Operand:
        """The `Operand` of inputs and kernels."""
        return Operand(self.forward_format, True, block_size=self.block_size)

    @property
    def backward_operand(self) -> Operand:
        """The `Operand` of gradients."""
        fits_itself = self.block_size is not None
        is_stochastic = self.rounding == "stochastic"
        return Operand(self.backward_format, fits_itself, is_stochastic, self.block_size)

    @property
    def scaled_format(self) -> FloatFormat | None:
        """The `FloatFormat` that the loss scale of a layer brings gradients to.

        `None` with a `block_size`, because each block has a scale of its own.
        """
        operand = self.backward_operand
        return None if operand.fits_itself else operand.float_format

    def get_config(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SAVED}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Float8":
        return cls(**checked_settings(config, "Float8", _SAVED))


def check_is_float8(value: Any) -> None:
    """Raises a `ValueError` if the argument `float8` is not a `Float8`."""
    if not isinstance(value, Float8):
        raise ValueError(
            f"Expected `float8` to be a Float8. Received: float8={value!r} (of type "
            f"{type(value).__name__}). Use for example Float8()."
        )
