"""Output and loss that do not fit: read from the operations between them, whatever the numbers say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from bpdiag.diagnosis.finding import Finding
from bpdiag.diagnosis.ledger import Profile
from bpdiag.trace import Layer

# operations that move numbers about and change none
SHAPES = (
    "alias", "clone", "contiguous", "flatten", "permute", "reshapealias", "select", "slice", "squeeze", "t", "tocopy",
    "transpose", "unsafeview", "unsqueeze", "view",
)  # fmt: skip
SQUASHES = ("sigmoid", "tanh", "hardsigmoid", "hardtanh")  # logits held within a unit or two
CLIPS = ("relu", "relu6", "hardswish")
FELL = 2.0  # times its first value, below 0: what a bounded loss cannot do for long
PAIRED = ("mseloss", "l1loss", "smoothl1loss", "huberloss")  # compare element by element


def loss_interface(p: Profile) -> Iterator[Finding]:
    """The loss asks for one thing and is given another; one finding for each such place.

    From the trace's ``loss_path`` and the activation that the model ends with.  Harm while the loss has not converged:
    a net may learn in spite of it, slowly or up to a bound.
    """
    path = _path(p)
    if _is_turned_round(p, path):
        yield _finding(
            p,
            "the loss is turned round: its negative is minimized",
            "a minus stands before it, and it falls without end",
            "Each step makes the answers worse: the loss that was meant rises as fast.",
            "drop the minus before the loss",
            "a loss that falls towards 0 and stays above it",
            len(path),
        )
        return
    for n, step in enumerate(path):
        told = _misfit(path[:n], step)
        if told is not None:
            yield _finding(p, *told, len(path))


def _finding(p: Profile, cause: str, sentence: str, why: str, remedy: str, expected: str, operations: int) -> Finding:
    end = _end(p)
    return Finding(
        kind="loss_interface",
        severity="warning" if p.converged[-1] and p.losses[-1] >= 0 else "harm",
        layers=(end.key,) if end else (),
        onset_step=int(p.steps[0]),
        cause=cause,
        evidence={"loss": float(p.losses[-1]), "operations": float(operations)},
        confidence=1.0,
        remedy=remedy,
        expected=expected,
        source="autograd's graph between output and loss: structure, no threshold",
        sentence=f"The loss does not fit the output: {sentence}.",
        why=why,
    )


def _is_turned_round(p: Profile, path: list[dict[str, Any]]) -> bool:
    """Whether the path ends with one of torch's losses and a minus, and what was told is below 0 and went on falling.

    A critic's loss, or one whose log is taken by hand, has its minus elsewhere.
    """
    ops = [step["op"] for step in path]
    ends = ops[-2:] if len(ops) > 1 else []
    losses = p.trace.losses[1]
    losses = losses[np.isfinite(losses)]
    known = bool(ends) and (ends[0] in PAIRED or ends[0].startswith(("nllloss", "crossentropy", "binarycross")))
    return (
        known
        and ends[1] in ("neg", "mul", "div")
        and len(losses) > 1
        and bool(losses[0] < 0 and losses.min() < FELL * losses[0])
    )


def _end(p: Profile) -> Layer | None:
    """The one layer that no watched layer reads: the model's last."""
    read = {parent for layer in p.trace.layers for parent in layer.parents}
    ends = [layer for i, layer in enumerate(p.trace.layers) if i not in read]
    return ends[0] if len(ends) == 1 else None


def _path(p: Profile) -> list[dict[str, Any]]:
    """Operations from the last layer up to the loss, named in lower case, those of shape left out."""
    steps = [{**step, "op": step["op"].lower().replace("_", "")} for step in p.trace.meta.get("loss_path") or []]
    steps = [step for step in steps if step["op"] not in SHAPES]
    end = _end(p)
    if steps and end is not None and (end.activation or end.kind in ("softmax", "logsoftmax")):
        last = (end.activation or end.kind).replace("_", "")
        at = next((n + 1 for n, step in enumerate(steps) if step["op"] == "output"), 0)
        steps.insert(at, {"op": last, "shape": list(end.shape)})
    return steps


def _misfit(before: list[dict[str, Any]], step: dict[str, Any]) -> tuple[str, str, str, str, str] | None:
    """(cause, sentence, why, remedy, expected) of an operation after those before it; None where it fits."""
    op, shape = step["op"], step["shape"]
    below = before[-1]["op"] if before else ""
    output = next((s["shape"] for s in before if s["op"] == "output"), None)
    classes = shape[-1] if shape else 0
    if op == "logsoftmax" and below in ("softmax", *SQUASHES):
        least = math.log(math.e + classes - 1) - 1  # all logits 0 but one of 1
        best = f"of {classes} classes the loss cannot fall below {least:.2f}" if below == "softmax" else "it is bounded"
        return (
            f"{below} before the softmax of cross-entropy",
            f"a {below} stands before cross-entropy, which takes the softmax itself",
            f"Its logits lie within a unit or two, whatever the weights: {best}, and its slope shrinks every gradient.",
            f"give cross-entropy the last layer's output without the {below}",
            "the loss falls below that bound",
        )
    if op == "logsoftmax" and below in CLIPS:
        return (
            f"dead logits: {below} before cross-entropy",
            f"a {below} stands on the logits",
            "A logit that is negative for every sample is 0 there and gets no gradient: its class is never learned.",
            f"drop the {below} after the last layer",
            "every logit takes either sign",
        )
    if op == "binarycrossentropywithlogits" and below in ("softmax", *SQUASHES):
        return (
            f"{below} before the sigmoid of the loss",
            f"a {below} stands before binary_cross_entropy_with_logits, which takes the sigmoid itself",
            "A logit between 0 and 1 is a probability between 0.5 and 0.73, whatever the weights.",
            f"give the loss the last layer's output without the {below}",
            "probabilities reach 0 and 1",
        )
    if op.startswith("nllloss") and not any(s["op"] in ("logsoftmax", "log") for s in before):
        return (
            "nll_loss without log_softmax",
            "nll_loss is given numbers that are no log-probabilities",
            "It takes the number at the target as it is: the loss falls without bound as the outputs grow.",
            "use cross_entropy, or log_softmax before nll_loss",
            f"a first loss near ln K = {math.log(classes or 10):.2f}" if classes else "a first loss near ln K",
        )
    if op in ("softmax", "logsoftmax") and step.get("dim") == 0 and len(shape) > 1 and shape[0] > 1:
        return (
            "softmax over the batch",
            f"the {op} runs over the {shape[0]} samples, not over the {shape[1]} classes",
            "Samples compete with each other: a class that is likely for one is made unlikely for the rest.",
            "take it over the dimension of the classes, dim=1",
            "probabilities of one sample sum to 1",
        )
    if output and _is_broadcast(output, op, shape, below):
        return (
            "output and target broadcast against each other",
            f"an output of shape {tuple(output)} is compared as {tuple(shape)}",
            "Every output is pulled towards every target, which is best done by giving their mean.",
            "give output and target one shape (squeeze or unsqueeze one)",
            "one difference for each element of the output",
        )
    return None


def _is_broadcast(output: list[int], op: str, shape: list[int], below: str) -> bool:
    """Whether (B, 1) meets (B,), or an element-wise loss got more elements than the model gave out."""
    if math.prod(shape) <= math.prod(output):
        return False
    square = len(shape) >= 2 and shape[-1] == shape[-2] == output[0] and output[-1] == 1
    return op in ("expand", "sub", "rsub", *PAIRED) and (square or below in PAIRED)
