"""Quadrature of a function over 0 … 1.

Each rule is a generator that yields pairs of a number of intervals and an estimate, with more
and more intervals. Evaluations of the function are reused. The function maps a float to an
array.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

Estimates: TypeAlias = Iterator[tuple[int, np.ndarray]]


def simpson(function: Callable[[float], np.ndarray]) -> Estimates:
    """Simpson's rule with 2, 4, 8, … intervals. Exact for polynomials of degree three."""
    ends, middles = function(0.0) + function(1.0), function(0.5)
    inner = np.zeros_like(ends)
    for intervals in (2**k for k in itertools.count(1)):
        yield intervals, (ends + 2 * inner + 4 * middles) / (3 * intervals)
        inner = inner + middles
        middles = np.zeros_like(ends)
        for k in range(intervals):
            middles += function((2 * k + 1) / (2 * intervals))


def trapezoid(function: Callable[[float], np.ndarray]) -> Estimates:
    """The trapezoidal rule with one interval. Exact for polynomials of degree one."""
    yield 1, (function(0.0) + function(1.0)) / 2


def first_order(function: Callable[[float], np.ndarray]) -> Estimates:
    """The value at the start, as in a first-order Taylor expansion."""
    yield 1, function(0.0)


RULES = {"simpson": simpson, "trapezoid": trapezoid, "first order": first_order}
