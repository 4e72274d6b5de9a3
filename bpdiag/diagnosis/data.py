"""What the net is given: inputs and targets of a scale that it cannot begin from, batches of one class each."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bpdiag.diagnosis.beginning import at_the_start, flat_layers, input_rms, severity, starts_sure
from bpdiag.diagnosis.finding import Finding, percent
from bpdiag.diagnosis.ledger import Profile, rose

LARGE_INPUT = 10.0  # rms of the data: standardized it is 1, pixels in 0 ... 255 have about 80
SMALL_INPUT = 0.1  # norm of what a unit of the first layer sums: a one-hot row has 1, pixels in 0 ... 1 have 9
LARGE_TARGET = 30.0  # times the first outputs, or 1: a standardized target is 1
PROBABLE = 1.0 + 1e-6  # of a target of binary cross-entropy, rounding aside; as far below 0
FEW = 8  # samples a batch, and batches: in fewer one class may prevail by luck


def input_scale(p: Profile) -> Iterator[Finding]:
    """Data far from an rms of 1, and a net that shows it: saturated or sure at its first step, or standing still.

    The first layer's preactivations, and the gradient of its weights, grow with the data: at an rms of 80 a rate that
    suits the layers above overwrites it.  Data far too small leave it to its bias: all samples look alike.
    """
    at = at_the_start(p)
    data = input_rms(p, 0) if p.lines else math.nan
    if not p.lines or not len(p.steps) or p.steps[0] != 0 or not data > 0:
        return
    stands = bool(p.plateau[-1]) or rose(p.trace)
    shown = at is not None and (bool(flat_layers(p, at)) or starts_sure(p, at))
    first = p.trace.layers[p.lines[0]]
    small = data * math.sqrt(first.fan_in or 1) < SMALL_INPUT and bool(p.plateau[-1]) and not p.converged[-1]
    large = data > LARGE_INPUT and (shown or (stands and not p.converged[-1]))
    if not small and not large:
        return
    cosine = p.trace.value("z_cosine", p.lines[0], 0)
    does = {
        True: "Its first layer's outputs, and the gradient of its weights, are as many times larger.",
        False: "Its first layer gives out little but its bias; the gradient of its weights is as many times smaller.",
    }[large]
    yield Finding(
        kind="input_scale",
        severity=severity(p) if large else "harm",
        layers=p.names([0]),
        onset_step=0,
        cause="input too large: not standardized" if large else "input too small: not standardized",
        evidence={
            "input_rms": data,
            "first_output_rms": p.trace.value("z_rms", p.lines[0], 0) or math.nan,
            "first_weight_gradient": p.trace.value("g_W_norm", p.lines[0], 0) or math.nan,
            "first_reach": (p.trace.value("update_ratio", p.lines[0], 0) or math.nan) * math.sqrt(first.fan_in or 1),
            "cosine": math.nan if cosine is None else cosine,
            "loss": float(p.losses[-1]),
        },
        confidence=1.0,
        remedy="standardize the data: subtract their mean, divide by their standard deviation",
        expected=f"rms of the data from {data:.3g} to 1",
        source="LeCun, Bottou, Orr & Müller 1998, section 4.3; the thresholds are ours",
        sentence=f"The data are {'far too large' if large else 'far too small'}: their rms is {data:.3g}.",
        why=does,
    )


def targets(p: Profile) -> Iterator[Finding]:
    """Targets far larger than anything the net gives out, and a loss that stands still or blows up.

    Or targets that are no probabilities, for a loss that takes the logarithm of one.
    """
    if not p.lines or not len(p.steps):
        return
    yield from _out_of_range(p)
    if p.steps[0] != 0 or p.converged[-1]:
        return
    size = _target_size(p)
    out = p.trace.value("z_rms", p.lines[-1], 0) or 0.0
    if not size > LARGE_TARGET * max(out, 1.0) or not (p.plateau[-1] or rose(p.trace)):
        return
    spread = p.trace.told("target_spread")[0]
    rate = float(p.trace.told("learning_rate")[0])
    yield Finding(
        kind="targets",
        severity="harm",
        layers=p.names([len(p.lines) - 1]),
        onset_step=0,
        cause="target out of scale: too large",
        evidence={
            "target_rms": size,
            "target_spread": float(spread),
            "output_rms": out,
            "learning_rate": rate,
            "loss": float(p.losses[-1]),
        },
        confidence=1.0,
        remedy="standardize the targets, and undo it on the predictions",
        expected=f"rms of the targets from {size:.3g} to 1",
        source="ours: an output has to grow to the size of its target before it can tell samples apart",
        sentence=f"The targets are out of scale: their rms is {size:.3g}, that of the first outputs {out:.2g}.",
        why="Every gradient is as many times larger, and all of it says one thing: give out more.",
    )


def _out_of_range(p: Profile) -> Iterator[Finding]:
    """A binary cross-entropy asked for more than 1 or less than 0."""
    ops = [step["op"].lower() for step in p.trace.meta.get("loss_path") or []]
    low, high = p.trace.told("target_lowest"), p.trace.told("target_highest")
    outside = np.isfinite(low) & np.isfinite(high) & ((high > PROBABLE) | (low < 1 - PROBABLE))
    if not any(op.startswith("binarycrossentropy") for op in ops) or not outside.any():
        return
    least, most = float(low[outside].min()), float(high[outside].max())
    signs = least == -1 and most == 1
    yield Finding(
        kind="targets",
        severity="harm",
        layers=p.names([len(p.lines) - 1]),
        onset_step=int(p.steps[outside][0]),
        cause="target out of range: no probability",
        evidence={"target_lowest": least, "target_highest": most, "loss": float(p.losses[-1])},
        confidence=1.0,
        remedy="give binary cross-entropy targets from 0 to 1 "
        + ("(labels of -1 and 1: (y + 1) / 2)" if signs else "(masks of 0 and 255: divide by 255)"),
        expected=f"targets from {least:.3g} ... {most:.3g} to 0 ... 1",
        source="structure: binary cross-entropy is bounded below for targets from 0 to 1 alone",
        sentence=f"The targets are no probabilities: they go from {least:.3g} to {most:.3g}, and binary cross-entropy "
        "takes 0 to 1.",
        why="For a target above 1 the loss falls without end as the output grows, for one below 0 as it falls.",
    )


def _target_size(p: Profile) -> float:
    """rms of the targets; where the loss keeps none, the rms of what it squares, or the mean of what it takes as is."""
    size = float(p.trace.told("target_rms")[0])
    ops = [step["op"].lower() for step in p.trace.meta.get("loss_path") or []]
    if math.isfinite(size) or not ops or p.trace.meta.get("loss") == "cross_entropy":
        return size
    first = float(p.trace.losses[1][0]) if len(p.trace.losses[1]) else math.nan
    if first > 0 and {"sub", "rsub"} & set(ops):
        return math.sqrt(first) if {"pow", "mul"} & set(ops) else first if "abs" in ops else math.nan
    return math.nan


def data_order(p: Profile) -> Iterator[Finding]:
    """Batches ruled by one class each, now this one, now that: each step unlearns what the one before has taught.

    Of n classes that rule in turn, shuffled data give the first about 1/n of a batch; the line is half way to all.
    """
    share, label = p.trace.told("target_class_share"), p.trace.told("target_class")
    known = np.isfinite(share)
    first = p.trace.layers[p.lines[0]] if p.lines else None
    if known.sum() < FEW or first is None or not first.shape or first.shape[0] < FEW:
        return
    classes = len(set(label[known].tolist()))
    of = float(np.median(share[known]))
    if classes < 2 or of <= (1 + 1 / classes) / 2:
        return
    yield Finding(
        kind="data_order",
        severity="harm",
        layers=p.names(range(len(p.lines))),
        onset_step=int(p.steps[known][0]),
        cause="batches of one class each",
        evidence={"class_share": of, "classes_seen": float(classes), "loss": float(p.losses[-1])},
        confidence=float((share[known] > (1 + 1 / classes) / 2).mean()),
        remedy="shuffle the samples anew in every epoch (DataLoader(..., shuffle=True))",
        expected="in every batch the classes as they are in the data",
        source="ours: the loss's own targets",
        sentence=f"The data come in order: one class makes up {percent(of)} of a batch.",
        why=f"{classes} classes rule in turn: a step teaches to answer with its own, whatever the input.",
    )
