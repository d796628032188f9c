"""Rules as pure functions of spectra."""

import keras
import numpy as np
import pytest

import tf_adaptive_ls as als
from tf_adaptive_ls import spectrum

FLOAT16 = als.FloatFormat("float16")
RULES = [als.QuantileRule(), als.QuantileRule(1e-2, 0), als.GaussianRule(), als.FixedRule()]


def counts(values):
    return np.array(spectrum.spectrum(np.abs(np.asarray(values, "float32")), FLOAT16))


def change(rule, values, peak=None):
    """What `rule` does to one layer whose gradients are `values`."""
    values = np.asarray(values, "float32")
    peak = np.max(np.abs(values)) if peak is None else peak
    result = rule(counts(values)[None], counts([peak])[None], FLOAT16)
    (result,) = np.array(result)
    assert result == int(result)
    return int(result)


def at(*exponents):
    return [2.0**e for e in exponents]


@pytest.mark.parametrize(
    ("exponents", "expected"),
    [
        ([0, -5], 0),  # all is well
        ([-14], 0),  # the smallest normal is good enough
        ([-15], 1),  # a subnormal is not
        ([-24], 10),
        ([-24, -10], 10),
        ([-24, 4], 8),  # as far as the headroom allows
        ([12], 0),  # three binades below overflow
        ([13], -1),
        ([15], -3),
        ([15, -24], -3),  # overflow wins
    ],
)
def test_the_quantile_rule(exponents, expected):
    assert change(als.QuantileRule(), at(*exponents)) == expected


def test_the_quantile_rule_tolerates_a_share():
    values = at(0) * 999 + at(-20)
    assert change(als.QuantileRule(underflow=1e-3), values) == 0
    assert change(als.QuantileRule(underflow=0.9e-3), values) == 6


def test_the_quantile_rule_takes_zeros_for_structure():
    assert change(als.QuantileRule(), at(0) * 10 + [0.0] * 1000) == 0


def test_a_layer_whose_gradients_all_underflowed_takes_all_the_room():
    assert change(als.QuantileRule(), [0.0] * 8, peak=2.0**-6) == 18
    assert change(als.QuantileRule(headroom=0), [0.0] * 8, peak=2.0**-6) == 21


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_who_saw_nothing_stays(rule):
    assert change(rule, [0.0] * 8) == 0
    assert change(rule, [np.nan] * 8, peak=np.nan) == 0


def test_the_gaussian_rule_reaches_its_target_on_normal_gradients():
    x = np.random.default_rng(0).normal(size=100_000) * 2.0**-22
    rule = als.GaussianRule(underflow=1e-2)
    # Rounded down to a power of two, it may miss the target by a factor of two.
    lost = np.mean(np.abs(x) * 2.0 ** change(rule, x) < FLOAT16.smallest_subnormal)
    assert 1e-2 <= lost < 2.2e-2


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("spread", [1, 4, 9])
def test_settled_after_one_move(rule, spread):
    x = np.exp2(np.random.default_rng(0).normal(size=4000) * spread - 6)
    x = np.clip(x, 2.0**-24, 2.0**15)
    for _ in range(3):
        moved = change(rule, x)
        x = x * 2.0**moved
    assert change(rule, x) == 0


def test_layers_are_independent_of_each_other():
    rng = np.random.default_rng(0)
    values = [np.exp2(rng.uniform(low, low + 8, 100)) for low in (-24, -12, 0, 8)]
    samples = np.stack([counts(v) for v in values])
    peaks = np.stack([counts([v.max()]) for v in values])
    for rule in RULES:
        together = np.array(rule(samples, peaks, FLOAT16))
        assert list(together) == [change(rule, v) for v in values]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_are_saved_with_every_field(rule):
    config = keras.saving.serialize_keras_object(rule)
    loaded = keras.saving.deserialize_keras_object(config)
    assert type(loaded) is type(rule) and loaded == rule
