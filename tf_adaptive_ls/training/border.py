"""`Border`: the taps around one call of a layer."""

from collections.abc import Callable
from typing import Any

import keras

from tf_adaptive_ls.backend import autodiff
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.gradient_tap import gradient_tap
from tf_adaptive_ls.numerics.report import report_of_arrived, report_of_produced
from tf_adaptive_ls.training import scale_plan
from tf_adaptive_ls.training.call_tensors import Arguments, CallTensors, is_narrow
from tf_adaptive_ls.training.scale_plan import AT_S, ScaleGroup


class Border:
    """The taps around one call of a layer.

    Let S * 2**r be the scale of the layer, S * 2**r_in the scale at which the gradient of an input
    leaves it, and S * 2**r_out the scale at which the gradient of an output arrives. Without a
    plan, r_in = r_out = 0. The taps multiply

        the gradient of an output     by 2**(r - r_out)  when it arrives
        the gradient of an input      by 2**(r_in - r)   when it leaves
        the gradient of a weight      by 2**-r           in float32
        a loss that the layer adds    by 2**r

    Args:
        scaled: The `LayerScaling` of the layer.
        at_own_scale: Whether the layer works at its own scale. If not, the border uses r = 0.
        reports: Whether the taps report to the optimizer. Reports make the backward pass go
            through this layer even if nothing before it needs gradients.
    """

    def __init__(
        self, scaled: keras.layers.Layer, at_own_scale: bool = True, reports: bool = True
    ) -> None:
        self._scaled = scaled
        self._route = scale_plan.route_of(scaled)
        self._receivers: tuple[Tensor, ...] = ()
        if reports:
            self._receivers = scaled.loss_scale.value, scaled.loss_scale_report.value
        # The group at whose scale the layer works.
        self._own = ScaleGroup((scaled,)) if at_own_scale else AT_S
        self.passes_from: tuple[Any, ...] = ()
        self.passes_with: tuple[Any, ...] = ()
        if at_own_scale and self._route and self._route.passes_from:
            self._own = self._route.outputs[0]
            self.passes_from, self.passes_with = self._route.passes_from, self._own.layers
        # 2**r and 2**-r; `None` stands for 1.
        self._up, self._down = (None, None)
        if at_own_scale:
            self._up, self._down = scale_plan.factors(self._own)

    def tap_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], weights: list[keras.Variable]
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[tuple[keras.Variable, Tensor]]]:
        """Taps the inputs and weights of the layer, where gradients leave.

        Args:
            args: Tuple of the positional arguments of the call.
            kwargs: Dict of its keyword arguments.
            weights: List of the variables whose gradients are scaled.

        Returns:
            The arguments `(args, kwargs)` and a list of pairs of a variable and its value, to run
            the layer on.
        """
        self._arguments = arguments = Arguments(self._scaled, args, kwargs, self._route)

        def tap(tensors: list[Tensor], places: list[int], narrow: list[bool]) -> list[Tensor]:
            def report(gradients: list[Tensor], _: Any) -> Tensor:
                # The optimizer inspects the gradients of weights itself.
                return report_of_produced(gradients, narrow=narrow)

            divisors = [self._divisor_out(arguments.groups[place]) for place in places]
            return self._tapped(tensors, divisors, report)

        # Usually the data is not differentiated. A tap would then make the backward pass compute
        # its gradient only to report it.
        tensors = list(arguments.tensors)
        wanted = autodiff.may_be_differentiated(tensors, self._receivers)
        chosen = [index for index, is_wanted in enumerate(wanted) if is_wanted]
        tapped = tap(
            [tensors[index] for index in chosen],
            [arguments.places[index] for index in chosen],
            [arguments.narrow[index] for index in chosen],
        )
        for index, tensor in zip(chosen, tapped, strict=True):
            tensors[index] = tensor
        logits = {
            place: tap([tensor], [place], [is_narrow(tensor)])[0]
            for place, tensor in arguments.logits.items()
        }
        # One tap per weight: a weight that the call does not use must not get a gradient.
        values = [gradient_tap([weight.value], [self._up])[0] for weight in weights]
        args, kwargs = arguments.replaced(tensors, logits=logits)
        return args, kwargs, list(zip(weights, values, strict=True))

    def tap_outputs(self, outputs: Any) -> Any:
        """Taps the outputs, where gradients arrive, unless the layer passes them on."""
        self._arguments.return_masks()
        if self.passes_from:
            return outputs
        crossing = CallTensors(outputs, are_outputs=True)

        def tap(tensors: list[Tensor], places: list[int]) -> list[Tensor]:
            groups = [self._route.outputs[place] if self._route else AT_S for place in places]
            narrow = [is_narrow(tensor) for tensor in tensors]
            at_s = [n and group == AT_S for group, n in zip(groups, narrow, strict=True)]

            def report(gradients: list[Tensor], divisors: list[Tensor]) -> Tensor:
                return report_of_arrived(gradients, divisors, at_s=at_s, narrow=narrow)

            return self._tapped(tensors, [self._divisor_in(group) for group in groups], report)

        tensors = tap(crossing.tensors, crossing.places)
        logits = {place: tap([tensor], [place])[0] for place, tensor in crossing.logits.items()}
        return crossing.replaced(tensors, logits=logits)

    def _tapped(
        self, tensors: list[Tensor], divisors: list[Tensor | None], report: Callable[..., Tensor]
    ) -> list[Tensor]:
        return gradient_tap(tensors, divisors, self._receivers, report) if tensors else []

    def tap_loss(self, loss: Tensor) -> Tensor:
        """Taps a loss that the layer has added. Its gradient arrives as 1 times S."""
        narrow = [is_narrow(loss)]

        def report(gradients: list[Tensor], divisors: list[Tensor]) -> Tensor:
            return report_of_arrived(gradients, divisors, at_s=[False], narrow=narrow)

        (tapped,) = gradient_tap([loss], [self._down], self._receivers, report)
        return tapped

    def _divisor_out(self, group: ScaleGroup) -> Tensor | None:
        """2**r divided by the factor of `group`; `None` stands for 1."""
        return self._quotient(self._up, group, 1)

    def _divisor_in(self, group: ScaleGroup) -> Tensor | None:
        """The factor of `group` divided by 2**r; `None` stands for 1."""
        return self._quotient(self._down, group, 0)

    def _quotient(self, own: Tensor | None, group: ScaleGroup, which: int) -> Tensor | None:
        if group == self._own:
            return None
        if group == AT_S:
            return own
        other = scale_plan.factors(group)[which]
        return other if own is None else own * other
