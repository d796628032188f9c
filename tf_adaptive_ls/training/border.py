"""The border of a `LossScaled` layer: everything that crosses it is shifted and reported."""

import numpy as np
from keras import ops, tree

from tf_adaptive_ls.numerics import backend
from tf_adaptive_ls.numerics.gradient_tap import gradient_tap, rounding_tap
from tf_adaptive_ls.numerics.report import (
    report_of_arrivals,
    report_of_operand,
    report_of_products,
)
from tf_adaptive_ls.numerics.rounding import NOISE_BITS, rounded
from tf_adaptive_ls.training import scale_plan
from tf_adaptive_ls.training.call_tensors import Arguments, is_float_tensor, is_narrow, with_mask_of
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
    """

    def __init__(self, scaled):
        self._scaled = scaled
        self._route = scale_plan.route_of(scaled)
        self._receivers = scaled.loss_scale.value, scaled.loss_scale_report.value
        if scaled.float8 is not None:
            # Here, since the layer runs where its own variables alone are known.
            self._operand_receiver = scaled.float8_report.value
            self._seed = _next_seed(scaled.float8_seed)
        self.passes_from = self._route.passes_from if self._route else ()
        # At whose scale the layer works.
        self._own = self._route.outputs[0] if self.passes_from else ScaleGroup((scaled,))
        self.passes_with = self._own.layers if self.passes_from else ()
        self._up, self._down = scale_plan.factors(self._own)  # 2**r and 2**-r

    def tap_inputs(self, args, kwargs, weights):
        """Where gradients leave.

        Args:
            args: The arguments of the call by position, a tuple.
            kwargs: Those by name, a dict.
            weights: List of variables.

        Returns:
            The arguments, and pairs of a variable and its value, to run the layer on.
        """
        arguments = Arguments(self._scaled, args, kwargs, self._route)
        number = len(arguments.tensors)
        tensors = [*arguments.tensors, *(v.value for v in weights)]
        if tensors:

            def report(gradients, _):
                # The optimizer sees those of weights for itself.
                return report_of_products(gradients[:number], narrow=arguments.narrow)

            divisors = [*map(self._divisor_out, arguments.groups), *[self._up] * len(weights)]
            tensors = gradient_tap(tensors, divisors, self._receivers, report)
        args, kwargs = arguments.replaced(tensors[:number])
        return args, kwargs, list(zip(weights, tensors[number:], strict=True))

    def tap_outputs(self, outputs):
        """Where gradients arrive. What a layer passes on is not looked at on arrival."""
        leaves = tree.flatten(outputs)
        groups = self._route.outputs if self._route else [AT_S] * len(leaves)
        places = [i for i, leaf in enumerate(leaves) if is_float_tensor(leaf)]
        if not places or self.passes_from:
            return outputs
        narrow = [is_narrow(leaves[i]) for i in places]
        at_s = [n and groups[i] == AT_S for i, n in zip(places, narrow, strict=True)]

        def report(gradients, divisors):
            return report_of_arrivals(gradients, divisors, at_s=at_s, narrow=narrow)

        tapped = gradient_tap(
            [leaves[i] for i in places],
            [self._divisor_in(groups[i]) for i in places],
            self._receivers,
            report,
        )
        for i, tensor in zip(places, tapped, strict=True):
            leaves[i] = with_mask_of(leaves[i], tensor)
        return tree.pack_sequence_as(outputs, leaves)

    def tap_loss(self, loss):
        """Where the gradient of a loss that the layer has added arrives, 1 times S."""
        narrow = [is_narrow(loss)]

        def report(gradients, divisors):
            return report_of_arrivals(gradients, divisors, at_s=[False], narrow=narrow)

        (tapped,) = gradient_tap([loss], [self._down], self._receivers, report)
        return tapped

    def tap_operand(self, tensor, place, number, cast):
        """Inside, where the gradient of a product's output is rounded to float8.

        Args:
            tensor: The output.
            place: Which of the products of the layer it is of.
            number: How many it has.
            cast: As that of `rounded`.
        """
        float_format, seed = self._scaled.operand_format, self._seed

        def round_gradient(gradient):
            noise = None
            if seed is not None:
                own_seed = seed + np.array([place, 0], "uint32")
                noise = backend.random_bits(own_seed, ops.shape(gradient), NOISE_BITS)
            return rounded(gradient, float_format, noise=noise, cast=cast)

        def report(gradient):
            return report_of_operand(gradient, float_format, place, number)

        return rounding_tap(tensor, self._operand_receiver, round_gradient, report)

    def _divisor_out(self, group):
        """2**r over the factor that the gradients of a group travel at, `None` for one."""
        if group == AT_S:
            return self._up
        return None if group == self._own else self._up * scale_plan.factors(group)[1]

    def _divisor_in(self, group):
        """The inverse of that."""
        if group == AT_S:
            return self._down
        return None if group == self._own else self._down * scale_plan.factors(group)[0]


def _next_seed(variable):
    """The seed in a variable `[2]`, which is another from then on; `None` for `None`."""
    if variable is None:
        return None
    seed = ops.copy(variable.value)
    variable.assign(seed + np.array([0, 1], "uint32"))
    return seed
