"""Dead units: those that no sample wakes, beyond what chance explains."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bpdiag.diagnosis.finding import Finding, percent
from bpdiag.diagnosis.harm import harmed_layers, verdict
from bpdiag.diagnosis.ledger import Profile
from bpdiag.diagnosis.reach import MOST_REACH

SQUISHED = -0.5  # log10(rms slope / largest): nine elements in ten pass under 5 %
MOST = 0.5  # of a layer's units


def dead_units(p: Profile) -> Iterator[Finding]:
    """Units silent for every sample of several batches, beyond chance, where gradients vanish by them or nothing moves.

    Chance alone silences p(c, B) of the units when samples look alike (cosine c): that many are no fault, see
    ``dead_by_chance``.  A warning, not harm, where most units of a layer are dead and the net learns all the same.
    """
    judged = [case for place in _activations(p) if (case := _judge(p, *place)) is not None]
    if not judged:
        return
    worst = max(judged, key=lambda case: (case.severity == "harm", case.dead))
    alike = [case for case in judged if case.severity == worst.severity]
    name, batches = p.trace.layers[worst.line].title, p.trace.layers[worst.line].window
    share, chance = percent(worst.dead), percent(worst.chance)
    more = len(alike) - 1
    others = f", and many of {more} more layer{'s' * (more > 1)}" if more else ""
    yield Finding(
        kind="dead_units",
        severity=worst.severity,
        layers=tuple(case.key for case in alike),
        onset_step=min(case.onset for case in alike),
        cause=_cause(p, worst),
        evidence={
            "dead_fraction": worst.dead,
            "dead_by_chance": worst.chance,
            "batches": float(batches),
            "update_ratio_first": worst.first_update,
            "loss": worst.loss,
        },
        confidence=worst.confidence,
        remedy="begin anew with a learning rate ten times lower (units die of steps too large), or with leaky_relu",
        expected=f"dead share of {name} from {share} to {chance} or less",
        source="ours: chance level from Gaussian preactivations of cosine c",
        sentence=f"{share} of {name}'s units are dead{others}: no sample of {batches} batches wakes them.",
        why=f"Chance alone would silence {chance}.",
    )


def _cause(p: Profile, case: _Case) -> str:
    """What silenced them: the first update, where it could overwrite the layer; else where they lie."""
    fed = [i for _, i, j in _activations(p) if j == case.line]
    reach = case.first_update * math.sqrt(p.trace.layers[fed[0]].fan_in or 1) if fed else math.nan
    if reach > MOST_REACH and case.onset > 0:
        return "learning rate too large: the first updates push every sample where the activation is flat"
    return "every sample falls where the activation is flat"


@dataclass(frozen=True)
class _Case:
    """Dead units of one activation."""

    line: int
    key: str
    severity: str
    onset: int
    confidence: float
    dead: float
    chance: float
    first_update: float
    loss: float


def _judge(p: Profile, at: int, i: int, j: int) -> _Case | None:
    """The activation on line ``j`` that weight layer number ``at`` on line ``i`` feeds; None where it is well."""
    layer, carrier = p.trace.layers[i], p.trace.layers[j]
    dead, there = (column[:, j] for column in p.trace.column("a_dead_fraction"))
    cosine = p.trace.column("z_cosine")[0][:, i]
    largest = (carrier.largest_slope or 1) / (carrier.r or 1)
    size = np.nan_to_num(p.ledger["slopes"][:, at] - math.log10(largest), nan=0.0)  # log10(rms slope / largest)
    weightless = p.trace.column("W_rms")[0][:, i] == 0  # silent for another reason: nothing arrives
    most = there & p.finite & (dead > MOST) & ~weightless
    if not most.any() and not harmed_layers(p)[0].any():
        return None
    blocked = (
        there & ~weightless & harmed_layers(p)[0][:, : at + 1].any(1) & ((size < SQUISHED) | (most & _slopes_lead(p)))
    )
    batch = (layer.shape[0] if layer.shape else 1) * max(carrier.window, 1)
    chance = np.zeros(len(p.steps))
    for s in np.flatnonzero(most | blocked):
        chance[s] = dead_by_chance(cosine[s], batch)
    beyond = dead > chance + 3 * np.sqrt(chance * (1 - chance) / (layer.units or 1))
    told = verdict(p, beyond & (blocked | (most & p.plateau)))
    if told is None and (told := verdict(p, beyond & most & ~p.converged)):
        told = ("warning", *told[1:])
    if told is None:
        return None
    severity, quote, onset, confidence = told
    return _Case(
        line=j,
        key=carrier.key,
        severity=severity,
        onset=onset,
        confidence=confidence,
        dead=float(np.median(dead[quote])),
        chance=float(np.median(chance[quote])),
        first_update=float(p.trace.column("update_ratio")[0][0, i]),
        loss=float(p.losses[quote[-1]]),
    )


def _slopes_lead(p: Profile) -> np.ndarray:
    """(S,) bool: of all owners the slopes take most decades."""
    sums = {owner: np.nansum(decades, axis=1) for owner, decades in p.ledger.items()}
    return sums["slopes"] <= np.min(list(sums.values()), axis=0)


def _activations(p: Profile) -> Iterator[tuple[int, int, int]]:
    """(number of the weight layer, its line, the line of the activation it feeds), where dead units were counted."""
    layers, there = p.trace.layers, p.trace.column("a_dead_fraction")[1]
    for at, i in enumerate(p.lines):
        fed = [j for j, layer in enumerate(layers) if i in layer.parents] if layers[i].next is None else layers[i].via
        for j in dict.fromkeys((i, *fed)):
            if there[:, j].any():
                yield at, i, j


def dead_by_chance(cosine: float, batch: int) -> float:
    """p(c, B) = integral of Dx Phi(-x sqrt(c/(1-c)))^B: the share of units that B samples leave silent by chance.

    For samples of mean cosine c, a relu and Gaussian preactivations.  0 for c <= 0 or nan: nothing is then excused;
    1/2 at c = 1, where all samples are one.

    Source:
        ours; measured on He relu, depth 20, c .954, B 256: .254.

    Example:
        >>> round(dead_by_chance(0.954, 256), 3)
        0.268
    """
    if not cosine > 0:
        return 0.0
    return 0.5 if cosine > 1 - 1e-6 else _integral(round(cosine, 7), batch)


@functools.lru_cache(maxsize=100_000)
def _integral(cosine: float, batch: int) -> float:
    slant = math.sqrt(cosine / (1 - cosine))
    fall = np.linspace(-10, 10, 401) / max(slant, 1)  # where Phi falls from 1 to 0
    x = np.unique(np.concatenate([np.linspace(-8, 8, 401), fall]))
    silent = np.array([0.5 * math.erfc(v * slant / math.sqrt(2)) for v in x])
    y = np.exp(-x * x / 2) * silent**batch
    return float((np.diff(x) * (y[1:] + y[:-1])).sum() / 2 / math.sqrt(2 * math.pi))
