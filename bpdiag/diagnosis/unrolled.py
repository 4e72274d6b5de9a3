"""Through time: a module that runs many times in one pass, how much of the cotangent each of its steps passes on."""

from __future__ import annotations

import math

import numpy as np

from bpdiag.diagnosis.finding import percent, power
from bpdiag.diagnosis.ledger import profile
from bpdiag.trace import Trace

LEAST_CALLS = 3


def in_words(trace: Trace, at: int) -> str:
    """One sentence on the module of a step that runs most often; empty where none runs three times.

    The gain of a time step is the geometric mean from the last call down to the first that receives anything; calls
    below that are told: what they read is forgotten.
    """
    p = profile(trace)
    names = [trace.layers[i].name for i in p.lines]
    name = max(names, key=names.count, default="")
    calls = [k for k, other in enumerate(names) if other == name]
    decades = p.decades[at, calls] if calls else np.empty(0)
    if len(calls) < LEAST_CALLS or np.isnan(decades).any() or not math.isfinite(decades[-1]):
        return ""
    reached = np.flatnonzero(np.isfinite(decades))
    steps = len(calls) - 1 - int(reached[0])
    gain = 10 ** ((decades[-1] - decades[reached[0]]) / -steps) if steps else 0.0
    told = f"through time: {name} runs {len(calls)} times, and a step passes on {gain:.3g} of what arrives"
    if reached[0]:
        share = percent(reached[0] / len(calls))
        return f"{told}; the first {reached[0]} ({share}) receive exactly 0: what they read is forgotten"
    return f"{told}; the first receives {power(decades[0] - decades[-1])} of what the last does"
