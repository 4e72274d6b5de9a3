"""Steps that are none, that overwrite what they meet, or that repeat old gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bpdiag.diagnosis.finding import Finding, percent
from bpdiag.diagnosis.harm import LEAST_TRAVEL, harmed_layers, verdict
from bpdiag.diagnosis.ledger import WINDOW, Profile
from bpdiag.diagnosis.reach import (
    DIVERGED,
    FIRST_REACH,
    MOST_REACH,
    before_the_rise,
    overwritten,
    reach,
    risen,
)

STALE = 0.5  # of what the optimizer meets is older than this step
LAYERS, FEW_LAYERS = 5, 2.0  # of fewer one always has much; the norm is of fewer than two
CLIPPED = 0.99  # of its norm is left: less was clipped
SHORT = 100  # steps: in fewer nothing is expected to move far
RISING = 1.5  # a learning rate that has grown so much since the first sample is being warmed up


def update_too_small(p: Profile) -> Iterator[Finding]:
    """No layer moves: every travel under a tenth, though gradients arrive.

    Exactly no update is harm.  One that is merely small is harm where the steps were planned, else a warning: how far a
    layer may move depends on how long it is given.  A rate that is being warmed up is not judged by its start.
    """
    u = p.trace.column("update_ratio")[0][:, p.lines]
    arrived = np.nan_to_num(p.trace.column("g_W_norm")[0][:, p.lines]).max(axis=1, initial=0) > 0
    measured = np.isfinite(u).any(axis=1)
    rates = p.trace.told("learning_rate")
    rising = rates > RISING * rates[0] if rates[0] > 0 else rates > 0
    far = np.where(np.isfinite(p.travel), p.travel, 0).max(axis=1, initial=0)
    still = measured & arrived & ~p.converged & p.finite & (far < LEAST_TRAVEL) & ~rising
    told = verdict(p, still)
    if told is None or told[0] != "harm":
        return
    _, quote, onset, confidence = told
    none = bool((np.nan_to_num(u[quote]).max(axis=1, initial=0) == 0).all())
    if not none and (p.planned < SHORT or harmed_layers(p)[0][quote].any()):
        return  # too short a run, or too little arrives: that is why
    rate = float(np.median(rates[quote]))
    if none and p.trace.column("dW_rounded_fraction")[1][quote].any() and rate != 0:
        return  # the number format's doing
    cause = "learning rate 0" if none and rate == 0 else "updates rounded away" if none else "learning rate too small"
    most = float(np.median(far[quote]))
    moved = "no weight has changed" if none else f"no layer can move its output by more than {most:.1g} of itself"
    given = p.trace.meta.get("planned_steps") is not None
    remedy, expected = {
        "learning rate 0": ("begin the schedule above 0: warm up from (step + 1)", "an update in every weight"),
        "updates rounded away": (
            "keep float32 master weights (autocast instead of a model in half precision), or raise the learning rate",
            "an update in every weight",
        ),
        "learning rate too small": (
            f"raise the learning rate from {rate:.3g} to {rate * LEAST_TRAVEL / most if most else rate:.2g} or more",
            f"travel from {most:.1g} to {LEAST_TRAVEL} or more",
        ),
    }[cause]
    yield Finding(
        kind="update_too_small",
        severity="harm" if none or given else "warning",
        layers=p.names(range(len(p.lines))),
        onset_step=onset,
        cause=cause,
        evidence={
            "travel": most,
            "learning_rate": rate,
            "planned_steps": float(p.planned),
            "loss": p.losses[quote[-1]],
        },
        confidence=confidence,
        remedy=remedy,
        expected=expected,
        source="travel, ours: T u sqrt(fan_in) bounds the relative change of an output over T steps",
        sentence=f"Nothing moves: over {p.planned:,} steps {moved}, though gradients arrive.",
        why=f"The learning rate is {rate:.3g}." if math.isfinite(rate) else "",
    )


def update_too_large(p: Profile) -> Iterator[Finding]:
    """Steps larger than what they change, and a loss that stands or has risen; of one step alone, larger ones still.

    A loss that has risen well above its first value after such a step has diverged, whatever the steps reach since:
    weights that large steps have made large are moved little by more of them.
    """
    alone = len(p.steps) == 1 and p.steps[0] == 0
    if len(p.steps) < 2 * WINDOW and not alone:
        return
    above = risen(p, p.losses) & p.finite & ~p.converged
    told = verdict(p, above & overwritten(p)) if not alone else None
    diverged = told is not None and told[0] == "harm"
    far = reach(p)
    if not diverged:
        usual = far if alone else _usual(far)
        far = usual
        stands = p.finite & (alone | (p.plateau & ~p.converged) | above)
        told = verdict(p, ((usual > (FIRST_REACH if alone else MOST_REACH)) & stands[:, None]).any(axis=1))
    if told is None or told[0] != "harm":
        return
    _, quote, onset, confidence = told
    at, most = before_the_rise(p) if diverged else (-1, math.nan)
    rates = p.trace.told("learning_rate")
    if at < 0:
        most, rate = float(np.median(far[quote].max(axis=1))), float(np.median(rates[quote]))
        where = np.flatnonzero((far[quote] > (FIRST_REACH if alone else MOST_REACH)).mean(axis=0) >= 0.5)
    else:
        rate, where = float(rates[at]), np.flatnonzero(far[at] > MOST_REACH)
    first, last = p.losses[0], p.losses[quote[-1]]
    yield Finding(
        kind="update_too_large",
        severity="harm",
        layers=p.names(where if where.size else range(len(p.lines))),
        onset_step=onset,
        cause=f"{DIVERGED}: learning rate" if diverged else "learning rate",
        evidence={"reach": most, "learning_rate": rate, "loss": last, "first_loss": first},
        confidence=confidence,
        remedy=f"lower the learning rate from {rate:.3g} to {rate / most / 10:.1g}, or warm it up",
        expected=f"reach of a step from {most:.2g} to {0.1:.1g}",
        source="reach, ours: u sqrt(fan_in) bounds the relative change of an output in one step",
        sentence=f"{'A' if diverged else 'Every'} step overwrites what it meets: "
        f"it can move an output by {most:.2g} of itself.",
        why=f"The loss went from {first:.3g} to {last:.3g}.",
    )


def _usual(reach: np.ndarray) -> np.ndarray:
    """The median of the last ten samples."""
    begun = np.stack([np.median(reach[: s + 1], axis=0) for s in range(2 * WINDOW - 1)])
    windows = np.lib.stride_tricks.sliding_window_view(reach, 2 * WINDOW, axis=0)
    return np.concatenate([begun, np.median(windows, axis=2)])


def dominating_layer(p: Profile) -> Iterator[Finding]:
    """Of five layers or more one has nearly all of the gradient's norm, which a clip holds down for all.

    (sum n^2)^2 / sum n^4 < 2, n = |g_W| of a layer: how many layers the norm is of.  Only where gradients are clipped:
    else each layer takes its step for itself.  A warning.
    """
    raw, met = (p.trace.column(name)[0][:, p.lines] for name in ("g_W_raw_norm", "g_W_norm"))
    with np.errstate(all="ignore"):
        clipped = np.nansum(met**2, axis=1) < CLIPPED**2 * np.nansum(raw**2, axis=1)
        count = np.nansum(raw**2, axis=1) ** 2 / np.nansum(raw**4, axis=1)
    if len(p.lines) < LAYERS or p.trace.meta.get("processes", 1) > 1:
        return
    told = verdict(p, clipped & (count < FEW_LAYERS) & p.finite & ~p.converged)
    if told is None or told[0] != "harm":
        return
    _, quote, onset, confidence = told
    share = np.nanmedian(raw[quote] ** 2 / np.nansum(raw[quote] ** 2, axis=1, keepdims=True), axis=0)
    most = int(np.nanargmax(share))
    yield Finding(
        kind="dominating_layer",
        severity="warning",
        layers=p.names([most]),
        onset_step=onset,
        cause="one norm clipped for all layers",
        evidence={
            "layers_in_the_norm": float(np.median(count[quote])),
            "share": float(share[most]),
            "clipped_to": float(np.median(np.sqrt(np.nansum(met[quote] ** 2, 1) / np.nansum(raw[quote] ** 2, 1)))),
            "loss": float(p.losses[quote[-1]]),
        },
        confidence=confidence,
        remedy="clip layer by layer, or mend the one layer",
        expected=f"layers in the norm from {float(np.median(count[quote])):.1f} to {FEW_LAYERS:g} or more",
        source="ours: the participation ratio of the squared norms",
        sentence=f"{p.title(most)} has {percent(float(share[most]))} of the squared gradient; a clip holds all down.",
        why="What one layer sends beyond the limit is taken from the steps of all others.",
    )


def stale_gradient(p: Profile) -> Iterator[Finding]:
    """Gradients that are never cleared: a step adds to the sum of all before it."""
    old, there = p.trace.column("g_W_stale_norm")
    met = p.trace.column("g_W_raw_norm")[0]
    share = np.where(there & (met > 0), old / np.where(met > 0, met, 1), np.nan)[:, p.lines]
    moved = np.nan_to_num(p.trace.column("update_ratio")[0][:, p.lines]).max(axis=0, initial=0) > 0
    share[:, ~moved] = np.nan  # who is in no optimizer is cleared by none
    later = p.steps > 0
    known = np.isfinite(share)
    # where it holds the parts may cancel: a sum of many keeps its share in most samples, not in each
    often = (later[:, None] & (np.nan_to_num(share) > STALE)).sum(axis=0)
    layers = np.flatnonzero(2 * often > (later[:, None] & known).sum(axis=0))  # of one optimizer among several, its own
    if not layers.size:
        return
    typical = float(np.nanmedian(share[later][:, layers]))
    yield Finding(
        kind="stale_gradient",
        severity="harm",
        layers=p.names(layers),
        onset_step=int(p.steps[later][0]),
        cause="gradients are never cleared",
        evidence={"stale_share": typical, "loss": float(p.losses[-1])},
        confidence=float(often[layers].sum() / (later[:, None] & known)[:, layers].sum()),
        remedy="call optimizer.zero_grad() before every backward (before the first one of a step, if it has several)",
        expected="nothing in .grad before a step's first backward",
        source="structure: what .grad holds when a step's first backward comes to it",
        sentence="Every step adds its gradient to those of all steps before: the optimizer follows their sum.",
        why=f"Before its backward .grad holds {percent(min(typical, 9.99))} of the norm that the optimizer meets.",
    )
