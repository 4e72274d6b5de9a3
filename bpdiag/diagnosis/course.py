"""What only the course of the loss shows: a plateau that nothing explains, a run that ended while it still fell."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bpdiag.diagnosis.beginning import guessing_loss
from bpdiag.diagnosis.finding import Finding, percent
from bpdiag.diagnosis.ledger import Profile

AT_CHANCE = 0.02  # of ln K: so near guessing
STILL = 3.0  # standard errors of the mean of a quarter of the run: a fall beyond is one
LEAST_FALL = 1e-3  # of ln K: a fall under it is none, however regular
LONG = 50  # steps: a shorter plateau may be a slow start
MOST_LEFT = 0.85  # of the first loss: a run that ends above has hardly begun
LEAST_WON = 0.005  # of the first loss
FUSED = ("rnn", "lstm", "gru")  # modules of many time steps that are one call
PACE = 0.4  # of all that was won came in the last half: it does not slow down


def chance_level(p: Profile) -> Iterator[Finding]:
    """A loss that stays at guessing for fifty steps and more, gradients that arrive, and no other finding.

    Then the fault lies where no layer shows it: inputs and targets that do not belong together, a target that the
    inputs do not tell, a task that needs longer.  A warning: of these the last is no fault.
    """
    steps, losses = _told(p)
    guess = guessing_loss(p) if p.lines else math.nan
    if len(losses) < LONG or not guess > 0 or not p.finite.any():
        return
    quarter = len(losses) // 4
    begin, before, now = (
        float(x.mean()) for x in (losses[:quarter], losses[-2 * quarter : -quarter], losses[-quarter:])
    )
    if abs(now - guess) > AT_CHANCE * guess or begin - now > 2 * AT_CHANCE * guess:
        return
    noise = float(np.diff(losses[-2 * quarter :]).std()) / math.sqrt(2)  # of one loss, whatever the trend
    if before - now > max(STILL * noise * math.sqrt(2 / quarter), LEAST_FALL * guess):
        return
    yield Finding(
        kind="chance_level",
        severity="warning",
        layers=p.names(range(len(p.lines))),
        onset_step=int(steps[0]),
        cause="unexplained: the targets may not belong to the inputs",
        evidence={"loss": now, "guessing": guess, "steps": float(len(losses))},
        confidence=1.0,
        remedy="train on ten samples until the loss is near 0; if that works, see that inputs and targets are shuffled "
        "together, and that a person could tell the targets from the inputs",
        expected=f"a loss well below {guess:.2f}",
        source="ours: the loss of answering with the classes' frequencies",
        sentence=f"The loss stays at guessing: {now:.3g} after {len(losses):,} steps; guessing costs {guess:.3g}.",
        why=_looked_at(p),
    )


def _looked_at(p: Profile) -> str:
    """What was measured and found well; what was not seen."""
    told = f"Of {len(p.lines)} weight layers' calls gradients and steps were measured, and none explains it."
    fused = [layer.title for layer in p.trace.layers if layer.kind in FUSED]
    if not fused:
        return told
    many = len(fused) > 1
    names = f"{', '.join(fused[:3])}{' and more' if len(fused) > 3 else ''}"
    return f"{told} {names} run{'' if many else 's'} through time in one call: what passes between steps was not seen."


def too_few_steps(p: Profile) -> Iterator[Finding]:
    """The planned steps are over, most of the first loss is left, and the loss falls as fast as ever.

    A warning; only where the steps were planned, are through, and nothing else was found.
    """
    steps, losses = _told(p)
    planned = p.trace.meta.get("planned_steps")
    if not planned or len(losses) < LONG or steps[-1] < 0.9 * planned - 1 or not p.lines:
        return
    tenth = max(len(losses) // 10, 1)
    first, half, last = (float(x.mean()) for x in (losses[:tenth], losses[len(losses) // 2 :][:tenth], losses[-tenth:]))
    won, lately = first - last, half - last
    with np.errstate(over="ignore"):  # a loss of 1e200
        noise = float(np.std(losses[-tenth:]))
    if first <= 0 or last < MOST_LEFT * first or won <= max(2 * noise, LEAST_WON * first) or lately < PACE * won:
        return
    more = math.ceil(planned * last / (2 * lately) / 2)
    yield Finding(
        kind="too_few_steps",
        severity="warning",
        layers=p.names(range(len(p.lines))),
        onset_step=int(steps[-1]),
        cause="the run ended while the loss fell",
        evidence={
            "first_loss": first,
            "loss": last,
            "share_won_in_the_last_half": lately / won,
            "steps": float(planned),
        },
        confidence=1.0,
        remedy=f"train longer, or raise the learning rate: at this pace {more:,} more steps halve the loss",
        expected=f"loss from {last:.3g} to {last / 2:.3g}",
        source="ours",
        sentence=f"The run ended early: {percent(last / first)} of the first loss is left, and it still falls.",
        why=f"The last half of {planned:,} steps brought {percent(lately / won)} of all that was won.",
    )


def _told(p: Profile) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses that are finite."""
    steps, losses = p.trace.losses
    return steps[np.isfinite(losses)], losses[np.isfinite(losses)]
