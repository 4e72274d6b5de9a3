"""What a half-precision format cannot hold: an eps, a gradient, a step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bpdiag.diagnosis.finding import Finding, percent
from bpdiag.diagnosis.harm import verdict
from bpdiag.diagnosis.ledger import Profile

HALF = ("float16", "bfloat16")
SMALLEST_HALF = 2.0**-24  # of float16, subnormal: what is under half of it is 0
ROUNDED = 0.9  # of a weight's elements with a gradient do not change


def precision(p: Profile) -> Iterator[Finding]:
    """Half precision where it loses what matters: the optimizer's eps is 0, gradients are 0, steps round away.

    float16 ends at 6e-8 below; a step under half the distance to the next number (2^-9 of a bfloat16, 2^-12 of a
    float16) is no step.  The last two are harm with a plateau only: a master weight or a scaler may be kept elsewhere.
    """
    if not p.lines or not len(p.steps):
        return
    yield from _eps(p)
    yield from _underflow(p)
    yield from _rounded(p)


def _eps(p: Profile) -> Iterator[Finding]:
    optimizer = p.trace.meta.get("optimizer", {})
    eps = float(optimizer.get("eps", 0.0) or 0.0)
    if optimizer.get("dtype") != "float16" or not 0 < eps < SMALLEST_HALF / 2:
        return
    broken = not bool(p.finite[-1]) or not np.isfinite(p.trace.losses[1]).all()
    yield _finding(
        p,
        cause="the optimizer's eps is 0 in float16",
        severity="harm" if broken or p.plateau[-1] else "warning",
        where=range(len(p.lines)),
        evidence={"eps": eps, "smallest": SMALLEST_HALF},
        remedy=f"raise eps from {eps:g} to 1e-4, or keep float32 weights (autocast)",
        expected="a step that is finite where the gradient is 0",
        sentence=f"The optimizer divides by 0: its eps of {eps:g} is 0 in float16.",
        why="Where a gradient is 0, or its square is, the step is 0/0.",
    )


def _underflow(p: Profile) -> Iterator[Finding]:
    """Cotangents so small that most elements are 0."""
    held = np.array([p.trace.layers[i].dtype == "float16" for i in p.lines])
    scale = np.nan_to_num(p.trace.told("loss_scale"), nan=1.0)[:, None]
    sent = p.trace.column("g_z_rms")[0][:, p.lines] * scale
    lost = held & (sent < SMALLEST_HALF)
    told = verdict(p, (lost.sum(axis=1) * 2 >= max(held.sum(), 1)) & held.any() & p.plateau & p.finite & ~p.converged)
    if told is None or told[0] != "harm":
        return
    _, quote, onset, confidence = told
    where = np.flatnonzero(lost[quote].mean(axis=0) >= 0.5)
    typical = float(np.median(sent[quote][:, where]))
    yield _finding(
        p,
        cause="gradients underflow in float16",
        severity="harm",
        where=where,
        onset=onset,
        confidence=confidence,
        evidence={"cotangent_rms": typical, "smallest": SMALLEST_HALF},
        remedy="scale the loss (torch.amp.GradScaler), or take bfloat16",
        expected=f"rms of a cotangent from {typical:.1g} to {2.0**-14:.1g} or more",
        sentence=f"Gradients underflow: float16 ends at 6e-8, their rms in {where.size} layers is {typical:.1g}.",
        why="What is under half the smallest number is 0.",
    )


def _rounded(p: Profile) -> Iterator[Finding]:
    """Steps too small to change the weights that they are added to."""
    share = p.trace.column("dW_rounded_fraction")[0][:, p.lines]
    known = np.isfinite(share)
    rate = p.trace.told("learning_rate")
    most = (np.where(known, share, 0) > ROUNDED).sum(axis=1) * 2 > known.sum(axis=1)
    whole = known.any() and bool((share[known] == 1).all())
    stands = p.plateau | whole
    told = verdict(p, most & known.any(axis=1) & (rate != 0) & stands & p.finite & ~p.converged)
    if told is None or told[0] != "harm":
        return
    _, quote, onset, confidence = told
    typical = float(np.nanmedian(share[quote]))
    where = np.flatnonzero((np.where(known, share, 0)[quote] > ROUNDED).mean(axis=0) >= 0.5)
    held = p.trace.meta.get("optimizer", {}).get("dtype") or p.trace.layers[p.lines[0]].dtype
    yield _finding(
        p,
        cause=f"updates rounded away in {held}",
        severity="harm",
        where=where,
        onset=onset,
        confidence=confidence,
        evidence={"rounded_fraction": typical, "learning_rate": float(np.median(rate[quote]))},
        remedy="keep float32 weights (autocast instead of a model in half precision), or raise the learning rate",
        expected=f"share of weights that a step does not change from {percent(typical)} to under 10 %",
        sentence=f"Steps are rounded away: {percent(typical)} of the weights do not change, though a gradient arrives.",
        why=f"A step under half the distance to the next {held} number is none.",
    )


def _finding(
    p: Profile, cause: str, severity: str, where: range | np.ndarray, evidence: dict[str, float],
    remedy: str, expected: str, sentence: str, why: str, onset: int = 0, confidence: float = 1.0,
) -> Finding:  # fmt: skip
    loss = float(p.losses[-1]) if len(p.losses) else math.nan
    return Finding(
        kind="precision",
        severity=severity,
        layers=p.names(where),
        onset_step=onset,
        cause=cause,
        evidence={**evidence, "loss": loss},
        confidence=confidence,
        remedy=remedy,
        expected=expected,
        source="IEEE 754 binary16: smallest subnormal 2^-24; Micikevicius et al. 2018, sections 3.1 and 3.2",
        sentence=sentence,
        why=why,
    )
