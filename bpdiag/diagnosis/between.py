"""Functions between layers: what no module computes, and how much of the cotangent it passes on."""

from __future__ import annotations

import math

import numpy as np

from bpdiag.trace import Trace

MOST_KINDS = 4  # told in one sentence


def in_words(trace: Trace, at: int) -> str:
    """One sentence on the functions of a step that were measured, by kind, the most frequent first; empty without any.

    Of a way with several sources (the queries, keys and values of an attention) the norm of all together.
    """
    arrived: dict[tuple[int, tuple[str, ...]], list[float]] = {}
    for (reader, parent), gain in trace.gaps(at).items():
        layer = trace.layers[reader]
        functions = layer.gap[layer.parents.index(parent)]
        arrived.setdefault((reader, functions), []).append(gain)
    kinds: dict[tuple[str, ...], list[float]] = {}
    for (_, functions), gains in arrived.items():
        if all(map(math.isfinite, gains)):
            kinds.setdefault(functions, []).append(math.hypot(*gains))
    ranked = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    told = [_kind(functions, gains) for functions, gains in ranked[:MOST_KINDS]]
    more = f"; and {len(ranked) - MOST_KINDS} other kinds" if len(ranked) > MOST_KINDS else ""
    return f"functions between layers pass on, of what comes to them: {'; '.join(told)}{more}" if told else ""


def _kind(functions: tuple[str, ...], gains: list[float]) -> str:
    low, high = f"{min(gains):.2g}", f"{max(gains):.2g}"
    span = f" ({low} to {high})" if low != high else ""
    places = f" in {len(gains)} places" if len(gains) > 1 else ""
    return f"{' then '.join(functions)} {np.median(gains):.2g}{span}{places}"
