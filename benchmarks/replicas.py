"""How does the joint decision on all scales, and its cost, grow with the number of replicas?

Each of 1 … 1,024 simulated replicas has its own gradients: normally distributed in log2, in 30
layers with different means and spreads, with each replica off by half a binade (standard
deviation). Each replica samples and counts them as in training. The counts are summed and put
through the update until scales have settled. The table reports

    bytes       what each replica sends per step, in a collective of one tensor
    update      seconds from the sum to the new scales, compiled, the best of 20
    tail        error of the binade below which 1e-3 of a layer's gradients lie, against the true
                one of all replicas together: mean and standard deviation over layers and seeds
    same        layers whose scale is the one that the rule gives for the true distribution;
                and those within a binade of it
"""

import argparse
import math
import statistics
import time

import keras
import numpy as np
import tensorflow as tf

import tf_adaptive_ls as als
from benchmarks import report
from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.evidence import Evidence, evidence_of
from tf_adaptive_ls.numerics.layer_facts import Flow, LayerFacts, Ownership
from tf_adaptive_ls.numerics.report import SAMPLE_SIZE, Arrived, Produced, Report
from tf_adaptive_ls.numerics.scale_state import initial_layer_states, initial_loss_state
from tf_adaptive_ls.numerics.scale_update import update

REPLICAS = (1, 2, 8, 32, 128, 1024)
LAYERS, ELEMENTS, STEPS, BETWEEN_REPLICAS = 30, 1_000_000, 4, 0.5
FLOAT16 = als.FloatFormat("float16")
RULE = als.QuantileRule()
FACTS = LayerFacts(
    float_formats=[FLOAT16] * LAYERS,
    rounded_formats=[None] * LAYERS,
    narrow=np.ones(LAYERS, bool),
    answerable=np.ones(LAYERS, bool),
    ownership=Ownership.of([[]] * LAYERS, [[]] * LAYERS, 0),
    flow=Flow.of_unrelated(LAYERS),
)
NORMAL = statistics.NormalDist()


class Gradients:
    """log2 magnitudes of each layer's gradients: normal, with a small shift per replica."""

    def __init__(self, rng, replicas):
        self._rng = rng
        self.means = rng.uniform(-30, -8, LAYERS)
        self.spreads = rng.uniform(1, 4, LAYERS)
        self._shifts = rng.normal(0, BETWEEN_REPLICAS, (replicas, LAYERS))

    def sample(self, replica, log2_scales):
        """The float16 samples of a replica, `[LAYERS, SAMPLE_SIZE]`, and the largest."""
        means = self.means + self._shifts[replica] + log2_scales
        size = (LAYERS, SAMPLE_SIZE)
        sample = self._rng.normal(means[:, None], self.spreads[:, None], size)
        # The largest of many is at a uniform number to the power of 1 / many.
        tops = self._rng.uniform(size=LAYERS) ** (1 / ELEMENTS)
        largest = means + self.spreads * np.array([NORMAL.inv_cdf(top) for top in tops])
        with np.errstate(over="ignore"):
            return [np.exp2(x).astype("float16").astype("float32") for x in (sample, largest)]

    def true_tail(self, share=RULE.underflow):
        """The binade below which `share` of all gradients of all replicas lie, `[LAYERS]`."""
        return np.array([self._quantile(layer, share) for layer in range(LAYERS)])

    def true_counts(self, log2_scales):
        """The spectra of all gradients of all replicas at given scales."""
        means = self.means + self._shifts + log2_scales
        edges = np.array([*FLOAT16.exponents, FLOAT16.max_exponent + 1])
        z = (edges[:, None, None] - means) / self.spreads
        below = np.mean(0.5 * (1 + _erf(z / math.sqrt(2))), axis=1)
        binades = np.diff(below, axis=0, prepend=0.0)  # the lowest bin includes everything below it
        binades[1] += binades[0]
        counts = np.concatenate([np.zeros((1, LAYERS)), binades[1:], 1 - below[-1:]])
        return np.round(counts.T * ELEMENTS * len(self._shifts)).astype("float32")

    def _quantile(self, layer, share):
        low, high = -200.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            z = (middle - self.means[layer] - self._shifts[:, layer]) / self.spreads[layer]
            below = np.mean(0.5 * (1 + _erf(z / math.sqrt(2)))) < share
            low, high = (middle, high) if below else (low, middle)
        return math.floor(low)


_erf = np.vectorize(math.erf)


@tf.function
def evidence_of_replica(sample, largest, log2_scales):
    nothing = tf.zeros(LAYERS)
    seen = Report(
        Arrived(nothing, nothing, nothing, nothing, nothing, tf.zeros((LAYERS, SAMPLE_SIZE))),
        Produced(nothing, largest, largest, nothing + SAMPLE_SIZE, sample),
    )
    return evidence_of(seen, [], FACTS, log2_scales, True).packed()


def updater(replicas):
    """The compiled update of all scales from a sum of evidence."""

    @tf.function(jit_compile=True)
    def compiled(layers, loss, total):
        return update(
            layers,
            loss,
            Evidence.unpacked(total, LAYERS, replicas),
            FACTS,
            rule=RULE,
            restart=15.0,
            sample_every=10,
        )

    return compiled


def simulate(replicas, seed):
    """Figures of one simulation."""
    gradients = Gradients(np.random.default_rng(seed), replicas)
    compiled = updater(replicas)
    layers = initial_layer_states(LAYERS, RULE.memory_size)
    loss = initial_loss_state(15, 1, LAYERS, RULE.memory_size)
    for _ in range(STEPS):
        loss = loss._replace(steps_to_sample=np.int32(0))
        log2_scales = np.array(layers.log2_scales) + float(loss.log2_scale)
        total = 0.0
        for replica in range(replicas):
            seen = gradients.sample(replica, log2_scales)
            total += evidence_of_replica(*seen, tf.constant(log2_scales, "float32")).numpy()
        before = log2_scales
        layers, loss = compiled(layers, loss, total)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        compiled(layers, loss, total)[0].log2_scales.numpy()
        seconds.append(time.perf_counter() - start)

    evidence = Evidence.unpacked(total, LAYERS, replicas)
    tail = np.array(spectrum.quantile_exponent(evidence.produced.sample, RULE.underflow, FLOAT16))
    errors = tail - before - gradients.true_tail()
    scales = np.array(layers.log2_scales) + float(loss.log2_scale)
    ideal, _ = RULE(
        gradients.true_counts(before),
        evidence.produced.peaks,
        np.array(layers.memory) + before[:, None].astype("float32"),
        FLOAT16,
    )
    return {
        "bytes": int(total.size * 4),
        "seconds": min(seconds),
        "tail_errors": errors.tolist(),
        "scale_errors": (scales - before - np.array(ideal)).tolist(),
    }


def row(result):
    runs = result["runs"]
    tails = np.array([run["tail_errors"] for run in runs])
    scales = np.abs([run["scale_errors"] for run in runs])
    return (
        f"{result['replicas']:,}",
        f"{runs[0]['bytes']:,}",
        f"{min(run['seconds'] for run in runs) * 1e3:.1f} ms",
        f"{tails.mean():+.2f} ± {tails.std():.2f}",
        f"{np.mean(scales == 0):.0%}",
        f"{np.mean(scales <= 1):.0%}",
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "replicas")
    parser.add_argument("--only", nargs="+", type=int, choices=REPLICAS, metavar="REPLICAS")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(argv)
    numbers = args.only or (REPLICAS[:3] if args.quick else REPLICAS)
    names = {number: f"{number} replicas" for number in REPLICAS}
    with report.progress() as progress:
        task = progress.add_task("", total=len(numbers) * args.seeds)
        for number in numbers:
            progress.update(task, description=names[number])
            runs = []
            for seed in range(args.seeds):
                runs.append(simulate(number, seed))
                progress.advance(task)
                keras.backend.clear_session()
            report.save_result(
                args.output, {"name": names[number], "replicas": number, "runs": runs}
            )
    results = report.load_results(args.output, names.values())
    header = ["replicas", "bytes", "update", "tail, binades", "same scale", "within one"]
    text = (
        f"# {LAYERS} layers on many replicas\n\n"
        "What every replica sends per step, the time from the sum of that to new scales, how far "
        f"the binade of the {RULE.underflow:g} quantile is from the true one (mean ± standard "
        f"deviation over layers and {args.seeds} seeds), and how many scales are those that the "
        "rule gives for the true distribution.\n\n"
        f"{report.markdown(header, map(row, results))}\n\n{report.provenance_text(results)}\n"
    )
    report.save_text(args.output, text)


if __name__ == "__main__":
    main()
