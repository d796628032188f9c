"""`quantize_weights`: makes a plain Keras model with weights of few bits."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import tree
from rich.progress import track

from tf_adaptive_ls.backend.arguments import is_number, is_whole
from tf_adaptive_ls.backend.batches import batches_of
from tf_adaptive_ls.backend.functions import belong_to
from tf_adaptive_ls.backend.keras_internals import layers_in, parts_of
from tf_adaptive_ls.backend.layer_filter import LayerFilter, check_layer_filter, with_path
from tf_adaptive_ls.backend.model_copy import rebuilt_from_config
from tf_adaptive_ls.backend.routes import Route
from tf_adaptive_ls.deploy import adaround, grids
from tf_adaptive_ls.deploy.budget import with_budget
from tf_adaptive_ls.deploy.folding import folded
from tf_adaptive_ls.deploy.graphs import is_graph, rebuilt
from tf_adaptive_ls.deploy.grids import Points
from tf_adaptive_ls.deploy.kernels import kernels_of
from tf_adaptive_ls.deploy.moments import Moments
from tf_adaptive_ls.deploy.report import QuantizationReport, QuantizedKernel
from tf_adaptive_ls.deploy.sites import Site
from tf_adaptive_ls.deploy.wide_layers import can_be_wide, split, wide

METHODS = ("nearest", "mse", "multipoint", "mixed", "adaround")


def quantize_weights(
    model: keras.Model,
    calibration: Any,
    bits: int = 4,
    *,
    method: str = "adaround",
    budget: float = 0.0,
    first_and_last_bits: int | None = 8,
    layer_filter: LayerFilter | None = None,
    steps: int = 2000,
    verbose: bool = True,
) -> tuple[keras.Model, QuantizationReport]:
    """Quantizes the weights of a trained model to few bits, with a scale for each channel.

    The result is a plain Keras model that computes in float32 with the quantized weights. In
    Sequential and Functional models, batch normalization is first folded into the layer before it.

    | method | how a channel is quantized | source |
    |---|---|---|
    | "nearest" | its largest weight becomes the largest integer | min-max |
    | "mse" | with the scale that has the smallest squared error of the weights | |
    | "multipoint" | as "mse", or as a sum of two or three integers | Liu et al., AAAI 2021 |
    | "mixed" | as "mse", or in 8 bits | |
    | "adaround" | as "mixed"; whether to round up or down is learned | Nagel et al., ICML 2020 |

    With a budget, some channels get several integers, or 8 bits. The budget goes to the channels
    with the largest output error on calibration data, relative to the outputs of the layer, per
    byte.

    ```python
    plain = als.plain_copy(model, dtype="float32")
    small, report = als.quantize_weights(plain, x, bits=4)
    print(report)
    small.save("small.keras")
    ```

    Args:
        model: A built, plain `keras.Model`; see `plain_copy`. It is not changed.
        calibration: Inputs, or data as for `fit`, whose targets are ignored. About a hundred
            examples are enough.
        bits: 2 … 8, per weight. Integers are from -q to q, with q = 2^(bits - 1) - 1.
        method: One of the methods above.
        budget: Additional bytes, as a share of the bytes that `bits` bits per weight take: 0.1 for
            10 %. Only "multipoint", "mixed" and "adaround" use it.
        first_and_last_bits: Bits of the layers that are called first and last. `None` for `bits`.
        layer_filter: Function `layer -> bool` or `(layer, path) -> bool`. Layers for which it
            returns false stay in float32. `path` is the name of the layer after the names of the
            models and layers that contain it: `"encoder/dense_1"`.
        steps: Number of optimizer steps per kernel with "adaround".
        verbose: Whether to show progress.

    Returns:
        The quantized model, and a `QuantizationReport`.

    Raises:
        ValueError: If an argument is not as described, if the model has no layer that can be
            quantized or has layers of this library, or if weights or inputs of layers are not
            finite.
    """
    _check_model(model)
    _check_arguments(bits, method, budget, first_and_last_bits, steps)
    check_layer_filter(layer_filter, "quantize")
    model = _copy(model)
    sites = _sites(model, with_path(layer_filter))
    if not sites:
        raise ValueError(
            "`quantize_weights` expected a model with Dense, EinsumDense or convolutional layers "
            f"of Keras. Received: model '{model.name}', which has none"
            + (" for which `layer_filter` is true." if layer_filter else ".")
        )
    sites = _observed(model, sites, _inputs(calibration), verbose)
    of_sites = [bits] * len(sites)
    if first_and_last_bits is not None:
        of_sites[0] = of_sites[-1] = first_and_last_bits
    quantize = grids.nearest if method == "nearest" else grids.best_scale
    points = [quantize(s.flat, b) for s, b in zip(sites, of_sites, strict=True)]
    if budget:
        points = with_budget(sites, points, method, budget)
    if method == "adaround":
        work = list(zip(sites, points, strict=True))
        shown = track(work, "Learning to round", disable=not verbose)
        points = [adaround.rounded(s.weights, p, s.moments, steps) for s, p in shown]
    report = _report(model, sites, points)
    return _with_points(model, sites, points), report


def _copy(model: keras.Model) -> keras.Model:
    """A copy in float32 with batch normalizations folded."""
    try:
        copy = rebuilt_from_config(model, dtype="float32")
        result = folded(copy)
        return copy if result is copy else rebuilt_from_config(result)
    except Exception as error:
        raise ValueError(
            "`quantize_weights` expected a built model that can be made anew from its config. "
            f"Received: model '{model.name}': {error} Give its class a `get_config`."
        ) from error


def _sites(model: keras.Model, wants: Callable[[keras.layers.Layer, str], bool]) -> list[Site]:
    sites = []
    for path, layer in _with_paths(model, "", set()):
        kernels = kernels_of(layer) if layer.built else []
        if not kernels or not wants(layer, path):
            continue
        for kernel in kernels:
            weights = kernel.matrix(np.asarray(keras.ops.convert_to_numpy(kernel.variable)))
            if not np.isfinite(weights).all():
                raise ValueError(
                    "`quantize_weights` expected weights that are finite. Received: "
                    f"'{kernel.variable.path}' with NaN or infinity in it."
                )
            moments = Moments(weights.shape[0], weights.shape[-1])
            sites.append(Site(layer, kernel, weights, moments))
    return sites


def _with_paths(
    layer: keras.layers.Layer, prefix: str, seen: set[int]
) -> Iterator[tuple[str, keras.layers.Layer]]:
    """All layers at any depth, each once, with their paths."""
    for each in layers_in(layer):
        if id(each) not in seen:
            seen.add(id(each))
            yield prefix + each.name, each
            yield from _with_paths(each, f"{prefix}{each.name}/", seen)


def _observed(
    model: keras.Model, sites: list[Site], inputs: Iterable[Any], verbose: bool
) -> list[Site]:
    """Runs the model on calibration data. Returns the sites in the order of calls."""
    order: list[Site] = []
    routes = []
    for layer in {id(site.layer): site.layer for site in sites}.values():
        own = [site for site in sites if site.layer is layer]

        def run(original: Any, args: Any, kwargs: Any, own: list[Site] = own) -> Any:
            x = args[0] if args else kwargs["inputs"]
            order.extend(site for site in own if site not in order)
            if belong_to(None, [x]):  # otherwise the call is traced, and its inputs have no values
                for site in own:
                    for rows in site.kernel.rows(x):
                        site.moments.add(rows)
            return original(*args, **kwargs)

        routes.append(Route(layer, "call", run))
    try:
        for x in track(inputs, "Calibrating", disable=not verbose):
            model(x, training=False)
    finally:
        for route in routes:
            route.end()
    for site in order:
        if not site.moments.is_finite:
            raise ValueError(
                "`quantize_weights` expected calibration data that give finite numbers. Received: "
                f"NaN or infinity in the inputs of '{site.kernel.variable.path}'."
            )
    return order + [site for site in sites if site not in order]


def _inputs(calibration: Any) -> list[Any]:
    """The inputs of the batches of `data`."""
    if _is_array(calibration) or isinstance(calibration, dict):
        batches = [x for (x, _) in batches_of((calibration, None))]
    else:
        batches = [keras.utils.unpack_x_y_sample_weight(b)[0] for b in batches_of(calibration)]
    if not any(np.size(leaf) for x in batches for leaf in tree.flatten(x)):
        raise ValueError(
            "`quantize_weights` expected at least one example in `calibration`. Received: none."
        )
    return batches


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _report(model: keras.Model, sites: list[Site], points: list[Points]) -> QuantizationReport:
    kernels = []
    for site, each in zip(sites, points, strict=True):
        norms = np.linalg.norm(site.flat.astype(np.float64), axis=1)
        errors = np.linalg.norm(each.values.astype(np.float64) - site.flat, axis=1)
        kernels.append(
            QuantizedKernel(
                name=site.kernel.variable.path,
                shape=tuple(site.kernel.variable.shape),
                bits=each.bits,
                points=each.counts,
                bytes=each.bytes,
                weight_error=errors / np.where(norms == 0, 1, norms),
                output_error=np.sqrt(site.output_errors(each)),
                positions=site.moments.positions,
            )
        )
    quantized = {id(site.kernel.variable) for site in sites}
    others = [w for w in model.weights if id(w) not in quantized]
    return QuantizationReport(
        kernels=tuple(kernels),
        not_quantized=tuple(w.path for w in others),
        other_bytes=4 * sum(int(np.prod(w.shape)) for w in others),
    )


def _with_points(model: keras.Model, sites: list[Site], points: list[Points]) -> keras.Model:
    """The model with quantized weights, and with additional channels for additional points."""
    for site, each in zip(sites, points, strict=True):
        matrix = each.values.reshape(site.weights.shape)
        site.kernel.variable.assign(site.kernel.kernel(matrix))
    in_graph = _layers_of_graphs(model) if is_graph(model) else set()
    parts: dict[int, list[Any]] = {}
    for layer in {id(site.layer): site.layer for site in sites}.values():
        own = [p for site, p in zip(sites, points, strict=True) if site.layer is layer]
        many = any(len(p.scales) > 1 and p.scales[1:].any() for p in own)
        if many and id(layer) in in_graph and can_be_wide(layer):
            parts[id(layer)] = [
                part
                for each, p in zip(split(layer), own, strict=True)
                for part in (wide(each, p) if p.scales[1:].any() else [each])
            ]
    return rebuilt_from_config(rebuilt(model, parts)) if parts else model


def _layers_of_graphs(model: keras.Model) -> set[int]:
    """The `id` of each layer in the graph of a model and of nested models."""
    found = set()
    for layer in layers_in(model):
        found |= _layers_of_graphs(layer) if is_graph(layer) else {id(layer)}
    return found


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            "`quantize_weights` expected a built keras.Model. Received: "
            f"{model!r} (of type {type(model).__name__}). Call it on a batch of data first."
        )
    own = [p.name for p in parts_of(model) if type(p).__module__.startswith(__package__[:14])]
    if own:
        raise ValueError(
            "`quantize_weights` expected a plain model. Received: "
            f"model '{model.name}', in which these are of this library: {own[:5]}. Quantize "
            '`als.plain_copy(model, dtype="float32")`.'
        )


def _check_arguments(
    bits: Any, method: Any, budget: Any, first_and_last_bits: Any, steps: Any
) -> None:
    for name, value in {"bits": bits, "first_and_last_bits": first_and_last_bits}.items():
        if not ((is_whole(value, 2) and value <= 8) or (name != "bits" and value is None)):
            raise ValueError(f"Expected `{name}` to be 2 … 8. Received: {name}={value!r}.")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"Expected `method` to be one of {METHODS}. Received: method={method!r}.")
    if not is_number(budget) or not 0 <= budget < np.inf:
        raise ValueError(
            "Expected `budget` to be a share of bytes, such as 0.1 for 10 % more, and not below 0. "
            f"Received: budget={budget!r}."
        )
    if budget and method in ("nearest", "mse"):
        raise ValueError(
            f"Expected `budget` to be 0 with method {method!r}, which spends none. Received: "
            f"budget={budget!r}. Choose 'mixed', 'multipoint' or 'adaround'."
        )
    if not is_whole(steps, 1):
        raise ValueError(f"Expected `steps` to be a whole number, 1 or more. Received: {steps=}.")
