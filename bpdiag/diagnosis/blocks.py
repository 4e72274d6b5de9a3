"""Residual blocks: what the skip carries down and what the branch, of the cotangent that arrives at their sum.

G^2 = skip^2 + branch^2 + 2 skip branch cos:  in x + f(x) the skip carries 1, the branch beta = |J_f^T g| / |g|
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bpdiag.trace import Layer, Trace


@dataclass(frozen=True)
class Block:
    """A place that is read twice or more, where one way leads straight to the sum; layers by index."""

    fork: int
    join: int
    skip: float
    branch: float  # of several, the norm of all, as if orthogonal


def blocks(trace: Trace, at: int) -> list[Block]:
    """The residual blocks whose every way was measured at the ``at``-th sampled step, in execution order."""
    joins, readers = joins_of(trace.layers), _readers(trace.layers)
    edges = trace.edges(at)

    def cotangent(i: int) -> float:
        norms = (trace.value(name, i, at) for name in ("g_z_norm", "g_a_norm"))
        return next((norm for norm in norms if norm is not None), math.nan)

    found = []
    for fork, above in enumerate(readers):
        join = joins[fork]
        if len(above) < 2 or join not in above or any((reader, fork) not in edges for reader in above):
            continue
        arrived = cotangent(join)
        shares = {r: edges[r, fork] * cotangent(r) / arrived if arrived else math.nan for r in above}
        branch = math.hypot(*(share for reader, share in shares.items() if reader != join))
        found.append(Block(fork, join, shares[join], branch))
    return found


def joins_of(layers: list[Layer]) -> list[int]:
    """Where all ways up from a layer meet again, one index a layer; len(layers) for nowhere before the loss.

    The immediate post-dominator in the graph of the layer table (Cooper, Harvey & Kennedy 2001).

    Example:
        >>> row = lambda name, *parents: Layer(name, 0, "linear", parents=parents)
        >>> joins_of([row("x"), row("f", 0), row("sum", 0, 1), row("head", 2)])
        [2, 2, 3, 4]
    """
    up = [len(layers)] * (len(layers) + 1)
    for i, above in reversed(list(enumerate(_readers(layers)))):
        for reader in above[:1]:
            up[i] = reader
        for reader in above[1:]:
            one, other = up[i], reader
            while one != other:
                one, other = (up[one], other) if one < other else (one, up[other])
            up[i] = one
    return up[:-1]


def _readers(layers: list[Layer]) -> list[list[int]]:
    """The layers that read each layer's output: those that ran after it."""
    above: list[list[int]] = [[] for _ in layers]
    for i, layer in enumerate(layers):
        for parent in layer.parents:
            if parent < i:
                above[parent].append(i)
    return above


def in_words(trace: Trace, at: int) -> str:
    """One sentence on the blocks of a step; empty without any.  Of several, medians and the branches' span."""
    found = [block for block in blocks(trace, at) if math.isfinite(block.skip) and math.isfinite(block.branch)]
    if not found:
        return ""
    skip, branch = (float(np.median([getattr(b, name) for b in found])) for name in ("skip", "branch"))
    if len(found) == 1:
        where = f"at {trace.layers[found[0].join].title}"
        span = ""
    else:
        where = f"in {len(found)} residual blocks"
        low, high = (f(b.branch for b in found) for f in (min, max))
        span = f" ({low:.2f} to {high:.2f})" if f"{low:.2f}" != f"{high:.2f}" else ""
    whole = math.hypot(skip, branch)
    return (
        f"{where} the skip carries {skip:.2f} of what arrives at the sum, the branch {branch:.2f}{span}: "
        f"together {whole:.2f} a block where they are orthogonal"
    )
