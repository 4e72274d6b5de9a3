"""Residual blocks: what the skip carries down and what the branch, of the cotangent that arrives where they meet.

G^2 = skip^2 + branch^2 + 2 skip branch cos:  in x + f(x) the skip carries 1, the branch beta = |J_f^T g| / |g|
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bpdiag.trace import Layer, Trace

SUM = 1e-4  # of the skip's share from 1: where both ways meet is a sum and nothing else


@dataclass(frozen=True)
class Block:
    """A place read twice: one way leads straight to where both meet again, one over a branch; layers by index."""

    fork: int
    join: int
    skip: float
    branch: float


def blocks(trace: Trace, at: int) -> list[Block]:
    """The residual blocks whose two ways were measured at the ``at``-th sampled step, in execution order.

    Of several branches the norms do not tell their sum: such a place is none of them.  Nor is one where a weight layer
    reads both ways, as in a dense net.
    """
    joins, readers = joins_of(trace.layers), _readers(trace.layers)
    edges = trace.edges(at)

    def cotangent(i: int) -> float:
        norms = (trace.value(name, i, at) for name in ("g_z_norm", "g_a_norm"))
        return next((norm for norm in norms if norm is not None), math.nan)

    found = []
    for fork, above in enumerate(readers):
        join = joins[fork]
        if len(above) != 2 or join not in above or any((reader, fork) not in edges for reader in above):
            continue
        if trace.layers[join].is_weight_layer:
            continue
        arrived = cotangent(join)
        shares = {r: edges[r, fork] * cotangent(r) / arrived if arrived else math.nan for r in above}
        found.append(Block(fork, join, shares.pop(join), *shares.values()))
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
    """One sentence on the blocks of a step; empty without any.  Of several, medians and the branches' span.

    Where the meeting place is more than a sum (a norm or a relu behind it), its own slope is in both numbers.
    """
    found = [block for block in blocks(trace, at) if math.isfinite(block.skip) and math.isfinite(block.branch)]
    if not found:
        return ""
    skip, branch = (float(np.median([getattr(b, name) for b in found])) for name in ("skip", "branch"))
    at_sums = all(abs(b.skip - 1) < SUM for b in found)
    ends = {trace.layers[b.join].kind for b in found}
    end = "the sum" if at_sums else f"the {ends.pop()} behind the sum" if len(ends) == 1 else "the end of the block"
    if len(found) == 1:
        end = "the sum" if at_sums else trace.layers[found[0].join].title
        told, span = f"the skip carries {skip:.2f} of what arrives at {end}", ""
    else:
        told = f"in {len(found)} residual blocks the skip carries {skip:.2f} of what arrives at {end}"
        low, high = (f(b.branch for b in found) for f in (min, max))
        span = f" ({low:.2f} to {high:.2f})" if f"{low:.2f}" != f"{high:.2f}" else ""
    whole = f": {math.hypot(skip, branch):.2f} a block where they are orthogonal" if at_sums else ""
    return f"{told}, the branch {branch:.2f}{span}{whole}"
