"""Non-finite numbers: bracketed in time, traced to the first call that made one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bpdiag.diagnosis.beginning import guessing_loss
from bpdiag.diagnosis.finding import Finding
from bpdiag.diagnosis.ledger import Profile, rose
from bpdiag.diagnosis.losspath import SHAPES
from bpdiag.diagnosis.reach import DIVERGED, before_the_rise, overwritten, risen
from bpdiag.trace import Trace

GROWN = 2.0  # forward gain a layer; at the critical weights it is 1
HUGE = 1e3  # times ln K: a first loss beyond
# operations that are finite where their slope is not, or that a finite number takes to infinity; the likelier first
STEEP = (
    "sqrt", "rsqrt", "log", "norm", "linalgvectornorm", "cdist", "acos", "asin", "reciprocal", "div", "pow", "log2",
    "log10", "prod", "atan2", "exp", "softmax", "logsoftmax", "where",
)  # fmt: skip
ATTENTION = ("multiheadattention", "transformerencoderlayer", "transformerdecoderlayer", "softmax")
SAFE = ("output", "sub", "rsub", "pow", "mul", "mean", "sum", "abs", "mseloss", "l1loss", "smoothl1loss", "huberloss")


@dataclass(frozen=True)
class _Place:
    """Where and when the first number that is not finite was seen."""

    first: int  # step
    last_good: int  # step; -1: none
    at: int | None  # sample in which it was seen
    broke: str  # a key of _PLACES; loss, every layer being finite; not sampled
    makers: list[int]  # rows of the calls that made it
    op: str  # an operation with a pole that may have; empty for none
    where: str  # in words
    evidence: dict[str, float]


def non_finite(p: Profile) -> Iterator[Finding]:
    """The first step with a nan or an infinity, bracketed, and the first call in it.

    Blown up forward where the gains at the first sample were large already, or the first loss was; diverged where the
    loss had risen under steps larger than what they change; else by what broke.
    """
    place = _place(p)
    if place is None:
        return
    growth, (at, far) = _gain(p, 0), before_the_rise(p)
    told = float(p.trace.told("learning_rate")[at]) if at >= 0 else math.nan
    rate = told if math.isfinite(told) else float(p.trace.meta.get("optimizer", {}).get("lr", math.nan))
    cause = _cause(p, place, growth)
    numbers = {"learning_rate": rate, "forward_gain": growth, "largest_reach_before": far}
    remedy, expected = _remedy(p, place, cause, numbers)
    yield Finding(
        kind="non_finite",
        severity="harm",
        layers=tuple(p.trace.layers[i].key for i in place.makers),
        onset_step=place.first,
        cause={
            "exploding": f"exploding {place.broke}",
            DIVERGED: f"{DIVERGED}: steps too large, then {place.broke}",
            "pole": f"{place.broke} of {place.op}",
        }.get(cause, place.broke),
        evidence=place.evidence | numbers,
        confidence=1.0,
        remedy=remedy,
        expected=expected,
        source="ours",
        sentence=f"The numbers are not finite from step {place.first}: first seen {place.where}.",
        why=_why(p, place, cause, growth),
    )


def _place(p: Profile) -> _Place | None:
    trace = p.trace
    steps, losses = trace.losses
    bad_losses, bad_samples = steps[~np.isfinite(losses)], p.steps[~p.finite & ~trace.skipped]  # a scaler's business
    if not len(bad_losses) and not len(bad_samples):
        return None
    first = int(min([*bad_losses[:1], *bad_samples[:1]]))
    good = [s for s in (*steps[np.isfinite(losses)], *p.steps[p.finite]) if s < first]
    last_good = int(max(good)) if good else -1
    evidence: dict[str, float] = {"last_finite_step": float(last_good), "first_nonfinite_step": float(first)}
    broke, where = "not sampled", "in the loss, in a step that was not sampled"
    if first in p.steps:
        broke, where = "loss", "in the loss, every layer being finite"
    if not len(bad_samples):
        return _Place(first, last_good, None, broke, [], "", where, evidence)
    at = int(np.searchsorted(p.steps, bad_samples[0]))
    evidence["sampled_step"] = float(bad_samples[0])
    index, broke, makers = _first_bad_call(trace, at)
    if broke == "backward" and _bad_target(trace, at):
        broke = "target"
    if index is not None:
        where, more = _told(trace, at, index, broke, makers)
        where += f", at step {bad_samples[0]}, the next one sampled" if bad_samples[0] > first else ""
        evidence |= more
    return _Place(first, last_good, at, broke, makers, _pole(trace, at, index, broke, makers), where, evidence)


def _told(trace: Trace, at: int, index: int, broke: str, makers: list[int]) -> tuple[str, dict[str, float]]:
    """The first bad call in words, and of its batch how much is bad."""
    names = " or ".join(trace.layers[i].title for i in makers)
    sent_back = f"in what {names} sends back to {trace.layers[index].title}"
    where, evidence = sent_back if makers != [index] else f"{_PLACES[broke]} {names}", dict[str, float]()
    if broke == "weights":
        return where, evidence
    sample = trace.value("nonfinite_sample", index, at)
    if sample is not None:
        evidence["sample"] = sample
        where += f", in sample {sample:.0f} of the batch alone"
    nan, infinite = (trace.value(f"{word}_samples", index, at) for word in ("nan", "inf"))
    if nan is not None and infinite is not None:
        evidence |= {"nan_samples": nan, "inf_samples": infinite}
    return where, evidence


def _pole(trace: Trace, at: int, index: int | None, broke: str, makers: list[int]) -> str:
    """The operation that may have a pole there."""
    if broke in ("backward", "loss"):
        return _steepest(trace, makers if makers != [index] else [])
    if broke != "forward" or index is None:
        return ""
    if not math.isfinite(trace.value("x_rms", index, at) or 0.0):  # made between the layers
        return _steepest(trace, makers)
    return "softmax" if trace.layers[index].kind in ATTENTION else ""


def _gain(p: Profile, at: int) -> float:
    """The typical forward gain of a sample; nan where none is known."""
    gains = p.trace.column("forward_gain")[0][at]
    gains = gains[np.isfinite(gains) & (gains > 0)]
    return float(np.exp(np.median(np.log(gains)))) if gains.size else math.nan


def _cause(p: Profile, place: _Place, growth: float) -> str:
    """input, target, exploding, diverged, empty row, pole, inside, or steps where nothing else is known."""
    if place.broke in ("input", "target"):
        return place.broke
    losses = p.trace.losses[1]
    tame = losses[np.isfinite(losses)]
    # a first loss so large is the forward pass's, also where no single gain could be told
    huge = tame.size > 0 and bool(p.lines) and tame[0] > HUGE * guessing_loss(p)
    forward = place.broke in ("forward", "weights")
    if forward and (growth > GROWN or huge):
        return "exploding"
    grown = forward and _gain(p, max((place.at or 0) - 1, 0)) > GROWN  # since the first sample, by its steps
    if grown or rose(p.trace) or (overwritten(p).any() and risen(p, tame).any()):
        return DIVERGED
    if place.op:
        return "empty row" if place.op == "softmax" else "pole"
    return "inside" if place.broke == "forward" and place.first == 0 else "steps"


def _remedy(p: Profile, place: _Place, cause: str, numbers: dict[str, float]) -> tuple[str, str]:
    """(what to do, what that should do to the number)."""
    finite, rate, far = "every number finite", numbers["learning_rate"], numbers["largest_reach_before"]
    if cause == "input":
        return "repair or drop the samples that are not finite", finite
    if cause == "target":
        return "repair or drop the samples whose target is not finite", finite
    if cause == "exploding":
        gain = numbers["forward_gain"]
        mend = "initialize at the critical weight variance, 2/fan_in for relu, 1/fan_in for tanh"
        return mend, f"forward gain per layer from {gain:.2g} to 1"
    if cause == "empty row":
        mend = "let every row of the mask see something, if only itself: a softmax over nothing is 0/0"
        return mend, f"{finite}, with the same learning rate"
    if cause == "pole":
        what = f"keep what {place.op} is given off its pole"
        mend = f"{what}: add a small number inside, or choose by a where before it too"
        return mend, f"{finite}, with the same learning rate"
    if cause == "inside":
        names = " or ".join(p.trace.layers[i].title for i in place.makers)
        return f"look inside {names}: a division by 0, a log of 0, an overflow", finite
    less = 10 * max(far, 1.0) if math.isfinite(far) else 10.0
    mend = f"lower the learning rate from {rate:g} to {rate / less:.1g}" if rate > 0 else "lower the learning rate"
    return mend, f"reach of a step from {far:.2g} to {far / less:.1g}" if math.isfinite(far) else finite


def _why(p: Profile, place: _Place, cause: str, growth: float) -> str:
    losses = p.trace.losses[1]
    tame = losses[np.isfinite(losses)]
    first, highest = (tame[0], tame.max()) if tame.size else (math.nan, math.nan)
    told = f"Step {place.last_good} was the last finite one." if place.last_good >= 0 else "No step was finite."
    return told + {
        "pole": f" There stands {place.op}, whose value or slope has a pole.",
        "empty row": f" There stands {place.op}, whose value or slope has a pole.",
        "exploding": f" Each layer multiplies what passes by {growth:.2g}; the first loss was {first:.3g}.",
        DIVERGED: f" Before, the loss rose from {first:.3g} to {highest:.3g}.",
    }.get(cause, "")


def _bad_target(trace: Trace, at: int) -> bool:
    """Whether the loss was given a target that is not finite: told by itself, or by a loss that nothing else spoils."""
    told = trace.steps_table.filter(trace.steps_table["step"].to_numpy() == trace.sampled_steps[at]).to_pylist()
    size = told[0]["target_rms"] if told else None
    ops = [step["op"].lower() for step in trace.meta.get("loss_path") or []]
    if size is not None:
        return not math.isfinite(size)
    loss = told[0]["loss"] if told else None
    return bool(ops) and set(ops) <= {*SAFE, *SHAPES} and loss is not None and math.isnan(loss)


def _steepest(trace: Trace, makers: list[int]) -> str:
    """The operation most likely to have a pole, of those inside these calls and below them, else of the loss's."""
    ops = [op for i in makers for op in trace.layers[i].ops]
    ops = ops or [step["op"] for step in trace.meta.get("loss_path") or []]
    there = {op.lower().replace("_", "") for op in ops}
    return next((op for op in STEEP if op in there), "")


_PLACES = {
    "input": "in the input of",
    "forward": "in the output of",
    "weights": "in the weights of",
    "backward": "in the cotangent of",
    "target": "in the target given to the loss of",
}


def _first_bad_call(trace: Trace, at: int) -> tuple[int | None, str, list[int]]:
    """The first call with finite inputs and a non-finite output, forward before backward; what broke; who made it.

    A cotangent is made by the backward of those who read that output: theirs came in finite.
    """

    def bad(name: str) -> np.ndarray:
        """(lines,) bool: measured in this sample and not finite."""
        values, there = trace.column(name)
        return there[at] & ~np.isfinite(values[at])

    out, weights, data = bad("z_norm") | bad("a_norm"), bad("W_rms"), bad("x_rms")
    for i, layer in enumerate(trace.layers):
        if data[i] and not layer.parents:
            return i, "input", [i]
        if out[i] and not any(out[j] for j in layer.parents):
            return i, "weights" if weights[i] else "forward", [i]
    back = bad("g_z_norm") | bad("g_a_norm")
    readers: dict[int, list[int]] = {}
    for i, layer in enumerate(trace.layers):
        for j in layer.parents:
            readers.setdefault(j, []).append(i)
    for i in reversed(range(len(trace.layers))):
        if back[i] and not any(back[j] for j in readers.get(i, [])):
            return i, "backward", readers.get(i) or [i]
    last = np.flatnonzero(bad("g_W_norm") | weights)
    return (int(last[-1]), "backward", [int(last[-1])]) if last.size else (None, "loss", [])
