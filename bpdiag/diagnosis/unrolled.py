"""Through time: a module that runs many times in one pass, how much of the cotangent each of its steps passes on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from bpdiag.diagnosis.finding import percent, power
from bpdiag.diagnosis.ledger import profile
from bpdiag.trace import Layer, Trace


def steps(layers: Sequence[Layer], name: str) -> list[int]:
    """The calls of a module that are time steps, as indices: each computed from the one before; the most in a row.

    A module that several inputs share, or two sequences that a cell reads in turn, is called often and has none.

    Example:
        >>> shared = [Layer("e", 0, "linear"), Layer("e", 1, "linear")]
        >>> steps(shared, "e"), steps([shared[0], Layer("e", 1, "linear", parents=(0,))], "e")
        ([0], [0, 1])
    """
    best, run = list[int](), list[int]()
    for i in (i for i, layer in enumerate(layers) if layer.name == name):
        run = [*run, i] if run and _descends(layers, i, run[-1]) else [i]
        best = max(best, run, key=len)
    return best


def unrolled(layers: Sequence[Layer], names: Iterable[str]) -> set[int]:
    """The calls, as indices, of those of these modules that have three time steps or more."""
    runs = [steps(layers, name) for name in names]
    return {i for run in runs if len(run) >= 3 for i in run}


def _descends(layers: Sequence[Layer], child: int, ancestor: int) -> bool:
    seen, waiting = set[int](), [child]
    while waiting:
        above = {i for i in layers[waiting.pop()].parents if i >= ancestor} - seen
        seen |= above
        waiting.extend(above)
    return ancestor in seen


def in_words(trace: Trace, at: int) -> str:
    """One sentence on the module of a step with most time steps (``steps``); empty where none has three.

    The gain of a time step is the geometric mean from the last call down to the first that receives anything; calls
    below that are told: what they read is forgotten.
    """
    p = profile(trace)
    runs = [steps(trace.layers, name) for name in dict.fromkeys(trace.layers[i].name for i in p.lines)]
    run = max(runs, key=len, default=[])
    calls = np.flatnonzero(np.isin(p.lines, run))
    decades = p.decades[at, calls]
    if len(calls) < 3 or np.isnan(decades).any() or not math.isfinite(decades[-1]):
        return ""
    name, reached = trace.layers[run[0]].name, np.flatnonzero(np.isfinite(decades))
    passed = len(calls) - 1 - int(reached[0])
    gain = 10 ** ((decades[-1] - decades[reached[0]]) / -passed) if passed else 0.0
    told = f"through time: {name} runs {len(calls)} times, and a step passes on {gain:.3g} of what arrives"
    if reached[0]:
        share = percent(reached[0] / len(calls))
        return f"{told}; the first {reached[0]} ({share}) receive exactly 0: what they read is forgotten"
    return f"{told}; the first receives {power(decades[0] - decades[-1])} of what the last does"
