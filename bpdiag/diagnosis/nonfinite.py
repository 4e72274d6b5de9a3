"""Non-finite numbers: bracketed in time, traced to the first call that made one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bpdiag.diagnosis.beginning import guessing_loss
from bpdiag.diagnosis.finding import Finding
from bpdiag.diagnosis.ledger import Profile, rose
from bpdiag.diagnosis.losspath import SHAPES
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


def non_finite(p: Profile) -> Iterator[Finding]:
    """The first step with a nan or an infinity, bracketed, and the first call in it."""
    trace = p.trace
    steps, losses = trace.losses
    bad_losses, bad_samples = steps[~np.isfinite(losses)], p.steps[~p.finite & ~trace.skipped]  # a scaler's business
    if not len(bad_losses) and not len(bad_samples):
        return
    first = int(min([*bad_losses[:1], *bad_samples[:1]]))
    good = [s for s in (*steps[np.isfinite(losses)], *p.steps[p.finite]) if s < first]
    last_good = int(max(good)) if good else -1
    evidence: dict[str, float] = {"last_finite_step": float(last_good), "first_nonfinite_step": float(first)}
    layers: tuple[str, ...] = ()
    op = names = ""
    cause, where = "not sampled", "in the loss, in a step that was not sampled"
    if first in p.steps:
        cause, where = "loss", "in the loss, every layer being finite"
    if len(bad_samples):
        at = int(np.searchsorted(p.steps, bad_samples[0]))
        evidence["sampled_step"] = float(bad_samples[0])
        index, cause, makers = _first_bad_call(trace, at)
        if cause == "backward" and _bad_target(trace, at):
            cause = "target"
        elif cause in ("backward", "loss"):
            op = _steepest(trace, makers if index is not None and makers != [index] else [])
        elif cause == "forward" and index is not None:
            made_between = not math.isfinite(trace.value("x_rms", index, at) or 0.0)
            attends = trace.layers[index].kind in ATTENTION
            op = _steepest(trace, makers) if made_between else "softmax" if attends else ""
        if index is not None:
            layers = tuple(trace.layers[i].key for i in makers)
            names = " or ".join(trace.layers[i].title for i in makers)
            below = trace.layers[index].title
            where = f"in what {names} sends back to {below}" if makers != [index] else f"{_PLACES[cause]} {names}"
            sample = trace.value("nonfinite_sample", index, at)
            if sample is not None and cause != "weights":
                evidence["sample"] = sample
                where += f", in sample {sample:.0f} of the batch alone"
            nan, infinite = (trace.value(f"{word}_samples", index, at) for word in ("nan", "inf"))
            if nan is not None and infinite is not None and cause != "weights":
                evidence |= {"nan_samples": nan, "inf_samples": infinite}
            where += f", at step {bad_samples[0]}, the next one sampled" if bad_samples[0] > first else ""
        if at:
            ratio = trace.column("update_ratio")[0][at - 1]
            reach = ratio * np.sqrt([float(layer.fan_in or 0) for layer in trace.layers])
            evidence["largest_reach_before"] = float(np.nanmax(reach)) if np.isfinite(reach).any() else math.nan
        gains = trace.column("forward_gain")[0][max(at - 1, 0)]  # of the last finite sample, if there is one
        gains = gains[np.isfinite(gains) & (gains > 0)]
        if gains.size:
            evidence["forward_gain"] = float(np.exp(np.median(np.log(gains))))
    tame = losses[np.isfinite(losses)]
    first_loss, highest = (tame[0], tame.max()) if tame.size else (math.nan, math.nan)
    rate = trace.meta.get("optimizer", {}).get("lr", math.nan)
    evidence["learning_rate"] = float(rate)
    grown = evidence.get("forward_gain", 1.0)
    # a first loss so large is the forward pass's, also where no single gain could be told
    huge = tame.size > 0 and bool(p.lines) and first_loss > HUGE * guessing_loss(p)
    explodes = cause in ("forward", "weights") and (grown > GROWN or huge)
    diverged = not explodes and cause not in ("input", "target") and rose(trace)
    blamed = f"{cause} of {op}" if op and not diverged else cause
    if cause == "input":
        remedy, expected = "repair or drop the samples that are not finite", "every number finite"
    elif cause == "target":
        remedy, expected = "repair or drop the samples whose target is not finite", "every number finite"
    elif op == "softmax" and not diverged:
        remedy = "let every row of the mask see something, if only itself: a softmax over nothing is 0/0"
        expected = "every number finite, with the same learning rate"
    elif not op and not explodes and cause == "forward" and first == 0:
        remedy, expected = f"look inside {names}: a division by 0, a log of 0, an overflow", "every number finite"
    elif op and not diverged:
        remedy = f"keep what {op} is given off its pole: add a small number inside, or choose by a where before it too"
        expected = "every number finite, with the same learning rate"
    elif explodes:
        remedy = "initialize at the critical weight variance, 2/fan_in for relu, 1/fan_in for tanh"
        expected = f"forward gain per layer from {grown:.2g} to 1"
    else:
        reach = evidence.get("largest_reach_before", math.nan)
        less = 10 ** max(1, math.ceil(math.log10(reach))) if 0 < reach < math.inf else 10
        remedy = f"lower the learning rate from {rate:g} to {rate / less:g}" if rate > 0 else "lower the learning rate"
        expected = f"reach of a step from {reach:.2g} to {reach / less:.2g}" if reach > 0 else "every number finite"
    yield Finding(
        kind="non_finite",
        severity="harm",
        layers=layers,
        onset_step=first,
        cause=f"exploding {cause}" if explodes else f"diverged: steps too large, then {cause}" if diverged else blamed,
        evidence=evidence,
        confidence=1.0,
        remedy=remedy,
        expected=expected,
        source="ours",
        sentence=f"The numbers are not finite from step {first}: first seen {where}.",
        why=(f"Step {last_good} was the last finite one." if last_good >= 0 else "No step was finite.")
        + (f" There stands {op}, whose value or slope has a pole." if op and not diverged else "")
        + (
            f" Each layer multiplies what passes by {grown:.2g}; the first loss was {first_loss:.3g}."
            if explodes
            else ""
        )
        + (f" Before, the loss rose from {first_loss:.3g} to {highest:.3g}." if diverged else ""),
    )


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
