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
    """The border in one call of a layer.

    With S * 2**r the scale of the layer, S * 2**r_in and S * 2**r_out those that gradients
    travel at outside (r_in = r_out = 0 without a plan), taps shift

        gradient of an output    * 2**(r - r_out)   coming in
        gradient of an input     * 2**(r_in - r)    going out
        gradient of a weight     * 2**-r            in float32
        loss added by the layer  * 2**r

    Args:
        scaled: The `LossScaled` layer.
        at_own_scale: Whether it works at a scale of its own; otherwise r is 0, whatever it is.
        reports: Whether the taps report. Only then what comes before the layer costs anything
            in the backward pass if nobody else asks for gradients there.
    """

    def __init__(
        self, scaled: keras.layers.Layer, at_own_scale: bool = True, reports: bool = True
    ) -> None:
        self._scaled = scaled
        self._route = scale_plan.route_of(scaled)
        self._receivers: tuple[Tensor, ...] = ()
        if reports:
            self._receivers = scaled.loss_scale.value, scaled.loss_scale_report.value
        # At whose scale the layer works.
        self._own = ScaleGroup((scaled,)) if at_own_scale else AT_S
        self.passes_from: tuple[Any, ...] = ()
        self.passes_with: tuple[Any, ...] = ()
        if at_own_scale and self._route and self._route.passes_from:
            self._own = self._route.outputs[0]
            self.passes_from, self.passes_with = self._route.passes_from, self._own.layers
        # 2**r and 2**-r; `None` for 1.
        self._up, self._down = (None, None)
        if at_own_scale:
            self._up, self._down = scale_plan.factors(self._own)

    def tap_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], weights: list[keras.Variable]
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[tuple[keras.Variable, Tensor]]]:
        """Where gradients leave.

        Args:
            args: The arguments of the call by position, a tuple.
            kwargs: Those by name, a dict.
            weights: List of variables.

        Returns:
            The arguments, and pairs of a variable and its value, to run the layer on.
        """
        self._arguments = arguments = Arguments(self._scaled, args, kwargs, self._route)

        def tap(tensors: list[Tensor], places: list[int], narrow: list[bool]) -> list[Tensor]:
            def report(gradients: list[Tensor], _: Any) -> Tensor:
                # The optimizer sees those of weights for itself.
                return report_of_produced(gradients, narrow=narrow)

            divisors = [self._divisor_out(arguments.groups[place]) for place in places]
            return self._tapped(tensors, divisors, report)

        # The data, mostly, is not differentiated by: the gradient would be computed to be reported.
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
        # One by one: a weight that is not used is to have no gradient.
        values = [gradient_tap([weight.value], [self._up])[0] for weight in weights]
        args, kwargs = arguments.replaced(tensors, logits=logits)
        return args, kwargs, list(zip(weights, values, strict=True))

    def tap_outputs(self, outputs: Any) -> Any:
        """Where gradients arrive. What a layer passes on is not looked at on arrival."""
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
        """Where the gradient of a loss that the layer has added arrives, 1 times S."""
        narrow = [is_narrow(loss)]

        def report(gradients: list[Tensor], divisors: list[Tensor]) -> Tensor:
            return report_of_arrived(gradients, divisors, at_s=[False], narrow=narrow)

        (tapped,) = gradient_tap([loss], [self._down], self._receivers, report)
        return tapped

    def _divisor_out(self, group: ScaleGroup) -> Tensor | None:
        """2**r over the factor that the gradients of a group travel at, `None` for one."""
        return self._quotient(self._up, group, 1)

    def _divisor_in(self, group: ScaleGroup) -> Tensor | None:
        """The inverse of that."""
        return self._quotient(self._down, group, 0)

    def _quotient(self, own: Tensor | None, group: ScaleGroup, which: int) -> Tensor | None:
        if group == self._own:
            return None
        if group == AT_S:
            return own
        other = scale_plan.factors(group)[which]
        return other if own is None else own * other
