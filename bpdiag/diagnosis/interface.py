"""Output and loss that do not fit: read from the operations between them, whatever the numbers say."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bpdiag.diagnosis.finding import Finding
from bpdiag.diagnosis.ledger import Profile
from bpdiag.diagnosis.losspath import Operation, operations
from bpdiag.trace import Trace

SQUASHES = ("sigmoid", "tanh", "hardsigmoid", "hardtanh")  # logits held within a unit or two
CLIPS = ("relu", "relu6", "hardswish")
FELL = 2.0  # times its first value, below 0: what a bounded loss cannot do for long
PAIRED = ("mseloss", "l1loss", "smoothl1loss", "huberloss")  # compare element by element


def loss_interface(p: Profile) -> Iterator[Finding]:
    """The loss asks for one thing and is given another; one finding for each such place.

    From the trace's ``loss_path``: what the forward pass ends with, and what was done since, of every loss told.  Harm
    while the loss has not converged: a net may learn in spite of it, slowly or up to a bound.
    """
    path = operations(p.trace)
    for step in path:
        if _is_turned_round(p, step, path):
            yield _finding(
                p,
                step,
                "the loss is turned round: its negative is minimized",
                "a minus stands before it, and it falls without end",
                "Each step makes the answers worse: the loss that was meant rises as fast.",
                "drop the minus before the loss",
                "a loss that falls towards 0 and stays above it",
                len(path),
            )
            return
    places = set[tuple[str, str | None]]()  # several passes, or losses, may show one fault
    for step in path:
        told = _misfit(p.trace, step, path)
        if told is not None and (told[0], step.end) not in places:
            places.add((told[0], step.end))
            yield _finding(p, step, *told, len(path))


def _finding(
    p: Profile, step: Operation, cause: str, sentence: str, why: str, remedy: str, expected: str, count: int
) -> Finding:
    return Finding(
        kind="loss_interface",
        severity="warning" if p.converged[-1] and p.losses[-1] >= 0 else "harm",
        layers=(step.end,) if step.end else (),
        onset_step=int(p.steps[0]),
        cause=cause,
        evidence={"loss": float(p.losses[-1]), "operations": float(count)},
        confidence=1.0,
        remedy=remedy,
        expected=expected,
        source="autograd's graph between output and loss: structure, no threshold",
        sentence=f"The loss does not fit the output: {sentence}.",
        why=why,
    )


def _is_turned_round(p: Profile, step: Operation, path: list[Operation]) -> bool:
    """Whether a path ends with one of torch's losses and a minus, and what was told is below 0 and went on falling.

    A critic's loss, or one whose log is taken by hand, has its minus elsewhere.
    """
    losses = p.trace.losses[1]
    losses = losses[np.isfinite(losses)]
    return (
        step.op in ("neg", "mul", "div")
        and (step.below in PAIRED or step.below.startswith(("nllloss", "crossentropy", "binarycross")))
        and not any(step in other.reads for other in path)
        and len(losses) > 1
        and bool(losses[0] < 0 and losses.min() < FELL * losses[0])
    )


def _misfit(trace: Trace, step: Operation, path: list[Operation]) -> tuple[str, str, str, str, str] | None:
    """(cause, sentence, why, remedy, expected) of an operation after those that it reads; None where it fits."""
    op, shape, below = step.op, step.shape, step.below
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
    if op.startswith("nllloss") and not _has_a_log(trace, step):
        return (
            "nll_loss without log_softmax",
            "nll_loss is given numbers that are no log-probabilities",
            "It takes the number at the target as it is: the loss falls without bound as the outputs grow.",
            "use cross_entropy, or log_softmax before nll_loss",
            f"a first loss near ln K = {math.log(classes or 10):.2f}" if classes else "a first loss near ln K",
        )
    if op in ("softmax", "logsoftmax") and step.dim == 0 and len(shape) > 1 and shape[0] > 1 and _is_last(step, path):
        return (
            "softmax over the batch",
            f"the {op} runs over the {shape[0]} samples, not over the {shape[1]} classes",
            "Samples compete with each other: a class that is likely for one is made unlikely for the rest.",
            "take it over the dimension of the classes, dim=1",
            "probabilities of one sample sum to 1",
        )
    if _is_broadcast(step, path):
        return (
            "output and target broadcast against each other",
            f"an output of shape {tuple(step.reads[0].shape)} is compared as {tuple(shape)}",
            "Every output is pulled towards every target, which is best done by giving their mean.",
            "give output and target one shape (squeeze or unsqueeze one)",
            "one difference for each element of the output",
        )
    return None


def _has_a_log(trace: Trace, step: Operation) -> bool:
    """Whether a logarithm is taken below an operation, or what lies below is not all known."""
    ends = {source.layer for source in step.sources() if source.layer}
    inside = [op.lower().replace("_", "") for layer in trace.layers if layer.key in ends for op in layer.ops]
    ops = [*inside, *(source.op for source in step.sources())]
    return any("log" in op or op in ("unknown", "checkpointfunction") for op in ops)


def _is_last(step: Operation, path: list[Operation]) -> bool:
    """Whether what it gives out is the model's output, of samples and classes, or is made after it."""
    if not step.in_model:
        return True
    ends = [source for o in path if o.op == "output" for source in o.reads]
    return step in ends and len(step.shape) == 2 and step.shape[1] > 1


def _is_broadcast(step: Operation, path: list[Operation]) -> bool:
    """Whether B numbers of the model, (B,) or (B, 1), are compared with a target as (B, B).

    A difference of the outputs among themselves, every pair on purpose, reads two of them.
    """
    if step.in_model or len(step.reads) != 1 or step.op not in ("expand", "sub", "rsub"):
        return False
    compared = [reader for reader in path if step in reader.reads] if step.op == "expand" else [step]
    count = math.prod(step.reads[0].shape)
    return (
        count > 1
        and step.shape == [count, count]
        and any(o.op in (*PAIRED, "sub", "rsub") and len(o.reads) == 1 for o in compared)
    )
