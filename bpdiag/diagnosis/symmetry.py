"""Units that begin as copies of each other and, getting the same gradient, stay so."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bpdiag.diagnosis.finding import Finding
from bpdiag.diagnosis.harm import verdict
from bpdiag.diagnosis.ledger import Profile

DISTINCT = 0.5  # of a layer's rows: at or under it each unit has a copy; random weights have 1
SETTLED = 3  # steps: a weight at 0 on purpose (a last layer, a branch, an adapter) has parted by then


def symmetric_initialization(p: Profile) -> Iterator[Finding]:
    """At most half the rows of a weight differ, and still after three updates: its units compute the same.

    Rows that are alike get alike gradients wherever the units above treat them alike, so they never part, whatever the
    width.  Random weights have no two alike.  A last layer, a branch or an adapter at 0 parts with its first gradient,
    which is why the first sample alone proves nothing.
    """
    distinct, there = (column[:, p.lines] for column in p.trace.column("W_distinct_rows"))
    units = np.array([p.trace.layers[i].units or 1 for i in p.lines])
    moves = (p.trace.told("learning_rate") != 0).any()
    settled = p.steps >= p.steps[0] + SETTLED
    alike = there & (distinct <= DISTINCT) & (units > 1) & settled[:, None] & p.finite[:, None]
    told = verdict(p, alike.any(axis=1)) if moves else None
    if told is None or told[0] != "harm":
        return
    _, quote, _, confidence = told
    where = np.flatnonzero(alike[quote].mean(axis=0) >= 0.5)
    if not where.size:
        return
    worst = int(where[np.argmax(units[where])])
    kinds, of = round(float(np.median(distinct[quote, worst])) * units[worst]), int(units[worst])
    size = p.trace.value("W_rms", p.lines[worst], 0)
    cause = "weights at 0" if size == 0 else "constant weights" if kinds == 1 else "weights repeated"
    more = where.size - 1
    others = f", and so it is in {more} more layer{'s' * (more > 1)}" if more else ""
    yield Finding(
        kind="symmetric_initialization",
        severity="warning" if p.converged[quote[-1]] else "harm",
        layers=p.names(where),
        onset_step=int(p.steps[0]),
        cause=cause,
        evidence={
            "distinct_units": float(kinds),
            "units": float(of),
            "layers": float(where.size),
            "loss": float(p.losses[quote[-1]]),
        },
        confidence=confidence,
        remedy="initialize the weights at random (nn.init.kaiming_normal_, or leave torch's default)",
        expected=f"different units in {p.title(worst)} from {kinds} to {of}",
        source="symmetry: equal units get equal gradients (Goodfellow, Bengio & Courville 2016, section 8.4)",
        sentence=f"The {of} units of {p.title(worst)} are {kinds} unit{'s' * (kinds > 1)} repeated{others}.",
        why=f"It began with {cause}: what computes the same gets the same gradient, and never parts.",
    )
