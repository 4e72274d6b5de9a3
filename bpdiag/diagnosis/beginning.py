"""How a run begins: activations that are flat from the start, outputs far too large for their loss."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bpdiag.diagnosis.blocks import blocks
from bpdiag.diagnosis.finding import Finding, percent
from bpdiag.diagnosis.ledger import CONVERGED, Profile, classes

FLAT_AT_BOTH_ENDS = ("tanh", "sigmoid", "hardtanh", "hardsigmoid", "softsign")
MOST_SATURATED = 0.5  # of a layer's elements at the first step; at critical weights a tanh has 3 %
LARGE_WEIGHTS = 2.0  # times the critical standard deviation
LARGE_OUTPUT = 8.0  # rms of the logits: softmax is then sure of one class (maths of finding "forward blow-up")
LARGE_LOSS = 2.0  # times ln K, what guessing costs
SCALED = 2.0  # branches^2 all together, against the skip's 1: branches over sqrt(blocks) have about 1
OVERCOME = 0.5  # of ln K: a sum of many branches is large by none of them, and each step takes a little of all back


def at_the_start(p: Profile) -> int | None:
    """The first sample, where it is the training's first step and finite."""
    begun = p.trace.meta.get("optimizer", {}).get("begun", False)
    return 0 if len(p.steps) and p.steps[0] == 0 and p.finite[0] and not begun and not p.converged[0] else None


def input_rms(p: Profile, at: int) -> float:
    """Of the data: what the first layer reads."""
    rows = [i for i in p.lines if not p.trace.layers[i].parents]
    values = [p.trace.value("x_rms", i, at) for i in rows]
    return max((value for value in values if value is not None), default=math.nan)


def severity(p: Profile, overcome: float = CONVERGED) -> str:
    """A warning where the loss is below that share of guessing; a tenth of so bad a first loss proves nothing."""
    guessing = math.log(max(classes(p.trace, p.lines), 2))
    return "warning" if p.losses[-1] < overcome * guessing else "harm"


def flat_layers(p: Profile, at: int) -> list[int]:
    """Lines of the squashing layers of which most is saturated, where they are half of all such layers or more."""
    share = p.trace.column("a_saturated_fraction")[0][at]
    rows = [i for i, layer in enumerate(p.trace.layers) if layer.activation in FLAT_AT_BOTH_ENDS]
    rows = [i for i in rows if np.isfinite(share[i])]
    flat = [i for i in rows if share[i] > MOST_SATURATED]
    return flat if 2 * len(flat) >= len(rows) else []


def guessing_loss(p: Profile) -> float:
    """ln K where the loss is a cross-entropy over K > 1 outputs; else nan."""
    among = classes(p.trace, p.lines)
    return math.log(among) if among > 1 and p.trace.meta.get("loss", "cross_entropy") == "cross_entropy" else math.nan


def starts_sure(p: Profile, at: int) -> bool:
    """Logits and loss far beyond those of guessing."""
    z = p.trace.value("z_rms", p.lines[-1], at) or 0.0
    return bool(z > LARGE_OUTPUT and p.losses[at] > LARGE_LOSS * guessing_loss(p))


def saturated(p: Profile) -> Iterator[Finding]:
    """Most elements of the squashing layers lie where the slope is under 5 % of the largest, from the first step on."""
    at = at_the_start(p)
    if at is None or not p.lines:
        return
    flat = flat_layers(p, at)
    if not flat:
        return
    share = p.trace.column("a_saturated_fraction")[0][at]
    sizes = {}
    for i in flat:  # the weights below it
        below = i if p.trace.layers[i].is_weight_layer else next(iter(p.trace.layers[i].parents), None)
        if below is not None and p.trace.layers[below].fan_in:
            W = p.trace.value("W_rms", below, at)
            sizes[i] = (W or 0.0) * math.sqrt(p.trace.layers[below].fan_in or 1) * (p.trace.layers[i].r or 1.0)
    size = float(np.median(list(sizes.values()))) if sizes else math.nan
    data = input_rms(p, at)
    cause = "initialization" if size > LARGE_WEIGHTS else "preactivations"
    typical = float(np.median(share[flat]))
    names = [p.trace.layers[i].title for i in flat]
    where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    remedy = {
        "initialization": f"divide the weights by {size:.2g}: variance 1/fan_in (nn.init.xavier_normal_)",
        "preactivations": "normalize the preactivations, or begin with smaller weights",
    }[cause]
    yield Finding(
        kind="saturated",
        severity=severity(p),
        layers=tuple(p.trace.layers[i].key for i in flat),
        onset_step=int(p.steps[at]),
        cause=cause,
        evidence={
            "saturated_fraction": typical,
            "weights_over_critical": size,
            "input_rms": data,
            "loss": p.losses[at],
        },
        confidence=1.0,
        remedy=remedy,
        expected=f"saturated share from {percent(typical)} to under 10 %",
        source="Glorot & Bengio 2010, section 3; the threshold is ours",
        sentence=f"{percent(typical)} of {where} is saturated at the first step: almost nothing passes back there.",
        why=f"The weights are {size:.2g} times the critical size; the data have an rms of {data:.2g}.",
    )


def logits_saturated(p: Profile) -> Iterator[Finding]:
    """A softmax that is sure, and wrong, at the first step, by the last layer or a factor behind it alone.

    The layers below begin well: the last one multiplies by more than all of them together, or the output does and what
    is done with it before the softmax makes the loss.
    """
    at = at_the_start(p)
    if at is None or len(p.lines) < 2:
        return
    guessing, z = guessing_loss(p), p.trace.value("z_rms", p.lines[-1], at) or 0.0
    if not p.losses[at] > LARGE_LOSS * guessing:
        return
    ops = [step["op"].lower() for step in p.trace.meta.get("loss_path") or []]
    before = ops[: next((n for n, op in enumerate(ops) if "softmax" in op), len(ops))]
    stretched = z <= LARGE_OUTPUT and bool({"mul", "div"} & set(before))
    last = p.trace.value("forward_gain", p.lines[-1], at) or _size(p, at)
    head = z > LARGE_OUTPUT and last > LARGE_OUTPUT and last > (z / last) ** 2
    if not stretched and not head:
        return
    by = f"the last layer multiplies by {last:.2g}" if head else "what is done with the output before the softmax"
    yield Finding(
        kind="logits_saturated",
        severity=severity(p),
        layers=p.names([len(p.lines) - 1]),
        onset_step=int(p.steps[at]),
        cause="last layer too large" if head else "factor before the softmax (temperature) too large",
        evidence={"output_rms": z, "last_forward_gain": last, "loss": float(p.losses[at]), "guessing": guessing},
        confidence=1.0,
        remedy="initialize the last layer smaller" if head else "multiply the output by about 1 (temperature 1)",
        expected=f"the first loss from {p.losses[at]:.3g} to {guessing:.2f}",
        source="ours: at rms 8 the softmax gives one class all, and its slope p(1-p) is 0",
        sentence=f"The softmax begins sure and wrong: the first loss is {p.losses[at]:.3g}, guessing {guessing:.2f}.",
        why=f"That is {by}; the layers below begin well." if head else f"That is {by}; its rms is {z:.2g}.",
    )


def _size(p: Profile, at: int) -> float:
    """sig of the last layer, what its weights multiply by where its input is not known."""
    fan_in = p.trace.layers[p.lines[-1]].fan_in or 0
    return (p.trace.value("W_rms", p.lines[-1], at) or 0.0) * math.sqrt(fan_in)


def forward_scale(p: Profile) -> Iterator[Finding]:
    """Logits far beyond what a loss of guessing allows, at the first step: the net begins sure, and wrong."""
    at = at_the_start(p)
    if at is None or not p.lines:
        return
    if not starts_sure(p, at):
        return
    z, guessing = p.trace.value("z_rms", p.lines[-1], at) or 0.0, guessing_loss(p)
    data = input_rms(p, at)
    gain = p.trace.column("forward_gain")[0][at, p.lines[1:]]
    gain = gain[np.isfinite(gain) & (gain > 0)]
    typical = float(np.exp(np.log(gain).mean())) if gain.size else math.nan
    shares = [block.branch for block in blocks(p.trace, at) if math.isfinite(block.branch)]
    sums, scaled = len(shares), sum(share**2 for share in shares) < SCALED
    mend = f"scale the {sums} branches by 1/sqrt({sums}) (model.branch_scale='1/sqrt(blocks)')"
    mend = "normalize what enters each block, or what enters the head" if scaled else mend
    mend = mend if sums > 1 else "initialize at the critical weight variance"
    unknown = len(p.steps) == 1 and not p.sgd_like  # who divides the gradient's size out takes it back, step by step
    yield Finding(
        kind="forward_scale",
        severity="warning" if unknown else severity(p, OVERCOME if sums > 1 else CONVERGED),
        layers=p.names(range(len(p.lines))),
        onset_step=int(p.steps[at]),
        cause="initialization",
        evidence={"output_rms": z, "input_rms": data, "forward_gain": typical, "loss": float(p.losses[at])},
        confidence=1.0,
        remedy=mend,
        expected=f"rms of the output from {z:.3g} to about 1, the first loss from {p.losses[at]:.3g} to {guessing:.2f}",
        source="ours: at rms 8 the softmax gives one class all",
        sentence=f"The net begins sure and wrong: its output has an rms of {z:.3g}, its loss is {p.losses[at]:.3g}.",
        why=f"Guessing costs {guessing:.2f}."
        + (f" The data have an rms of {data:.3g};" if math.isfinite(data) else " The data are no numbers;")
        + f" a layer multiplies by {typical:.2g}.",
    )
