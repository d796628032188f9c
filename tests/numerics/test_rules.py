"""Rules as pure functions of spectra."""

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import tf_adaptive_ls as als
from benchmarks.rules import AmaxHistoryRule, LogMaxRule
from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.scale_rules import NOTHING_SEEN

FLOAT16 = als.FloatFormat("float16")
QUANTILE_RULES = [als.QuantileRule(), als.QuantileRule(1e-2, 0), als.QuantileRule(0.1, 6, 0.5)]
RISING_MINIMUM = als.RisingMinimumRule(minimums=((0, 1.0), (5, 2.0**3)), growth_steps=4)
RULES = [*QUANTILE_RULES, als.GaussianRule(), RISING_MINIMUM, als.FixedRule()]
FOREIGN_RULES = [AmaxHistoryRule(), LogMaxRule()]


def counts(values):
    return np.array(spectrum.spectrum(np.abs(np.asarray(values, "float32")), FLOAT16))


def nothing(rule):
    return np.full((1, rule.memory_size), NOTHING_SEEN, "float32")


def apply(rule, values, peak=None, memory=None):
    """Change and new memory of one layer whose gradients are `values`."""
    values = np.asarray(values, "float32")
    peak = np.max(np.abs(values)) if peak is None else peak
    memory = nothing(rule) if memory is None else memory
    change, memory = rule(counts(values)[None], counts(np.atleast_1d(peak))[None], memory, FLOAT16)
    (change,) = np.array(change)
    assert change == int(change)
    return int(change), np.array(memory)


def change(rule, values, peak=None):
    return apply(rule, values, peak)[0]


def at(*exponents):
    return [2.0**e for e in exponents]


@pytest.mark.parametrize(
    ("exponents", "expected"),
    [
        ([0], 1),  # 14 binades free above, 15 normal ones below
        ([-14], 15),
        ([15], -14),
        ([4, -4], 1),  # 10 free above, 11 normal ones below
        ([10, 2], -5),
        ([-24, -10], 18),
        ([-24, 4], 6),  # too wide: five binades above, the rest below
        ([12, -16], -2),
        ([15, -24], -5),  # overflow wins
    ],
)
def test_the_quantile_rule_goes_to_the_middle(exponents, expected):
    assert change(als.QuantileRule(), at(*exponents)) == expected


def test_the_quantile_rule_tolerates_a_share():
    values = at(0) * 999 + at(-20)
    assert change(als.QuantileRule(underflow=1e-3), values) == change(als.QuantileRule(), at(0))
    assert change(als.QuantileRule(underflow=0.9e-3), values) == 15 - 5 - 0


def test_the_quantile_rule_takes_some_zeros_for_structure():
    assert change(als.QuantileRule(), at(0) * 10 + [0.0] * 1000) == change(
        als.QuantileRule(), at(0)
    )


@pytest.mark.parametrize("headroom", [0, 3])
def test_a_tensor_of_zeros_has_vanished_and_takes_all_the_room(headroom):
    rule = als.QuantileRule(headroom=headroom)
    # All gradients, or only those of one of two tensors.
    assert change(rule, [0.0] * 8, peak=[2.0**-6, 0.0]) == 21 - headroom
    assert change(rule, at(-6) * 8 + [0.0] * 8, peak=[2.0**-6, 0.0]) == 21 - headroom
    assert change(rule, [0.0] * 8, peak=[2.0**14, 0.0]) == 1 - headroom


def test_without_a_sample_only_the_headroom_is_kept():
    rule = als.QuantileRule(headroom=3)
    assert [change(rule, [], peak=2.0**e) for e in (-20, 0, 12, 13, 15)] == [0, 0, 0, -1, -3]


def test_the_quantile_rule_remembers_the_largest_gradient():
    rule = als.QuantileRule(forget=0.5)
    quiet, loud = at(-3, -10), at(7, 0)
    moved, memory = apply(rule, loud)
    assert moved == change(als.QuantileRule(), loud)
    # A quiet batch counts as if the loud one was part of it, …
    moved, memory = apply(rule, quiet, memory=memory)
    assert moved == change(als.QuantileRule(), at(7, -10))
    # … but less and less so.
    for _ in range(2 * 10):
        moved, memory = apply(rule, quiet, memory=memory)
    assert moved == change(als.QuantileRule(), quiet)
    # Without gradients it is neither changed nor forgotten at once.
    loud_memory = apply(rule, loud)[1]
    moved, memory = apply(rule, [0.0], memory=loud_memory)
    assert moved == 0 and memory == loud_memory - 0.5


def test_the_quantile_rule_remembers_that_a_gradient_was_not_finite():
    """As one of the binade after the last, whatever is seen of it afterwards."""
    rule = als.QuantileRule(headroom=5, forget=0.5)
    _, memory = apply(rule, [1.0, np.inf])
    assert memory == FLOAT16.max_exponent + 1
    moved, memory = apply(rule, at(0), memory=memory - 10)  # ten binades down
    assert moved == -2 < change(rule, at(0))
    assert memory == FLOAT16.max_exponent + 1 - 10 - 0.5


def test_the_gaussian_rule_reaches_its_target_on_normal_gradients():
    x = np.random.default_rng(0).normal(size=100_000) * 2.0**-22
    rule = als.GaussianRule(underflow=1e-2)
    # Rounded down to a power of two, it may miss the target by a factor of two.
    lost = np.mean(np.abs(x) * 2.0 ** change(rule, x) < FLOAT16.smallest_subnormal)
    assert 1e-2 <= lost < 2.2e-2


def log2_scales(rule, batches, log2_scale=0):
    """What a rule makes of one scale, step by step; memory moves as the optimizer moves it."""
    memory = nothing(rule)
    for values in batches:
        moved, memory = apply(rule, values, memory=memory + log2_scale)
        memory = memory - log2_scale
        # An overflow lowers the scale, whatever the rule says.
        log2_scale += moved if np.isfinite(values).all() else -rule.backoff(FLOAT16)
        yield log2_scale


FINE, OVERFLOW = [1.0], [np.inf]


def test_the_rising_minimum_rule_doubles_after_so_many_steps_without_an_overflow():
    rule = als.RisingMinimumRule(growth_steps=3)
    batches = [FINE] * 7 + [OVERFLOW] + [FINE] * 4
    assert list(log2_scales(rule, batches)) == [0, 0, 1, 1, 1, 2, 2, 1, 1, 1, 2, 2]


def test_the_rising_minimum_rule_does_not_stay_below_a_minimum_that_rises():
    rule = als.RisingMinimumRule(minimums=((0, 2.0**2), (3, 2.0**5)), growth_steps=100)
    # Steps that are skipped do not count; what they halve is back on the next.
    batches = [FINE, OVERFLOW, FINE, FINE, FINE, FINE, OVERFLOW, OVERFLOW, FINE]
    assert list(log2_scales(rule, batches)) == [2, 1, 2, 2, 5, 5, 4, 3, 5]
    # What is above it stays.
    assert list(log2_scales(rule, [FINE] * 5, log2_scale=9)) == [9] * 5


def test_the_rising_minimum_rule_takes_pairs_of_any_kind():
    rule = als.RisingMinimumRule(minimums=[[0, 1], (7, np.float32(8))])
    assert rule == als.RisingMinimumRule(minimums=((0, 1.0), (7, 8.0)))
    assert hash(rule) == hash(als.RisingMinimumRule(minimums=((0, 1.0), (7, 8.0))))


@pytest.mark.parametrize("rule", [*RULES, *FOREIGN_RULES], ids=str)
def test_who_saw_nothing_stays(rule):
    assert change(rule, [0.0] * 8) == 0
    assert change(rule, [np.nan] * 8, peak=np.nan) == 0


def test_layers_are_independent_of_each_other():
    rng = np.random.default_rng(0)
    values = [np.exp2(rng.uniform(low, low + 8, 100)) for low in (-24, -12, 0, 8)]
    samples = np.stack([counts(v) for v in values])
    peaks = np.stack([counts([v.max()]) for v in values])
    for rule in [*RULES, *FOREIGN_RULES]:
        memory = np.repeat(nothing(rule), len(values), axis=0)
        together, memory = rule(samples, peaks, memory, FLOAT16)
        alone = [apply(rule, v) for v in values]
        assert list(np.array(together)) == [moved for moved, _ in alone]
        np.testing.assert_array_equal(memory, np.concatenate([kept for _, kept in alone]))


@pytest.mark.parametrize("rule", [*RULES, *FOREIGN_RULES], ids=str)
def test_rules_are_saved_with_every_field(rule):
    config = keras.saving.serialize_keras_object(rule)
    loaded = keras.saving.deserialize_keras_object(config)
    assert type(loaded) is type(rule) and loaded == rule


# Properties, for any data.

any_float16 = st.lists(st.floats(width=16), min_size=1, max_size=20)
# Far enough from the ends of the format to be moved by `small_shifts`.
inner = st.lists(
    st.builds(
        lambda sign, mantissa, exponent: sign * mantissa * 2.0**exponent,
        st.sampled_from([-1.0, 1.0]),
        st.floats(1, 1.9375, width=16),
        st.integers(-19, 10),
    ),
    min_size=1,
    max_size=20,
)
small_shifts = st.integers(-5, 5)
memories = st.one_of(st.just(NOTHING_SEEN), st.floats(-30, 15, width=32))


def for_any(**strategies):
    def decorate(test):
        # Fixtures of this suite only set the seed and the policy.
        checks = [HealthCheck.function_scoped_fixture]
        fast = settings(max_examples=60, deadline=None, suppress_health_check=checks)
        return fast(given(**strategies)(test))

    return decorate


@pytest.mark.parametrize("rule", [*RULES, *FOREIGN_RULES], ids=str)
@for_any(values=any_float16, remembered=memories)
def test_never_non_finite_and_never_beyond_bounds(rule, values, remembered):
    memory = np.full((1, rule.memory_size), remembered, "float32")
    moved, memory = apply(rule, values, memory=memory)
    assert np.isfinite(moved) and np.isfinite(memory).all()
    if rule in FOREIGN_RULES:
        return
    # From one end of the format to the other.
    assert abs(moved) <= FLOAT16.max_exponent - FLOAT16.min_exponent + 1
    if hasattr(rule, "headroom") and np.isfinite(values).all() and np.any(values):
        top = np.frexp(np.max(np.abs(values)))[1] - 1
        assert top + moved <= FLOAT16.max_exponent - rule.headroom


@pytest.mark.parametrize("rule", [*RULES, AmaxHistoryRule()], ids=str)
@for_any(values=inner, shift=small_shifts, remembered=memories)
def test_monotone_larger_gradients_never_raise_a_scale_more(rule, values, shift, remembered):
    assume(shift >= 0)
    memory = np.full((1, rule.memory_size), remembered, "float32")
    values = np.array(values)
    moved = apply(rule, values, memory=memory)[0]
    assert apply(rule, values * 2.0**shift, memory=memory)[0] <= moved
    peak = np.max(np.abs(values))
    assert apply(rule, values, peak=peak * 2.0**shift, memory=memory)[0] <= moved


@pytest.mark.parametrize("rule", RULES, ids=str)
@for_any(values=inner)
def test_idempotent_once_settled(rule, values):
    values = np.array(values)
    moved, memory = apply(rule, values)
    values = values * 2.0**moved
    # What the move sent below the format is seen as its lowest binade.
    assume(np.min(np.abs(values)) >= FLOAT16.smallest_subnormal)
    assert apply(rule, values, memory=memory + moved)[0] == 0


@pytest.mark.parametrize("rule", [*QUANTILE_RULES, *FOREIGN_RULES], ids=str)
@for_any(values=inner, shift=small_shifts, remembered=memories)
def test_equivariant_a_shift_of_the_data_is_taken_back(rule, values, shift, remembered):
    memory = np.full((1, rule.memory_size), remembered, "float32")
    moved, kept = apply(rule, values, memory=memory)
    shifted_memory = memory + shift if remembered > NOTHING_SEEN else memory
    shifted, shifted_kept = apply(rule, np.array(values) * 2.0**shift, memory=shifted_memory)
    assert shifted == moved - shift
    # Sums of float32 exponents, of at most 2**4, in another order.
    seen = kept > NOTHING_SEEN / 2
    np.testing.assert_allclose(shifted_kept[seen], kept[seen] + shift, atol=1e-5)
