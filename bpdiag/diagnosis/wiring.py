"""Parameters that stand outside: owned by no module, by no optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from bpdiag.diagnosis.finding import Finding
from bpdiag.diagnosis.ledger import Profile

# reasons of the watcher's list of what it did not see (hooks.unseen)
UNOWNED = "receives gradient, in no module of the model"
LEFT_OUT = "in no optimizer, so never updated"
STRANGER = "in an optimizer, in no module of the model"
NEVER = "no gradient arrived at this weight"  # why a gradient is missing (hooks.weights)
CUT = "cut off: called, and no gradient came back; above it reads what has no graph: "
UNGRADED = "cut off: called without gradient only; above it reads what has no graph: "
FROZEN = "frozen"  # why a gradient is missing, likewise


def disconnected(p: Profile) -> Iterator[Finding]:
    """Weights that the forward pass uses and no step changes.

    Unowned: the gradient reaches parameters that no module of the model has (layers kept in a plain list): harm, for no
    optimizer can have been given them with the model's.  Left out: parameters that ask for gradient and are in no
    optimizer.  Harm where the optimizer holds others in their place (a layer replaced after it was made) or where the
    loss stands still; else a warning, as for a head trained alone on a body that nobody froze.
    """
    if _is_severed(p):
        yield _severed(p)
        return
    listed = p.trace.meta.get("unseen") or []
    by_reason = {
        reason: [line["name"] for line in listed if line["what"] == "parameter" and line["reason"].startswith(reason)]
        for reason in (UNOWNED, LEFT_OUT, STRANGER)
    }
    still = bool(len(p.plateau) and p.plateau[-1])
    yield from _cut(p, [line for line in listed if line["reason"].startswith((CUT, UNGRADED))])
    if unowned := by_reason[UNOWNED]:
        yield _finding(
            p,
            "unowned parameters: not in the optimizer",
            "harm",
            unowned,
            f"{_count(unowned)} of the forward pass belong to no module of the model: nothing ever updates them.",
            "The gradient reaches them; model.parameters() does not know them: layers in a plain list, dict or tuple.",
            "keep layers in nn.ModuleList or nn.ModuleDict, bare weights as nn.Parameter attributes",
        )
    if left := by_reason[LEFT_OUT]:
        replaced = bool(by_reason[STRANGER])
        why = "The optimizer holds others, which no module of the model has: they were replaced after it was made."
        yield _finding(
            p,
            "left out of the optimizer",
            "harm" if replaced or still else "warning",
            left,
            f"{_count(left)} of the model ask for gradient and are in no optimizer: they never change.",
            why if replaced else "What is meant to stay as it is says so with requires_grad_(False).",
            "make the optimizer after the model is complete, from all its parameters",
        )

    if still and not any(by_reason.values()) and (frozen := _frozen(p)):
        yield _finding(
            p,
            "frozen: no weight may change",
            "warning",
            frozen,
            f"Every weight is frozen, of {len(frozen)} layer{'s' * (len(frozen) > 1)}, and the loss stands still.",
            "requires_grad is False in all of them; what is left to train are biases, or a normalization's factors.",
            "call requires_grad_(True) on the layers that are meant to learn, before the optimizer is made",
        )


def _frozen(p: Profile) -> list[str]:
    """The weights of all layers, where none was ever to have a gradient, and an optimizer has something of the net."""
    owed = [p.trace.layers[i].name for i in p.trace.weight_layers()]
    asked_not_to = {m.layer for m in p.trace.missing if m.column == "g_W_norm" and m.reason == FROZEN}
    none = not p.trace.column("g_W_norm")[1].any() and asked_not_to.issuperset(owed)
    return [f"{name}.weight" for name in dict.fromkeys(owed)] if none and p.trace.meta.get("optimizer") else []


def _is_severed(p: Profile) -> bool:
    """Whether losses were told and an optimizer stepped, and no layer that asks for gradient ever had one."""
    owed = {p.trace.layers[i].key for i in p.trace.weight_layers()}
    without = {f"{m.layer}#{m.call}" for m in p.trace.missing if m.column == "g_W_norm" and m.reason == NEVER}
    told = len(p.trace.losses[0]) and p.trace.meta.get("optimizer")
    return bool(told and owed and owed == without and not p.lines and not p.trace.column("g_W_norm")[1].any())


def _severed(p: Profile) -> Finding:
    layers = [p.trace.layers[i] for i in p.trace.weight_layers()]
    found = _finding(
        p,
        "cut: the loss has no graph down to the net",
        "harm",
        [layer.name for layer in layers],
        f"No gradient leaves the loss: none of {len(layers)} layers ever receives one.",
        "What backward was called on was not computed from the net's output: a number taken out and made a tensor "
        "again (.item(), torch.tensor, numpy), a detach, or no_grad around the forward pass.",
        "call backward on the loss as computed from the net's output",
    )
    evidence = {"layers": float(len(layers)), "loss": float(p.trace.losses[1][-1])}
    return dataclasses.replace(found, layers=tuple(layer.key for layer in layers), evidence=evidence)


def _cut(p: Profile, lines: list[dict[str, str]]) -> Iterator[Finding]:
    """Layers that an optimizer has and no gradient reaches, below one that reads numbers without a graph."""
    if not lines:
        return
    names = [line["name"] for line in lines]
    reader = lines[0]["reason"].removeprefix(CUT).removeprefix(UNGRADED)
    above = next((layer for layer in p.trace.layers if layer.name == reader), None)
    title = above.title if above else reader
    below = f"{names[0]}" if len(names) == 1 else f"{names[0]} to {names[-1]}"
    meant = all(line["reason"].startswith(UNGRADED) for line in lines)
    learns = bool(p.converged[-1] or (p.falling[-1] and not p.plateau[-1]))
    found = _finding(
        p,
        "cut: no gradient passes (detach, no_grad, .data, or a tensor made anew)",
        "warning" if meant and learns else "harm",
        names,
        f"The way down is cut below {title}: {below} never receive{'s' * (len(names) == 1)} a gradient.",
        f"What {title} reads has no graph, though {len(names)} layer{'s' * (len(names) > 1)} with parameters in the "
        "optimizer ran before it.",
        "let it read what the layers below give out: no .detach(), .data, torch.no_grad(), .item(), numpy or argmax "
        "on the way; freeze on purpose with requires_grad_(False)",
    )
    yield dataclasses.replace(
        found,
        layers=tuple(f"{name}#0" for name in names),
        evidence={"layers": float(len(names)), "loss": found.evidence["loss"]},
    )


def _count(names: list[str]) -> str:
    return f"{len(names)} parameter{'s' * (len(names) > 1)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"


def _finding(p: Profile, cause: str, severity: str, names: list[str], sentence: str, why: str, remedy: str) -> Finding:
    return Finding(
        kind="disconnected",
        severity=severity,
        layers=tuple(dict.fromkeys(f"{name.rpartition('.')[0]}#0" for name in names if "." in name)),
        onset_step=int(p.steps[0]),
        cause=cause,
        evidence={"parameters": float(len(names)), "loss": float(p.losses[-1])},
        confidence=1.0,
        remedy=remedy,
        expected="an update in every weight",
        source="the model's parameters against autograd's leaves and the optimizer's groups: structure, no threshold",
        sentence=sentence,
        why=why,
    )
