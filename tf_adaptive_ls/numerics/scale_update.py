"""How one step moves all scales: a pure function of what was kept and what was seen.

`AdaptiveLossScaleOptimizer` has it as pseudocode.
"""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.scale_state import MAX_LOG2_SCALE, LayerStates, LossState


class Flow(NamedTuple):
    """How gradients flow between layers; NumPy arrays.

    Attributes:
        call_order: The place of each layer in the forward pass, `[layers]`.
        passes_from: Whether what layer j produces is what comes to layer i, and passes it
            without being looked at on arrival, boolean `[i, j]`.
        held_to: Whether layer i is to work at no larger scale than layer j, `[i, j]`.
    """

    call_order: np.ndarray
    passes_from: np.ndarray
    held_to: np.ndarray


class Moves(NamedTuple):
    """By how many binades scales are to move, and what the rule then remembers.

    Attributes:
        layers: Change of what each layer works at, S * 2**r, `[layers]`.
        loss: Change of log2(S), a scalar.
        memory: Exponents at the scales before, `[layers + 1, n]`, S last.
    """

    layers: Any
    loss: Any
    memory: Any


def update(layers, loss, evidence, *, rule, float_format, flow, restart, sample_every):
    """The state after a step.

    Args:
        layers: `LayerStates` in the step.
        loss: `LossState` in the step.
        evidence: The step's `Evidence`.
        rule: The `ScaleRule`.
        float_format: The `FloatFormat` of the evidence.
        flow: The `Flow` of gradients between the layers.
        restart: log2 of the S to go back to when all that arrives at S is zero.
        sample_every: Steps from one sample to the next, an int.

    Returns:
        The new `LayerStates` and `LossState`.
    """
    finite = evidence.finite
    backoff = float(rule.backoff(float_format))
    sampled = is_sampled(loss)
    layers_at_fault, loss_at_fault = at_fault(evidence, layers, flow)
    ruled = moves(evidence, layers, loss, rule, float_format, restart)

    move = ops.where(layers_at_fault, -backoff, ops.where(finite, ruled.layers, 0.0))
    move_of_loss = ops.where(loss_at_fault, -backoff, ops.where(finite, ruled.loss, 0.0))
    log2_scale = _bounded(loss.log2_scale + move_of_loss)
    # A change of S by the rule moves no layer.
    taken_back = ops.where(finite, log2_scale - loss.log2_scale, 0.0)
    log2_scales = _bounded(layers.log2_scales + move - taken_back)
    log2_scales = _held(log2_scales, move, flow.held_to)

    seen = ops.sum(evidence.produced_peaks, axis=-1) > 0
    totals = _totals(layers, loss)
    memory = ruled.memory - totals[:, None]
    kept = ops.logical_and(seen, finite)
    fresh = ops.logical_and(kept, sampled)
    return (
        LayerStates(
            log2_scales,
            ops.where(kept[:, None], memory[:-1], layers.memory),
            layers.overflows + ops.cast(layers_at_fault, "float32"),
            ops.where(
                fresh[:, None, None],
                ops.stack([evidence.produced, evidence.produced_peaks], axis=1),
                layers.spectra,
            ),
            ops.where(fresh, totals[:-1], layers.log2_sampled_at),
        ),
        LossState(
            log2_scale,
            ops.where(finite, memory[-1], loss.memory),
            next_sample(loss, finite, move, log2_scale - loss.log2_scale, backoff, sample_every),
        ),
    )


def is_sampled(loss):
    """Whether a sample is asked for in the step, a boolean scalar."""
    return ops.equal(loss.steps_to_sample, 0)


def at_fault(evidence, layers, flow):
    """Whose scales are to blame for gradients that are not finite.

    A layer is that made such gradients, unless those that arrived at a layer called later
    were not finite already. Before anything was sampled all scales are one, S; that is to
    blame whenever no layer is.

    Returns:
        Booleans: `[layers]`, and a scalar for S.
    """
    order = np.argsort(np.argsort(flow.call_order)).astype("float32")
    arrived_broken = evidence.arrived_broken
    if flow.passes_from.any():
        from_later = np.logical_and(flow.passes_from, order[:, None] < order)
        came = ops.where(from_later, evidence.produced_broken, 0.0)
        arrived_broken = ops.maximum(arrived_broken, ops.max(came, axis=1))
    last_broken = ops.max(ops.where(arrived_broken > 0, order, -1.0))
    differ = ops.logical_or(ops.any(layers.spectra > 0), ops.any(layers.log2_scales != 0))
    made_it = ops.logical_and(evidence.produced_broken > 0, order > last_broken)
    made_it = ops.logical_and(made_it, differ)
    skipped = ops.logical_not(evidence.finite)
    return made_it, ops.logical_and(skipped, ops.logical_not(ops.any(made_it)))


def moves(evidence, layers, loss, rule, float_format, restart):
    """What the rule says: of each layer by what it produced, of S by what arrived at it."""
    samples_at_s = ops.sum(evidence.arrived, axis=0, keepdims=True)
    peaks_at_s = ops.sum(evidence.arrived_peaks, axis=0, keepdims=True)
    memory = ops.concatenate([layers.memory, loss.memory[None]]) + _totals(layers, loss)[:, None]
    changes, memory = rule(
        ops.concatenate([evidence.produced, samples_at_s]),
        ops.concatenate([evidence.produced_peaks, peaks_at_s]),
        memory,
        float_format,
    )
    nothing_arrived = ops.equal(spectrum.nonzero_total(peaks_at_s[0]), 0)
    back_up = ops.where(is_sampled(loss), ops.maximum(restart - loss.log2_scale, 0.0), 0.0)
    return Moves(changes[:-1], ops.where(nothing_arrived, back_up, changes[-1]), memory)


def next_sample(loss, finite, move, move_of_loss, backoff, sample_every):
    """In how many steps to take the next sample.

    At once after a step that was skipped, and when a scale has moved further than a
    spectrum can be trusted: it was then cut off at an end of the format. Without a sample
    a scale moves only because its gradients are about to overflow.
    """
    sampled = is_sampled(loss)
    moved = ops.maximum(ops.max(ops.abs(move)), ops.abs(move_of_loss))
    too_far = moved > ops.where(sampled, backoff, 0.0)
    at_once = ops.logical_or(ops.logical_not(finite), too_far)
    wait = ops.where(sampled, sample_every - 1, ops.maximum(loss.steps_to_sample - 1, 0))
    return ops.where(at_once, 0, wait)


def _held(log2_scales, move, held_to):
    """The r of layers, at most those of the layers they are held to, if one of them moved."""
    if not held_to.any():
        return log2_scales
    moved = ops.max(ops.where(held_to, ops.abs(move), 0.0), axis=1) + ops.abs(move) > 0
    limit = ops.min(ops.where(held_to, log2_scales, np.float32(np.inf)), axis=1)
    return ops.where(moved, ops.minimum(log2_scales, limit), log2_scales)


def _totals(layers, loss):
    """log2 of the scales that gradients were seen at, `[layers + 1]`, S last."""
    return ops.append(layers.log2_scales + loss.log2_scale, loss.log2_scale)


def _bounded(log2_scale):
    return ops.clip(log2_scale, -float(MAX_LOG2_SCALE), float(MAX_LOG2_SCALE))
