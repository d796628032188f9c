"""From gradients to reports, and from reports to counts."""

import keras
import numpy as np
import pytest

import tf_adaptive_ls as als
from tests.backends import MODES, compiled
from tf_adaptive_ls.backend import devices
from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.evidence import Evidence, evidence_of
from tf_adaptive_ls.numerics.layer_facts import Flow, LayerFacts, Ownership
from tf_adaptive_ls.numerics.report import (
    SAMPLE_SIZE,
    SIZE,
    Report,
    report_of_arrived,
    report_of_produced,
    report_of_rounded,
)
from tf_adaptive_ls.numerics.tiny_unit import BOTTOM, TOP

FLOAT16, E4M3 = als.FloatFormat("float16"), als.FloatFormat("float8_e4m3fn")
FIRST = 2 + 5  # place of the first element of a sample
SMALL, LARGE = np.float16([0, -(2.0**-24)]), np.float16([1, -65504, 3])


def read(vector):
    report = Report.unpacked(np.array(vector))
    return Report(*keras.tree.map_structure(np.array, report[:2]))


def fields_of(report):
    return [*report.arrived, *report.produced]


def test_what_arrived_is_told_at_its_scale_and_at_that_of_the_layer():
    report = read(
        report_of_arrived(
            [SMALL, LARGE, np.float32([1e9])],
            [None, np.float32(0.25), np.float32(8)],
            at_s=[True, False, False],
            narrow=[True, True, False],
        )
    )
    assert report.arrived.at_s == 2.0**-24
    assert report.arrived.largest_at_own_scale == TOP < 4 * 65504
    assert (report.arrived.broken, report.arrived.shifted_broken) == (0, 1)
    assert report.arrived.number == 2
    np.testing.assert_array_equal(report.arrived.sample[:3], [0, 2.0**-24, 0])
    assert tuple(report.produced[:-1]) == (0, 0, 0, 0)


def test_what_is_produced_is_told_by_its_largest_and_smallest_peak():
    report = read(
        report_of_produced([SMALL, LARGE, np.float32([-1e9])], narrow=[True, True, False])
    )
    figures = report.produced.largest, report.produced.least, report.produced.broken
    assert figures == (65504, 2.0**-24, 0)
    assert report.produced.number == 5
    np.testing.assert_array_equal(
        report.produced.sample[:6], [0, 2.0**-24, *np.abs(LARGE.astype("float32")), 0]
    )
    assert report.arrived.at_s == report.arrived.number == 0


def rounded_of(*gradients, number=2, sampled=True):
    """The `Counts` of what one layer rounds, some of whose products have such gradients."""
    reports = [
        np.array(report_of_rounded(x, E4M3, place, number)) for place, x in enumerate(gradients)
    ]
    none = np.zeros((1, SIZE), "float32")
    evidence = evidence_of(
        Report.unpacked(none, sum(reports)[None]), [], facts_of(1), np.float32([0]), sampled
    )
    return [np.array(each)[0] for each in evidence.rounded]


def test_of_operands_each_product_has_a_place_of_its_own_in_the_sample():
    small, large = np.float16([2.0**-20, 1]), np.float16([-448, 3, 3, 0])
    saturated, sample, peaks = rounded_of(small, large)
    assert saturated == 0
    assert occupied(sample) == {"zero": 1, -20: 1, 0: 1, 8: 1, 1: 2}
    assert occupied(peaks) == {8: 1}
    _, sample, peaks = rounded_of(small, large, sampled=False)
    assert occupied(sample) == {} and occupied(peaks) == {8: 1}


def test_operands_saturate_whatever_dtype_they_have():
    for x in (np.float16([449, 1]), np.float32([1e30, 1])):
        saturated, sample, _ = rounded_of(x)
        assert saturated == 1 and occupied(sample) == {8 if x[0] < 1e3 else 15: 1, 0: 1}
    saturated, _, peaks = rounded_of(np.float32([np.inf]))
    assert saturated == 0 and occupied(peaks) == {15: 1}
    assert occupied(rounded_of(np.zeros(3, "float16"))[2]) == {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_told(value, mode):
    x = np.float16([1, value])
    arrived = compiled(
        lambda: report_of_arrived([x], [np.float32(8)], at_s=[True], narrow=[True]), mode=mode
    )
    produced = compiled(lambda: report_of_produced([x], narrow=[True]), mode=mode)
    arrived, produced = read(arrived()), read(produced())
    arrived, produced = arrived.arrived, produced.produced
    assert arrived.broken == arrived.shifted_broken == produced.broken == 1
    assert arrived.at_s == arrived.largest_at_own_scale == TOP
    assert produced.largest == produced.least == TOP


def test_what_is_too_small_for_any_narrow_format_is_told_as_no_zero():
    tiny = np.float32(2.0**100)
    report = report_of_arrived([SMALL], [tiny], at_s=[False], narrow=[True])
    assert read(report).arrived.largest_at_own_scale == BOTTOM


def test_reports_add_up():
    arrived = report_of_arrived([LARGE], [None], at_s=[True], narrow=[True])
    produced = report_of_produced([SMALL], narrow=[True])
    both = read(arrived + produced)
    assert arrived.shape == produced.shape == (SIZE,)
    assert (both.arrived.at_s, both.produced.largest) == (65504, 2.0**-24)
    assert (both.arrived.number, both.produced.number) == (3, 2)
    twice = read(arrived + produced + arrived)
    assert (twice.arrived.at_s, twice.arrived.number) == (2 * 65504, 6)
    assert twice.produced.largest == 2.0**-24
    assert twice.arrived.broken == 0


WALKS = {
    "clipped by value": lambda x: np.clip(x, -1e-12, 1e-12),
    "clipped by norm": lambda x: x * np.float32(1e-3 / max(np.sqrt(np.sum(x * x)), 1e-3)),
    "halved": lambda x: x / 2,
    "unscaled": lambda x: x / np.float32(2.0**15),
    "clipped, and of two micro-batches": lambda x: x * np.float32(0.3) + x * np.float32(0.3),
    "made as long as 1": lambda x: x * np.float32(2.0**70),
    "in bfloat16": lambda x: x.astype("bfloat16").astype("float32"),
}


@pytest.mark.parametrize("walk", WALKS)
def test_a_report_is_read_whatever_somebody_has_multiplied_it_by(walk):
    report = report_of_arrived([LARGE], [None], at_s=[True], narrow=[True])
    report = np.array(report + report_of_produced([SMALL], narrow=[True]))
    after = WALKS[walk](report)
    assert np.max(report) < 1e-19 and np.sum(report**2, dtype="float32") < 1e-36
    for expected, found in zip(fields_of(read(report)), fields_of(read(after)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2**-8)
    assert read(after).arrived.number == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e-3])
def test_a_report_that_was_written_over_tells_nothing(value, rng):
    report = np.array(report_of_arrived([LARGE], [None], at_s=[True], narrow=[True]))
    noise = np.full_like(report, value) if value != 1e-3 else rng.normal(size=SIZE) * value
    assert not any(map(np.any, fields_of(read((report + noise).astype("float32")))))
    assert not any(map(np.any, fields_of(read(report * 0))))


def facts_of(number, weights=None, num_weights=0, narrow=None):
    return LayerFacts(
        [FLOAT16] * number,
        [None] * number,
        narrow=np.ones(number, bool) if narrow is None else narrow,
        answerable=np.ones(number, bool),
        ownership=Ownership.of(weights or [[]] * number, [[]] * number, num_weights),
        flow=Flow.of_unrelated(number),
    )


def of_two_layers(
    gradients=(), owner=(), arrived=(), produced=(), r=(0, 0), sampled=True, narrow=None
):
    """Evidence of two layers, with gradients of weights and the layers that have them."""
    reports = []
    for layer in range(2):
        vector = np.zeros(SIZE, "float32")
        if layer < len(arrived):
            vector += report_of_arrived([arrived[layer]], [None], at_s=[True], narrow=[True])
        if layer < len(produced):
            vector += report_of_produced([produced[layer]], narrow=[True])
        reports.append(vector)
    weights = [[i for i, of in enumerate(owner) if of == layer] for layer in range(2)]
    evidence = evidence_of(
        Report.unpacked(np.stack(reports)),
        list(gradients),
        facts_of(2, weights, len(gradients), narrow),
        np.float32(r),
        sampled,
    )
    return Evidence(*keras.tree.map_structure(np.array, evidence[:-1]))


def occupied(counts):
    """How many gradients are in each binade; zeros under the name "zero"."""
    names = ["zero", *FLOAT16.exponents, "nonfinite"]
    return {name: int(n) for name, n in zip(names, counts, strict=True) if n}


def test_gradients_of_weights_count_at_the_scale_they_were_written_at():
    evidence = of_two_layers([np.float32([1.0]), np.float32([1.0, 4.0])], [0, 1], r=[5, -3])
    assert occupied(evidence.produced.peaks[0]) == {5: 2}
    assert occupied(evidence.produced.peaks[1]) == {-1: 2}
    # Each is gone through until there are as many elements as of any other.
    assert occupied(evidence.produced.sample[1]) == {-3: SAMPLE_SIZE / 2, -1: SAMPLE_SIZE / 2}
    assert evidence.finite and not evidence.arrived.sample.any()


def test_gradients_of_weights_of_16_bits_count_at_s_too():
    evidence = of_two_layers([np.float16([1.0, 4.0]), np.float32([8.0])], [0, 1], r=[5, 5])
    assert occupied(evidence.produced.peaks[0]) == {7: 2}
    assert occupied(evidence.arrived.peaks[0]) == {2: 1}
    assert occupied(evidence.arrived.sample[0]) == {0: SAMPLE_SIZE / 2, 2: SAMPLE_SIZE / 2}
    assert not evidence.arrived.peaks[1].any() and not evidence.arrived.sample[1].any()
    evidence = of_two_layers([np.float16([1.0, np.inf])], [0], r=[5, 5])
    assert occupied(evidence.arrived.peaks[0]) == {"nonfinite": 1}
    assert not evidence.arrived.beyond.any()


def test_without_a_sample_only_peaks_are_counted():
    large = LARGE.astype("float32")
    evidence = of_two_layers([large], [0], arrived=[SMALL], produced=[SMALL], sampled=False)
    assert not evidence.arrived.sample.any() and not evidence.produced.sample.any()
    assert occupied(evidence.arrived.peaks[0]) == {-24: 1}
    # Of the least and the largest that it made; and what it set out from.
    assert occupied(evidence.produced.peaks[0]) == {15: 1, -24: 1 + 1}
    assert occupied(evidence.produced.peaks[1]) == {}


def test_zeros_that_arrive_are_no_loss_and_zeros_that_a_layer_makes_are():
    zeros = np.zeros(4, "float16")
    evidence = of_two_layers(arrived=[zeros], produced=[LARGE, zeros])
    assert occupied(evidence.arrived.peaks[0]) == {}
    assert occupied(evidence.arrived.sample[0]) == {"zero": 4}
    assert occupied(evidence.produced.peaks[0]) == {15: 2}
    assert occupied(evidence.produced.peaks[1]) == {"zero": 1}


def test_what_is_broken_is_told_by_layer():
    broken = np.float16([np.nan])
    evidence = of_two_layers([np.float32([np.inf])], [1], arrived=[broken], produced=[LARGE])
    assert evidence.weights_broken == 1 and not evidence.finite
    assert evidence.arrived.beyond.tolist() == [1, 0]
    # The first set out from what was broken, the second has a broken weight gradient.
    assert evidence.produced.beyond.tolist() == [1, 1]


def test_gradients_of_wide_layers_count_only_as_broken_or_not():
    narrow = np.array([False, True])
    evidence = of_two_layers([np.float32([1e20])], [0], narrow=narrow)
    assert not evidence.produced.peaks.any() and not evidence.produced.beyond.any()
    evidence = of_two_layers([np.float32([np.nan])], [0], narrow=narrow)
    assert evidence.produced.beyond.tolist() == [1, 0]


def test_a_shared_weight_counts_for_the_innermost_layers_that_have_it():
    # Layer 1 is inside layer 0 and has weight 1; layer 2 shares weight 0 with layer 0.
    ownership = Ownership.of([[0, 1], [1], [0]], [[1], [], []], 2)
    own = [set(places[places < 2]) for places in ownership.places]
    assert own == [{0}, {1}, {0}]
    scales = np.array(ownership.scales(np.float32([3, 4, 5])))
    assert scales.tolist() == [2.0**3, 2.0 ** (3 + 4), 2.0**5]


def test_spectra_of_replicas_add_up_to_those_of_all():
    halves = [of_two_layers([half], [0]) for half in (np.float32([1, 2]), np.float32([4, 8]))]
    summed = Evidence.unpacked(halves[0].packed() + halves[1].packed(), 2)
    counts = np.array(summed.produced.sample[0])
    assert counts.sum() == 2 * SAMPLE_SIZE
    assert float(spectrum.top_exponent(counts, FLOAT16)) == 3


def test_a_gradient_has_vanished_only_where_it_has_on_all_replicas():
    gone = np.zeros(5, "float32")
    nothing = of_two_layers([gone, gone], [0, 1]).packed()
    something = of_two_layers([LARGE.astype("float32"), gone], [0, 1]).packed()
    seen = Evidence.unpacked(nothing + something + nothing, 2, num_replicas=3)
    assert list(np.array(seen.produced.peaks)[:, spectrum.ZERO]) == [0, 1]


@pytest.mark.parametrize("number", [2, 4])
def test_a_report_of_parts_is_that_of_the_whole(monkeypatch, number):
    def over_parts(function, tensors):
        divided = [np.split(np.array(x), number) if np.ndim(x) else [x] * number for x in tensors]
        parts = enumerate(zip(*divided, strict=True))
        return np.max([function(list(part), place, number) for place, part in parts], axis=0)

    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=(8, 500)).astype("float16") for _ in range(2)]
    divisors = [np.float32(2.0), None]
    options = {"at_s": [True, False], "narrow": [True, True]}
    whole = read(report_of_arrived(gradients, divisors, **options))
    least = read(report_of_produced(gradients, narrow=[True, True]))
    monkeypatch.setattr(devices, "max_over_shards", over_parts)
    parts = read(report_of_arrived(gradients, divisors, **options))
    least_of_parts = read(report_of_produced(gradients, narrow=[True, True]))
    assert parts.arrived[:4] == whole.arrived[:4]
    assert least_of_parts.produced.largest == least.produced.largest
    # No part knows which tensor has the smallest peak of all.
    assert 0 < least_of_parts.produced.least <= least.produced.least
    # A part of each is in the sample, and nothing twice.
    sample = parts.arrived.sample[: int(parts.arrived.number)]
    for place, part in enumerate(np.split(np.abs(gradients[0]), number)):
        of_part = sample[(np.arange(len(sample)) + FIRST) % number == place]
        assert np.all(np.isin(of_part, part)) and len(np.unique(of_part)) > 0.9 * len(of_part)
