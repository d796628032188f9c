"""Spends a budget of bytes on the channels with the largest output errors."""

import numpy as np
from numpy.typing import NDArray

from tf_adaptive_ls.deploy import grids
from tf_adaptive_ls.deploy.grids import Points
from tf_adaptive_ls.deploy.sites import Site

# The bits, and the largest number of points, of a channel that the budget is spent on.
MORE_BITS = 8
MOST_POINTS = 3


def with_budget(
    sites: list[Site], points: list[Points], method: str, budget: float
) -> list[Points]:
    """Gives more bits, or more points, to the channels that need them most."""
    left = budget * sum(each.bytes.sum() for each in points)
    points = list(points)
    while True:
        # For each channel: the cost of the next step, and the output error per byte of the cost.
        costs = [_costs(p, method) for p in points]
        worth = [s.output_errors(p) / c for s, p, c in zip(sites, points, costs, strict=True)]
        of_all = np.concatenate(worth)
        places = np.concatenate([np.full(len(w), i) for i, w in enumerate(worth)])
        channels = np.concatenate([np.arange(len(w)) for w in worth])
        order = np.argsort(-of_all, kind="stable")
        order = order[of_all[order] > 0]
        spent = np.cumsum(np.concatenate(costs)[order])
        # Buy in order of gain while the budget lasts; the gain of a channel does not depend on the
        # others.
        taken = order[spent <= left]
        if not len(taken):
            return points
        left -= spent[len(taken) - 1]
        for i in set(places[taken]):
            chosen = np.sort(channels[taken][places[taken] == i])
            points[i] = _improved(sites[i], points[i], chosen, method)


def _costs(points: Points, method: str) -> NDArray[np.floating]:
    """The bytes that the next step would cost each channel. Infinite if there is none."""
    inputs = points.integers.shape[-1]
    if method == "multipoint":
        costs = grids.bytes_of_points(np.ones_like(points.counts), inputs, points.bits)
        return np.where(points.counts < MOST_POINTS, costs, np.inf)
    more = np.full_like(points.bits, MORE_BITS)
    costs = grids.bytes_of_points(points.counts, inputs, more) - points.bytes
    return np.where(points.bits < MORE_BITS, costs, np.inf)


def _improved(site: Site, points: Points, channels: NDArray[np.int64], method: str) -> Points:
    if method != "multipoint":
        return points.replaced(channels, grids.best_scale(site.flat[channels], MORE_BITS))
    for count in set(points.counts[channels]):
        some = channels[points.counts[channels] == count]
        bits = int(points.bits[some[0]])
        better = grids.multipoint(site.flat[some], bits, int(count) + 1)
        points = points.replaced(some, better)
    return points
