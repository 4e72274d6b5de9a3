"""Two runs side by side: what was asked differently, and the first number that parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bpdiag.config import dotted
from bpdiag.trace import COLUMNS, Trace

# in the order of a step: forward, backward, update
ORDER = (
    [c for c in COLUMNS if c.startswith(("x_", "z_", "a_", "slope_rms", "forward"))]
    + [c for c in COLUMNS if c.startswith(("g_z", "g_a"))]
    + [c for c in COLUMNS if c.startswith(("g_W", "dW", "update"))]
)


@dataclass(frozen=True)
class Parting:
    """The first number of two runs that is not the same."""

    step: int
    layer: str  # name#call; empty for the loss
    column: str
    values: tuple[float, float]

    def __str__(self) -> str:
        where = f" of {self.layer}" if self.layer else ""
        return f"step {self.step}, {self.column}{where}: {self.values[0]:.9g} against {self.values[1]:.9g}"


@dataclass(frozen=True)
class Difference:
    """What differs between two traces."""

    asked: dict[str, tuple[Any, Any]]  # key -> both values: configuration, optimizer, versions
    layers: str  # how the layer tables differ; empty if they do not
    parting: Parting | None
    common_steps: int  # sampled in both

    def __str__(self) -> str:
        asked = [f"{key}: {one} against {other}" for key, (one, other) in self.asked.items()]
        same = f"no number parts in {self.common_steps} sampled steps"
        told = f"the numbers part at {self.parting}" if self.parting else same
        return "\n".join([*asked, *filter(None, [self.layers]), told])


def compare(a: Trace, b: Trace) -> Difference:
    """What was asked differently, and where the numbers part: the first step, then execution order, bit for bit.

    nan equals nan, missing equals missing.  Of steps that only one of them sampled nothing is said; a loss that parts
    between two samples is told.
    """
    flat_a, flat_b = (dotted({k: t.meta.get(k, {}) for k in ("config", "optimizer", "versions")}) for t in (a, b))
    keys = dict.fromkeys([*flat_a, *flat_b])
    asked = {k: (flat_a.get(k), flat_b.get(k)) for k in keys if flat_a.get(k) != flat_b.get(k)}
    names_a, names_b = [x.key for x in a.layers], [x.key for x in b.layers]
    layers = ""
    if names_a != names_b:
        one = [name for name in names_a if name not in names_b]
        other = [name for name in names_b if name not in names_a]
        layers = f"{len(names_a)} layers against {len(names_b)}"
        layers += f"; only in the first: {', '.join(one[:5])}{', ...' * (len(one) > 5)}" if one else ""
        layers += f"; only in the second: {', '.join(other[:5])}{', ...' * (len(other) > 5)}" if other else ""
    common = np.intersect1d(a.sampled_steps, b.sampled_steps)
    partings = [p for p in (_first_number(a, b, common), _first_loss(a, b)) if p is not None]
    return Difference(asked, layers, min(partings, key=lambda p: p.step, default=None), len(common))


def _first_number(a: Trace, b: Trace, common: np.ndarray) -> Parting | None:
    index_b = {layer.key: j for j, layer in enumerate(b.layers)}
    pairs = [(i, index_b[layer.key]) for i, layer in enumerate(a.layers) if layer.key in index_b]
    if not pairs or not len(common):
        return None
    rows = [np.searchsorted(t.sampled_steps, common) for t in (a, b)]
    lines = [np.array(side) for side in zip(*pairs, strict=True)]
    found: list[tuple[tuple[int, int, int], Parting]] = []
    for rank, column in enumerate(ORDER):
        (va, ta), (vb, tb) = (
            tuple(x[np.ix_(r, ls)] for x in t.column(column)) for t, r, ls in zip((a, b), rows, lines, strict=True)
        )
        parts = (ta != tb) | (ta & tb & ~((va == vb) | (np.isnan(va) & np.isnan(vb))))
        if parts.any():
            s = int(np.flatnonzero(parts.any(1))[0])
            at = int(np.flatnonzero(parts[s])[0])
            backward = column.startswith("g_")
            if backward:
                at = int(np.flatnonzero(parts[s])[-1])
            told = Parting(int(common[s]), a.layers[pairs[at][0]].key, column, (float(va[s, at]), float(vb[s, at])))
            phase = 0 if rank < _phases()[0] else 1 if rank < _phases()[1] else 2
            found.append(((int(common[s]), phase, -at if backward else at), told))
    return min(found, key=lambda f: f[0])[1] if found else None


def _phases() -> tuple[int, int]:
    """Where in ORDER the backward begins, and where the update does."""
    first = next(i for i, c in enumerate(ORDER) if c.startswith("g_"))
    return first, next(i for i, c in enumerate(ORDER) if c.startswith("g_W"))


def _first_loss(a: Trace, b: Trace) -> Parting | None:
    (steps_a, loss_a), (steps_b, loss_b) = a.losses, b.losses
    steps, at_a, at_b = np.intersect1d(steps_a, steps_b, return_indices=True)
    one, other = loss_a[at_a], loss_b[at_b]
    parts = np.flatnonzero(~((one == other) | (np.isnan(one) & np.isnan(other))))
    if not len(parts):
        return None
    i = parts[0]
    return Parting(int(steps[i]), "", "loss", (float(one[i]), float(other[i])))
