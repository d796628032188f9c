"""The pure update: from what was kept and what was seen to the scales of the next step."""

import dataclasses

import keras
import numpy as np
import pytest

import tf_adaptive_ls as als
from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.evidence import Counts, Evidence
from tf_adaptive_ls.numerics.layer_facts import Flow, LayerFacts, Ownership
from tf_adaptive_ls.numerics.scale_rules import NOTHING_SEEN
from tf_adaptive_ls.numerics.scale_state import LossState, initial_layer_states
from tf_adaptive_ls.numerics.scale_update import (
    CEILING_RISE,
    SATURATION_MARGIN,
    at_fault,
    moves,
    next_sample,
    update,
    with_rounded,
)

FLOAT16 = als.FloatFormat("float16")
NOTHING = ()


@dataclasses.dataclass(frozen=True)
class Moving(als.ScaleRule):
    """Moves layers by what it is told, S last, and remembers the top binade."""

    by: tuple = ()
    memory_size = 1

    def __call__(self, samples, peaks, memory, float_format):
        top = spectrum.top_exponent(peaks, float_format)
        return np.float32(self.by), np.maximum(memory, np.array(top)[:, None])


def spectra(*of_layers):
    counts = [
        spectrum.spectrum(np.float32(values), FLOAT16)
        if len(values)
        else np.zeros(spectrum.num_bins(FLOAT16))
        for values in of_layers
    ]
    return np.float32(counts)


def evidence(produced=((1.0,), (1.0,)), arrived=(NOTHING, NOTHING), sampled=True, **broken):
    """That of layers whose gradients are as given, by layer, and whole but for what is `broken`."""
    whole = np.zeros(len(produced), "float32")
    arrived, produced = (
        Counts(whole, spectra(*each) * sampled, spectra(*each)) for each in (arrived, produced)
    )
    return with_broken(Evidence(np.float32(0), arrived, produced), **broken)


def with_broken(seen, arrived_broken=None, produced_broken=None, weights_broken=None):
    if arrived_broken is not None:
        seen = seen._replace(arrived=seen.arrived._replace(beyond=arrived_broken))
    if produced_broken is not None:
        seen = seen._replace(produced=seen.produced._replace(beyond=produced_broken))
    if weights_broken is not None:
        seen = seen._replace(weights_broken=np.float32(weights_broken))
    return seen


def layer_states(*log2_scales, memory_size=1, **fields):
    states = initial_layer_states(len(log2_scales), memory_size)
    return states._replace(log2_scales=np.float32(log2_scales), **fields)


NOBODY = np.zeros(0)  # was to blame, of however many


def loss_state(
    log2_scale=15,
    steps_to_sample=0,
    memory=((NOTHING_SEEN,),),
    ceiling=60,
    blamed=NOBODY,
    skipped_in_a_row=0,
):
    return LossState(
        np.float32(log2_scale),
        np.float32(memory),
        np.int32(steps_to_sample),
        np.float32(ceiling),
        np.float32(blamed),
        np.int32(skipped_in_a_row),
    )


def facts_of(float_formats, rounded_formats=None, flow=None):
    number = len(float_formats)
    return LayerFacts(
        float_formats,
        rounded_formats or [None] * number,
        narrow=np.ones(number, bool),
        answerable=np.ones(number, bool),
        ownership=Ownership.of([[]] * number, [[]] * number, 0),
        flow=flow or Flow.of_unrelated(number),
    )


def updated(layers, loss, seen, rule=None, float_formats=None, **facts):
    number = len(layers.log2_scales)
    layers, loss = update(
        layers,
        loss if len(loss.blamed) else loss._replace(blamed=np.zeros(number + 1, "float32")),
        seen,
        facts_of(float_formats or [FLOAT16] * number, **facts),
        rule=rule or Moving((0,) * (number + 1)),
        restart=15,
        sample_every=10,
    )
    as_arrays = type(layers)(*map(np.array, layers))
    return as_arrays, type(loss)(*map(np.array, loss))


def flow(call_order, passes_from=(), passes_with=()):
    """That of layers, with pairs `(i, j)` of those that i passes from or with j."""
    number = len(call_order)
    relations = np.zeros((2, number, number), bool)
    for relation, pairs in zip(relations, (passes_from, passes_with), strict=True):
        for i, j in pairs:
            relation[i, j] = True
    return Flow(np.array(call_order), relations[0], relations[0] | relations[1])


def fault_of(seen, layers, flow, blamed=None):
    blamed = np.zeros(len(layers.log2_scales) + 1) if blamed is None else blamed
    return at_fault(seen, layers, loss_state(blamed=blamed), flow)


def flags(text):
    return np.float32([letter != "." for letter in text])


# Whose fault it is. Layers are called from left to right, so gradients come from the right.


@pytest.mark.parametrize(
    ("arrived", "produced", "guilty"),
    [
        ("...", "...", "..."),
        ("...", "x..", "x.."),
        ("...", "..x", "..x"),
        ("x..", ".x.", ".x."),  # the one before it only passed it on
        ("xx.", "xxx", "..x"),
        ("...", ".xx", ".xx"),  # side by side: neither came to the other
        ("..x", "..x", "..."),  # it was broken at the loss
        ("x.x", ".xx", "..."),
    ],
)
def test_the_last_layer_that_nothing_broken_came_to_is_at_fault(arrived, produced, guilty):
    seen = evidence([()] * 3, [()] * 3)
    seen = with_broken(seen, arrived_broken=flags(arrived), produced_broken=flags(produced))
    layers = layer_states(1, 2, 3)
    for weights_broken in (0, 1):
        seen = with_broken(seen, weights_broken=np.float32(weights_broken))
        of_layers, of_loss, _ = fault_of(seen, layers, flow([0, 1, 2]))
        np.testing.assert_array_equal(of_layers, flags(guilty) > 0)
        assert bool(of_loss) == (weights_broken and "x" not in guilty)


def test_the_order_is_that_of_calls_whatever_that_of_layers():
    seen = evidence([()] * 3, [()] * 3)
    seen = with_broken(seen, arrived_broken=flags(".x."), produced_broken=flags("xx."))

    def guilty(*call_order):
        return np.array(fault_of(seen, layer_states(1, 2, 3), flow(call_order))[0])

    assert guilty(7, 2, 5).tolist() == [1, 0, 0]
    assert not guilty(2, 7, 5).any()


def test_before_anything_was_sampled_the_loss_scale_is_at_fault():
    seen = evidence(produced_broken=flags("x."), weights_broken=np.float32(1))
    layers, loss, unexplained = fault_of(seen, layer_states(0, 0), flow([0, 1]))
    assert not unexplained
    assert not np.any(layers) and loss
    sampled = layer_states(0, 0, spectra=np.ones((2, 2, 42), "float32"))
    for states in (sampled, layer_states(0, 3)):
        layers, loss, _ = fault_of(seen, states, flow([0, 1]))
        assert np.array(layers).tolist() == [True, False] and not loss


def test_a_skipped_step_lowers_what_is_at_fault_and_nothing_else():
    rule = Moving((1, 2, 3))
    seen = evidence(produced_broken=flags(".x"), weights_broken=np.float32(1))
    layers, loss = updated(layer_states(4, 5), loss_state(), seen, rule)
    assert layers.log2_scales.tolist() == [4, 5 - rule.backoff(FLOAT16)]
    assert layers.overflows.tolist() == [0, 1]
    assert loss.log2_scale == 15 and loss.steps_to_sample == 0
    assert not layers.spectra.any() and layers.memory[0] == NOTHING_SEEN
    seen = with_broken(seen, arrived_broken=flags(".x"))
    layers, loss = updated(layer_states(4, 5), loss_state(), seen, rule)
    assert layers.log2_scales.tolist() == [4, 5] and loss.log2_scale == 5
    assert layers.overflows.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("produced", "guilty"),
    [
        (".x.", ".x."),
        ("..x", "..x"),
        (".xx", "..x"),  # what it made of what was broken already
        ("xxx", "..x"),
        ("xx.", ".x."),
    ],
)
def test_what_comes_to_a_layer_that_passes_is_what_the_one_after_it_made(produced, guilty):
    """Layer 1 passes on what comes from layer 2, and layer 0 sees what it makes of it."""
    seen = evidence([()] * 3, [()] * 3, weights_broken=np.float32(1))
    arrived = "x.." if "x" in produced[1:] else "..."
    seen = with_broken(seen, arrived_broken=flags(arrived), produced_broken=flags(produced))
    # A layer before it may be among those, if both are in one class.
    between = flow([0, 1, 2], passes_from=[(1, 2), (1, 0)])
    of_layers, of_loss, _ = fault_of(seen, layer_states(1, 2, 3), between)
    np.testing.assert_array_equal(of_layers, flags(guilty) > 0)
    assert not of_loss


@pytest.mark.parametrize(("blamed", "guilty"), [((1, 0, 0), ".x"), ((0, 1, 0), "..")])
def test_a_layer_that_is_blamed_in_vain_is_not_at_fault(blamed, guilty):
    seen = evidence(produced_broken=flags(".x"), weights_broken=np.float32(1))
    layers, loss, unexplained = fault_of(seen, layer_states(1, 2), flow([0, 1]), blamed)
    np.testing.assert_array_equal(layers, flags(guilty) > 0)
    assert bool(loss) == bool(unexplained) == (guilty == "..")


def test_blame_is_counted_over_steps_skipped_in_a_row():
    seen = evidence(produced_broken=flags(".x"), weights_broken=np.float32(1))
    states, scales = (layer_states(1, 2), loss_state()), []
    for _ in range(4):
        states = updated(*states, seen)
        scales.append((*states[0].log2_scales.tolist(), float(states[1].log2_scale)))
    assert scales == [(1, -8, 15), (1, -8, 5), (1, -8, -5), (1, -8, -15)]
    assert states[1].blamed.tolist() == [0, 1, 3]
    assert updated(*states, evidence())[1].blamed.tolist() == [0, 0, 0]


def unexplained_overflow(**fields):
    """A step whose gradients of weights are not finite, though no layer saw any such."""
    return evidence(weights_broken=np.float32(1), **fields)


def test_s_remembers_an_overflow_that_no_report_explains():
    rule = Moving((0, 0, 20))  # it would raise S on every step
    states = updated(layer_states(1, 2), loss_state(15), unexplained_overflow(), rule)
    backoff = rule.backoff(FLOAT16)
    assert states[1].log2_scale == 15 - backoff
    assert states[1].ceiling == 15 - backoff / 2
    arriving = evidence(arrived=[(1.0,), ()])
    for _ in range(3):
        states = updated(*states, arriving, rule)
        assert states[1].log2_scale == 15 - backoff / 2
    # For so many steps as Keras waits before it doubles its scale.
    rising = states[1]._replace(ceiling=np.float32(11 - 2 * CEILING_RISE))
    states = updated(states[0], rising, arriving, rule)
    assert states[1].log2_scale == 10
    states = updated(*updated(*states, arriving, rule), arriving, rule)
    assert states[1].log2_scale == 11
    # One more takes it further down, and none up.
    states = updated(*states, unexplained_overflow(), rule)
    assert states[1].log2_scale == 1 and states[1].ceiling == 6
    # Of several in a row the first alone counts: the others may be for the data.
    again = updated(*states, unexplained_overflow(), rule)
    assert again[1].log2_scale == 1 - backoff and again[1].ceiling == 6
    low = loss_state(-20, ceiling=-30)
    assert updated(layer_states(1, 2), low, unexplained_overflow(), rule)[1].ceiling == -30


@pytest.mark.parametrize(
    "seen",
    [
        evidence(weights_broken=np.float32(1), arrived_broken=flags("x.")),
        evidence(weights_broken=np.float32(1), produced_broken=flags(".x")),
        evidence(arrived=[(1.0,), (1.0,)]),
    ],
    ids=["arrived broken", "made by a layer", "no overflow"],
)
def test_what_reports_explain_leaves_the_ceiling_of_s(seen):
    assert updated(layer_states(1, 2), loss_state(ceiling=20), seen)[1].ceiling >= 20


# How scales move.


def test_layers_move_by_what_they_produced_and_s_by_what_arrived_at_it():
    rule = als.QuantileRule()
    seen = evidence(produced=[(2.0**-20,), (2.0**10,)], arrived=[(2.0**3,), (2.0**5,)])
    unknown = np.float32([[NOTHING_SEEN]])
    expected = [
        float(rule(spectra((e,)), spectra((e,)), unknown, FLOAT16)[0][0])
        for e in (2.0**-20, 2.0**10)
    ]
    of_s = rule(spectra((8.0, 32.0)), spectra((8.0, 32.0)), unknown, FLOAT16)[0][0]
    found = moves(seen, layer_states(0, 0), loss_state(), rule, [FLOAT16] * 2, restart=15)
    assert np.array(found.layers).tolist() == expected
    assert found.loss == of_s != 0


def test_a_move_of_s_moves_no_layer():
    before = layer_states(4, -5), loss_state(15)
    seen = evidence(arrived=[(1.0,), ()])
    layers, loss = updated(*before, seen, Moving((0, 2, -3)))
    assert loss.log2_scale == 12
    np.testing.assert_array_equal(layers.log2_scales + loss.log2_scale, [15 + 4, 15 - 5 + 2])


@pytest.mark.parametrize(
    ("log2_scale", "steps_to_sample", "expected"), [(-60, 0, 15), (-60, 3, -60), (20, 0, 20)]
)
def test_s_returns_when_nothing_but_zeros_arrives_at_it(log2_scale, steps_to_sample, expected):
    state = loss_state(log2_scale, steps_to_sample)
    _, loss = updated(layer_states(0, 0), state, evidence(), Moving((0, 0, 7)))
    assert loss.log2_scale == expected


def test_layers_that_pass_are_held_to_those_they_pass_from_and_with():
    together = flow(range(3), passes_from=[(0, 2), (1, 2)], passes_with=[(0, 1), (1, 0)])
    seen = evidence([(1.0,)] * 3, [(1.0,), (), ()])
    for by, expected in (((9, 8, 4, 0), [4, 4, 4]), ((3, 5, 7, 0), [3, 3, 7])):
        layers, _ = updated(layer_states(0, 0, 0), loss_state(), seen, Moving(by), flow=together)
        assert layers.log2_scales.tolist() == expected
    # As they are while none moves.
    layers, _ = updated(layer_states(6, 5, 4), loss_state(), seen, flow=together)
    assert layers.log2_scales.tolist() == [6, 5, 4]


@pytest.mark.parametrize("by", [-200, 200])
def test_scales_stay_within_bounds(by):
    seen = evidence(arrived=[(1.0,), ()])
    layers, loss = updated(layer_states(0, 0), loss_state(), seen, Moving((by, 0, 0)))
    assert layers.log2_scales[0] == np.sign(by) * 60
    layers, loss = updated(layer_states(0, 0), loss_state(), seen, Moving((0, 0, by)))
    assert loss.log2_scale == np.sign(by) * 60


def test_what_is_remembered_is_of_gradients_without_any_scale():
    seen = evidence([(2.0**3,), (2.0**-2,)], [(2.0**7,), ()])
    layers, loss = updated(layer_states(4, -5), loss_state(15), seen, Moving((1, 2, 3)))
    np.testing.assert_array_equal(layers.memory[:, 0], [3 - 4 - 15, -2 + 5 - 15])
    assert loss.memory[0, 0] == 7 - 15
    # Nothing is larger at other scales either, so it stays.
    weaker = evidence([(2.0**-20,)] * 2, [(2.0**-20,), ()])
    again, _ = updated(layers, loss, weaker, Moving((-7, 6, 5)))
    np.testing.assert_array_equal(again.memory, layers.memory)


def test_of_steps_skipped_in_a_row_the_first_is_remembered():
    infinite, rule = [(np.inf,), (1.0,)], als.QuantileRule()
    broken = {"weights_broken": np.float32(1)}
    in_layer = evidence(infinite, produced_broken=flags("x."), **broken)
    at_loss = evidence(infinite, infinite, arrived_broken=flags("xx"), **broken)
    for seen, memory in (
        (in_layer, lambda layers, loss: layers.memory[0]),
        (at_loss, lambda layers, loss: loss.memory[0]),
    ):
        first = updated(layer_states(0, -9), loss_state(), seen, rule)
        assert memory(*first) == 16 - 15
        assert memory(*updated(*first, seen, rule)) == memory(*first)
        assert first[1].skipped_in_a_row == 1
        again = (
            first[0],
            first[1]._replace(blamed=np.zeros(3, "float32"), skipped_in_a_row=np.int32(0)),
        )
        assert memory(*updated(*again, seen, rule)) > memory(*first)


def test_a_layer_that_did_not_run_keeps_what_is_known_of_it():
    known = np.full((2, 2, 42), 5, "float32")
    states = layer_states(0, 0, spectra=known, memory=np.float32([[3], [3]]))
    seen = evidence([(1.0,), ()], arrived=[(1.0,), ()])
    layers, loss = updated(states, loss_state(), seen, als.QuantileRule(forget=1.0))
    np.testing.assert_array_equal(layers.spectra[1], known[1])
    assert layers.memory[1] == 3 != layers.memory[0]
    assert layers.log2_scales[1] == 15 - loss.log2_scale


# When to sample.


@pytest.mark.parametrize("sample_every", [1, 10])
@pytest.mark.parametrize(
    ("steps_to_sample", "finite", "moved", "expected"),
    [
        (0, True, 0, "next"),
        (0, True, 10, "next"),
        (0, True, -11, 0),  # further than the spectrum was good for
        (0, False, 0, 0),
        (5, True, 0, 4),
        (5, True, -1, 0),  # only an overflow ahead moves a scale without a sample
        (5, False, 0, 0),
        (1, True, 0, 0),
    ],
)
def test_when_to_sample_next(steps_to_sample, finite, moved, expected, sample_every):
    expected = sample_every - 1 if expected == "next" else expected
    loss = loss_state(steps_to_sample=steps_to_sample)
    for move, move_of_loss in (([0, moved], 0), ([0, 0], moved)):
        move, move_of_loss = np.float32(move), np.float32(move_of_loss)
        wait = next_sample(loss, finite, move, move_of_loss, np.float32([10, 10]), sample_every)
        assert wait == expected


def test_spectra_are_kept_with_the_scale_of_their_step():
    layers, loss = updated(layer_states(4, -5), loss_state(15), evidence(), Moving((1, 1, 0)))
    np.testing.assert_array_equal(layers.log2_sampled_at, [19, 10])
    np.testing.assert_array_equal(layers.spectra[:, 0], spectra((1.0,), (1.0,)))
    assert loss.steps_to_sample == 9
    weaker = evidence([(0.5,), (0.5,)], sampled=False)
    again, _ = updated(layers, loss, weaker)
    np.testing.assert_array_equal(again.spectra, layers.spectra)
    np.testing.assert_array_equal(again.log2_sampled_at, layers.log2_sampled_at)


@pytest.mark.parametrize("name", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_any_format_will_do(name):
    """Gradients from 2^-3 to 2^2 end where the format has most room for them."""
    float_format = als.FloatFormat(name)
    layers, loss = layer_states(0), loss_state(0)
    rule = als.QuantileRule(headroom=2)
    for _ in range(3):
        total = float(loss.log2_scale + layers.log2_scales[0])
        gradients = np.exp2(total + np.arange(-3.0, 3.0))
        layers, loss = updated(layers, loss, evidence([gradients], [()]), rule, [float_format])
    top = 2 + layers.log2_scales[0] + loss.log2_scale
    spare = float_format.max_exponent - float_format.min_normal_exponent - 5
    assert top == float_format.max_exponent - max(spare // 2, 2)


def test_layers_of_several_formats_move_each_in_its_own_and_s_by_the_least():
    formats = [als.FloatFormat("float8_e4m3fn"), FLOAT16, als.FloatFormat("float8_e4m3fn")]
    produced, arrived = [(0.25,), (4.0,), (2.0**-7,)], [(1.0,), (2.0,), ()]
    layers, loss = layer_states(0, 0, 0), loss_state(0, memory=[[NOTHING_SEEN]] * 2)
    rule = als.QuantileRule(headroom=2)
    together, loss_of_all = updated(layers, loss, evidence(produced, arrived), rule, formats)
    losses = []
    for float_format in set(formats):
        places = [i for i, each in enumerate(formats) if each == float_format]
        of_one, of_loss = updated(
            layer_states(*[0] * len(places)),
            loss_state(0),
            evidence([produced[i] for i in places], [arrived[i] for i in places]),
            rule,
            [float_format] * len(places),
        )
        np.testing.assert_array_equal(
            (together.log2_scales + loss_of_all.log2_scale)[places],
            of_one.log2_scales + of_loss.log2_scale,
        )
        np.testing.assert_array_equal(together.memory[places], of_one.memory)
        losses.append(of_loss.log2_scale)
    assert loss_of_all.log2_scale == min(losses) < max(losses)
    skipped = evidence(
        produced, arrived, produced_broken=flags("x.."), weights_broken=np.float32(1)
    )
    lowered, _ = updated(layer_states(20, 20, 20), loss, skipped, rule, formats)
    assert lowered.log2_scales.tolist() == [20 - rule.backoff(formats[0]), 20, 20]


# What is rounded to float8.


def rounded(*of_layers, saturated=(0.0, 0.0)):
    counts = spectra(*of_layers)
    return Counts(np.float32(saturated), counts, counts)


def counted(seen, rounded_format):
    """Peaks and samples of the first of two layers that round to a format, as a rule sees them."""
    formats = [als.FloatFormat(rounded_format), None]
    found = with_rounded(seen, facts_of([FLOAT16] * 2, formats))
    exponents = np.array(FLOAT16.exponents)
    for counts in (found.produced.peaks, found.produced.sample):
        counts = np.array(counts)
        np.testing.assert_array_equal(counts[1], seen.produced.peaks[1])  # the other layer
        yield exponents[counts[0, 1:-1] > 0].tolist(), int(counts[0, -1])


@pytest.mark.parametrize(
    "rounded_format, to_top, to_bottom", [("float8_e4m3fn", 7, -8), ("float8_e5m2", 0, 0)]
)
def test_of_each_format_the_distance_to_its_ends_counts(rounded_format, to_top, to_bottom):
    to_top -= SATURATION_MARGIN
    seen = evidence(produced=((2.0**3,), (1.0,)))._replace(rounded=rounded((4.0,), NOTHING))
    peaks, samples = counted(seen, rounded_format)
    assert peaks == (sorted({3, 2 + to_top}), 0)
    assert samples == (sorted({3, 2 + to_bottom}), 0)


def test_what_saturates_is_too_large():
    seen = evidence(produced=((1.0,), (1.0,)))
    most = 2.0 ** (8 + SATURATION_MARGIN)
    (_, nonfinite), _ = counted(seen._replace(rounded=rounded((most,), NOTHING)), "float8_e4m3fn")
    assert nonfinite == 0
    (_, nonfinite), _ = counted(
        seen._replace(rounded=rounded((2 * most,), NOTHING)), "float8_e4m3fn"
    )
    assert nonfinite == 1


def test_both_rooms_are_kept():
    """A layer is lowered for whichever of the two is nearer to its top."""
    rule = als.QuantileRule(headroom=5)

    def moved(produced, inside):
        seen = evidence(produced=((produced,), (1.0,)), sampled=False)
        seen = seen._replace(rounded=rounded((inside,), NOTHING)._replace(sample=spectra((), ())))
        states = initial_layer_states(2, 1, any_rounded=True)
        formats = [als.FloatFormat("float8_e4m3fn"), None]
        layers, _ = updated(states, loss_state(), seen, rule, rounded_formats=formats)
        return int(layers.log2_scales[0])

    assert moved(2.0**10, 2.0 ** (3 + SATURATION_MARGIN)) == 0
    assert moved(2.0**12, 2.0**3) == -2
    assert moved(2.0**3, 2.0 ** (6 + SATURATION_MARGIN)) == -3


def test_saturations_are_counted_and_samples_kept():
    states = initial_layer_states(2, 1, any_rounded=True)
    loss = loss_state()
    seen = evidence()._replace(rounded=rounded((1.0, 2.0), NOTHING, saturated=(1, 0)))
    for count in (1, 2):
        states, _ = updated(
            states, loss, seen, rounded_formats=[als.FloatFormat("float8_e4m3fn"), None]
        )
        assert states.saturations.tolist() == [count, 0]
        np.testing.assert_array_equal(states.rounded_spectra, seen.rounded.sample)


# Evidence.


def test_evidence_is_one_vector_and_adds_up():
    rng = np.random.default_rng(0)

    def counts():
        numbers = rng.integers(2, size=3), *rng.integers(9, size=(2, 3, 42))
        return Counts(*(each.astype("float32") for each in numbers))

    def assert_same(found, expected):
        for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
            np.testing.assert_array_equal(a, b)

    one, other = (Evidence(np.float32(rng.integers(2)), counts(), counts()) for _ in range(2))
    summed = Evidence.unpacked(one.packed() + other.packed(), 3)
    assert summed.rounded is None
    assert_same(summed[:-1], keras.tree.map_structure(np.add, one[:-1], other[:-1]))
    all_three = one._replace(rounded=counts())
    assert_same(Evidence.unpacked(all_three.packed(), 3), all_three)
    assert not bool(Evidence(1, *one[1:]).finite) and bool(Evidence(0, *one[1:]).finite)
