"""Updates all scales in one step: a pure function of their state and the evidence.

The docstring of `AdaptiveLossScaleOptimizer` has it as pseudocode.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from tf_adaptive_ls.backend.arguments import MAX_LOG2_SCALE
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.evidence import Evidence
from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT, FloatFormat
from tf_adaptive_ls.numerics.layer_facts import Flow, LayerFacts
from tf_adaptive_ls.numerics.scale_rules import ScaleRule
from tf_adaptive_ls.numerics.scale_state import LayerStates, LossState

# By how many binades a gradient that is rounded to a narrower format may be closer to the top of
# its format than the rule allows otherwise: it saturates, which skips no step. Measured in e4m3 on
# 15 layers with vanishing gradients and 2,000 steps: with 0, 1, 3 and 5 binades, 0, 0, 9 and 35 of
# 30,000 gradients saturate, and 25, 32, 16 and 10 % are flushed in the worst layer at the end
# (means of three seeds). Final losses differ less than between seeds. In e5m2 it makes no
# difference. (`./dev benchmark float8 --parts variations`)
SATURATION_MARGIN = 3


# If a layer was blamed for this many steps skipped in a row, and its scale was lowered each time,
# its scale is not the cause. S is lowered instead.
PATIENCE = 1

# By how many binades per step the ceiling of S rises: one binade in as many steps as Keras waits
# before it doubles its scale.
CEILING_RISE = 1 / 2000

# Finite, so that `tf.debugging.enable_check_numerics` stops a run only at other numbers.
_UNLIMITED = np.finfo("float32").max


class Blame(NamedTuple):
    """Which scales are at fault for non-finite gradients, booleans.

    Attributes:
        layers: Whether each layer is at fault, `[layers]`.
        loss: Whether S is at fault, a scalar.
        unexplained: Whether S is at fault for an overflow that no layer saw: none made gradients
            non-finite, and none received such gradients. A scalar.
    """

    layers: Tensor
    loss: Tensor
    unexplained: Tensor


class Moves(NamedTuple):
    """The changes of all scales in binades, and the new memory of the rule.

    Attributes:
        layers: Change of log2(S * 2**r) of each layer, `[layers]`.
        loss: Change of log2(S), a scalar.
        memory: Memory for layers, `[layers, n]`.
        memory_of_loss: Memory for gradients that arrive at S, `[formats, n]`.
    """

    layers: Tensor
    loss: Tensor
    memory: Tensor
    memory_of_loss: Tensor


def update(
    layers: LayerStates,
    loss: LossState,
    evidence: Evidence,
    facts: LayerFacts,
    *,
    rule: ScaleRule,
    restart: float,
    sample_every: int,
) -> tuple[LayerStates, LossState]:
    """The state after a step.

    Args:
        layers: `LayerStates` in the step.
        loss: `LossState` in the step.
        evidence: The `Evidence` of the step.
        facts: The `LayerFacts`.
        rule: The `ScaleRule`.
        restart: log2 of the S to return to when all gradients that arrive at S are zero.
        sample_every: Number of steps between two samples, an int.

    Returns:
        The new `LayerStates` and `LossState`.
    """
    finite = evidence.finite
    backoff = np.array([rule.backoff(each) for each in facts.narrowest_formats], "float32")
    blame = at_fault(evidence, layers, loss, facts.flow)
    seen_by_rule = with_rounded(evidence, facts)
    ruled = moves(seen_by_rule, layers, loss, rule, facts.float_formats, restart)

    move = ops.where(blame.layers, -backoff, ops.where(finite, ruled.layers, 0.0))
    move_of_loss = ops.where(blame.loss, -max(backoff), ops.where(finite, ruled.loss, 0.0))
    ceiling = _ceiling(loss, finite, blame, max(backoff))
    log2_scale = _bounded(loss.log2_scale + move_of_loss)
    log2_scale = ops.minimum(log2_scale, ops.floor(ceiling))
    # When the rule changes S, total scales of layers stay the same.
    taken_back = ops.where(finite, log2_scale - loss.log2_scale, 0.0)
    log2_scales = _bounded(layers.log2_scales + move - taken_back)
    log2_scales = _limited(log2_scales, move, facts.flow.limited_by)

    # The rule remembers the first of several steps skipped in a row. Overflows at the lower scales
    # after it have another cause, or will be seen again.
    news = ops.logical_or(finite, ops.equal(loss.skipped_in_a_row, 0))
    new_layers = _with_what_was_seen(layers, loss, evidence, blame, ruled.memory, news)
    new_loss = LossState(
        log2_scale,
        ops.where(
            ops.logical_and(news, ops.logical_or(finite, blame.loss)),
            ruled.memory_of_loss,
            loss.memory,
        ),
        next_sample(loss, finite, move, log2_scale - loss.log2_scale, backoff, sample_every),
        ceiling,
        ops.where(
            finite, 0.0, loss.blamed + ops.cast(ops.append(blame.layers, blame.loss), "float32")
        ),
        ops.where(finite, 0, loss.skipped_in_a_row + 1),
    )
    return new_layers._replace(log2_scales=log2_scales), new_loss


def _ceiling(loss: LossState, finite: Tensor, blame: Blame, backoff: Tensor) -> Tensor:
    """log2 of the largest S allowed after a step."""
    # Half-way between the scale that overflowed and the lower one; once per series of skipped
    # steps, because the data may be the cause.
    fallen = ops.minimum(loss.log2_scale - np.ceil(backoff / 2), loss.ceiling)
    risen = loss.ceiling + ops.where(finite, np.float32(CEILING_RISE), 0.0)
    falls = ops.logical_and(blame.unexplained, ops.equal(loss.blamed[-1], 0))
    return _bounded(ops.where(falls, fallen, risen))


def _with_what_was_seen(
    layers: LayerStates,
    loss: LossState,
    evidence: Evidence,
    blame: Blame,
    memory: Tensor,
    news: Tensor,
) -> LayerStates:
    """`LayerStates` with new counts and spectra, and unchanged scales.

    Args:
        layers: `LayerStates` in the step.
        loss: `LossState` in the step.
        evidence: The `Evidence` of the step.
        blame: The `Blame` of the step.
        memory: New memory of the rule, `[layers, n]`.
        news: Whether to store this memory, a boolean scalar.
    """
    finite = evidence.finite
    seen = ops.sum(evidence.produced.peaks, axis=-1) > 0
    rounded = evidence.rounded
    if rounded is not None:
        seen = ops.logical_or(seen, ops.sum(rounded.peaks, axis=-1) > 0)
    kept = ops.logical_and(ops.logical_and(seen, news), ops.logical_or(finite, blame.layers))
    fresh = ops.logical_and(ops.logical_and(seen, finite), is_sampled(loss))
    new_layers = LayerStates(
        layers.log2_scales,
        ops.where(kept[:, None], memory, layers.memory),
        layers.overflows + ops.cast(blame.layers, "float32"),
        ops.where(
            fresh[:, None, None],
            ops.stack([evidence.produced.sample, evidence.produced.peaks], axis=1),
            layers.spectra,
        ),
        ops.where(fresh, layers.log2_scales + loss.log2_scale, layers.log2_sampled_at),
    )
    if rounded is not None:
        new_layers = new_layers._replace(
            saturations=layers.saturations + rounded.beyond,
            rounded_spectra=ops.where(fresh[:, None], rounded.sample, layers.rounded_spectra),
        )
    return new_layers


def is_sampled(loss: LossState) -> Tensor:
    """Whether the step takes a sample, a boolean scalar."""
    return ops.equal(loss.steps_to_sample, 0)


def at_fault(evidence: Evidence, layers: LayerStates, loss: LossState, flow: Flow) -> Blame:
    """Which scales are at fault for non-finite gradients, a `Blame`.

    A layer is at fault if it produced non-finite gradients and no layer later in the forward pass
    received any, unless it was blamed `PATIENCE` times in a row without effect. Before the first
    sample, all scales equal S. S is at fault whenever no layer is.
    """
    order = np.argsort(np.argsort(flow.call_order)).astype("float32")
    arrived_broken = evidence.arrived.beyond
    if flow.passes_from.any():
        from_later = np.logical_and(flow.passes_from, order[:, None] < order)
        came = ops.where(from_later, evidence.produced.beyond, 0.0)
        arrived_broken = ops.maximum(arrived_broken, ops.max(came, axis=1))
    last_broken = ops.max(ops.where(arrived_broken > 0, order, -1.0))
    differ = ops.logical_or(ops.any(layers.spectra > 0), ops.any(layers.log2_scales != 0))
    made_it = ops.logical_and(evidence.produced.beyond > 0, order > last_broken)
    made_it = ops.logical_and(made_it, loss.blamed[:-1] < PATIENCE)
    layers_at_fault = ops.logical_and(made_it, differ)
    skipped = ops.logical_not(evidence.finite)
    loss_at_fault = ops.logical_and(skipped, ops.logical_not(ops.any(layers_at_fault)))
    explained = ops.logical_or(ops.any(made_it), ops.any(evidence.arrived.beyond > 0))
    unexplained = ops.logical_and(loss_at_fault, ops.logical_not(explained))
    return Blame(layers_at_fault, loss_at_fault, unexplained)


def with_rounded(evidence: Evidence, facts: LayerFacts) -> Evidence:
    """Evidence in which gradients that are rounded to a narrower format count as the carrier's.

    The carrier is the format that a layer computes in. One scale must suit both formats, so each
    spectrum is measured by its distance from its own format's limit. Peaks are shifted by the
    distance between the tops of the two formats, less `SATURATION_MARGIN`. Samples, which determine
    the tail, are shifted by the distance between their smallest normal values.
    """
    if evidence.rounded is None:
        return evidence
    pairs = list(zip(facts.rounded_formats, facts.float_formats, strict=True))
    sample, peaks = evidence.produced.sample, evidence.produced.peaks
    for narrower, carrier in set(pairs):
        if narrower is None:
            continue
        has_it = np.array([each == (narrower, carrier) for each in pairs], "float32")[:, None]
        to_top = carrier.max_exponent - narrower.max_exponent - SATURATION_MARGIN
        to_bottom = carrier.min_normal_exponent - narrower.min_normal_exponent
        sample = sample + spectrum.shifted(evidence.rounded.sample, to_bottom) * has_it
        peaks = peaks + spectrum.shifted(evidence.rounded.peaks, to_top) * has_it
    return evidence._replace(produced=evidence.produced._replace(sample=sample, peaks=peaks))


def moves(
    evidence: Evidence,
    layers: LayerStates,
    loss: LossState,
    rule: ScaleRule,
    float_formats: list[FloatFormat],
    restart: float,
) -> Moves:
    """The changes that the rule asks for.

    A layer changes by the gradients that it produced, and S by those that arrived at S.
    The rule is called once for all layers of a format, with S as one more layer. S changes by the
    least of its changes over formats.
    """
    places_of: dict[FloatFormat, list[int]] = {}
    for place, float_format in enumerate(float_formats):
        places_of.setdefault(float_format, []).append(place)
    results = []
    for number, (float_format, places) in enumerate(places_of.items()):

        def of_format(x: Tensor, places: list[int] = places) -> Tensor:
            return x if len(places_of) == 1 else ops.take(x, places, axis=0)

        def counts(
            of_layers: Tensor,
            at_s: Tensor,
            of_format: Callable[..., Any] = of_format,
            float_format: FloatFormat = float_format,
        ) -> Tensor:
            at_s = ops.sum(of_format(at_s), axis=0, keepdims=True)
            together = ops.concatenate([of_format(of_layers), at_s])
            return spectrum.rebinned(together, COUNTING_FORMAT, float_format)

        peaks = counts(evidence.produced.peaks, evidence.arrived.peaks)
        totals = ops.append(of_format(layers.log2_scales) + loss.log2_scale, loss.log2_scale)
        memory = ops.concatenate([of_format(layers.memory), loss.memory[number][None]])
        changes, memory = rule(
            counts(evidence.produced.sample, evidence.arrived.sample),
            peaks,
            memory + totals[:, None],
            float_format,
        )
        any_arrived = spectrum.nonzero_total(peaks[-1]) > 0
        of_loss = ops.where(any_arrived, changes[-1], _UNLIMITED)
        results.append((changes[:-1], memory - totals[:, None], of_loss))
    of_layers, memories, of_loss = zip(*results, strict=True)
    order = np.argsort(np.concatenate(list(places_of.values())))
    of_loss = ops.min(ops.stack(of_loss))
    # Only zeros arrived at S.
    back_up = ops.where(is_sampled(loss), ops.maximum(restart - loss.log2_scale, 0.0), 0.0)
    return Moves(
        _in_order(of_layers, order),
        ops.where(of_loss < _UNLIMITED, of_loss, back_up),
        _in_order([memory[:-1] for memory in memories], order),
        ops.stack([memory[-1] for memory in memories]),
    )


def _in_order(parts: Sequence[Tensor], order: np.ndarray) -> Tensor:
    return parts[0] if len(parts) == 1 else ops.take(ops.concatenate(parts), order, axis=0)


def next_sample(
    loss: LossState,
    finite: Tensor,
    move: Tensor,
    move_of_loss: Tensor,
    backoff: np.ndarray,
    sample_every: int,
) -> Tensor:
    """The number of steps until the next sample.

    There is one right after a skipped step, and after a scale has moved further than a spectrum can
    be trusted, because the spectrum was cut off at an end of the format. Without a sample, a scale
    only moves if its gradients are about to overflow.
    """
    sampled = is_sampled(loss)
    far = ops.where(sampled, backoff, 0.0)
    too_far = ops.logical_or(
        ops.any(ops.abs(move) > far), ops.abs(move_of_loss) > ops.where(sampled, max(backoff), 0.0)
    )
    at_once = ops.logical_or(ops.logical_not(finite), too_far)
    wait = ops.where(sampled, sample_every - 1, ops.maximum(loss.steps_to_sample - 1, 0))
    return ops.where(at_once, 0, wait)


def _limited(log2_scales: Tensor, move: Tensor, limited_by: np.ndarray) -> Tensor:
    """R of layers, limited by r of the layers that they are held to, if any of them changed."""
    if not limited_by.any():
        return log2_scales
    moved = ops.max(ops.where(limited_by, ops.abs(move), 0.0), axis=1) + ops.abs(move) > 0
    limit = ops.min(ops.where(limited_by, log2_scales, _UNLIMITED), axis=1)
    return ops.where(moved, ops.minimum(log2_scales, limit), log2_scales)


def _bounded(log2_scale: Tensor) -> Tensor:
    return ops.clip(log2_scale, -float(MAX_LOG2_SCALE), float(MAX_LOG2_SCALE))
