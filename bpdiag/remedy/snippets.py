"""Remedies for a model of anybody's: what may be tried, as lines of Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bpdiag.diagnosis import Finding
from bpdiag.remedy.candidate import LONGEST, WARM, Candidate, groups
from bpdiag.remedy.surgery import activations, blocks, unregistered, weight_layers

RATES = {"a tenth of the rate": 0.1, "0.3 of the rate": 0.3, "three times the rate": 3, "ten times the rate": 10}
SQUASHES = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.Tanh, nn.ReLU, nn.ReLU6)  # that no logits should pass
CLOSE = 1e-2  # to 1, of half precision's sums too
LEAST_EPS = 1e-8  # Adam's own
LEAST_SHARE = 1e-30  # of which a logarithm is taken: float32 holds it, and a gradient of 1e30 times a share of it is 1


def candidates(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, output: Any, findings: Sequence[Finding]
) -> list[Candidate]:
    """What may mend the training of such a model, the likely first; nothing where no change of it mends what was found.

    Args:
        model: to see which changes can be made; it is left as it is.
        optimizer: likewise.
        batch: likewise.
        output: what the model gives for it.
        findings: what was found.
    """
    asked = groups(findings)
    if not asked:
        return []
    return [c for group in asked for c in _of(group, model, optimizer, batch, output)] + list(_pace(optimizer))


def _of(group: str, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, output: Any) -> Iterator[Candidate]:
    """The candidates of one group that this model can have."""
    layers, bends = list(weight_layers(model)), list(activations(model))
    if group == "initialization" and layers:
        for name, call in (
            ("critical weights", "critical(model)"),
            ("weights rescaled to gain 1", "rescale(model, batch, loss)"),
            ("orthogonal weights", "orthogonal(model)"),
        ):
            yield Candidate(name, group, code={"model": f"bpdiag.remedy.{call}"})
    elif group == "activation" and bends:
        for kind in ("ReLU", "Tanh", "GELU"):
            if any(type(m).__name__ != kind for _, _, m in bends):
                yield Candidate(kind, group, code={"model": f"bpdiag.remedy.swap(model, torch.nn.{kind})"})
    elif group == "normalization" and len(layers) > 1:
        yield Candidate("norms behind the layers", group, code={"model": "bpdiag.remedy.normalize(model)"})
        if any(getattr(m, "norm_first", True) is False for m in model.modules()):
            yield Candidate("norm first", group, code={"model": "for m in model.modules(): m.norm_first = True"})
    elif group == "residual" and any(True for _ in blocks(model)):
        yield Candidate("scaled residual blocks", group, code={"model": "bpdiag.remedy.residual(model)"})
    elif group == "output" and (last := _last(model)) is not None:
        name, module = last
        dropped = f'model.set_submodule("{name}", torch.nn.Identity())'
        yield Candidate(f"no {type(module).__name__} on the output", "wiring", code={"model": dropped})
    elif group == "output" and _probabilities(output):
        log = f"model.register_forward_hook(lambda model, given, p: p.clamp_min({LEAST_SHARE:g}).log())"
        yield Candidate("log of the probabilities", "wiring", code={"model": log})
    elif group == "ownership":
        if any(True for _ in unregistered(model)):
            yield Candidate("lists of modules registered", "wiring", code={"model": "bpdiag.remedy.register(model)"})
        own = {"optimizer": "bpdiag.remedy.own(optimizer, model)"}
        yield Candidate("all parameters in the optimizer", "wiring", code=own)
    elif group == "clearing":
        yield Candidate("gradients cleared", "wiring", code={"backward": "optimizer.zero_grad()"})
    elif group == "precision" and any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        yield Candidate("float32 weights", "wiring", code={"model": "model.float()"})
    elif group == "input" and (scale := _scale(batch)) is not None:
        line = "batch = (batch[0] - {:.6g}) / {:.6g}, *batch[1:]".format(*scale)
        yield Candidate("standardized input", "wiring", code={"batch": line})
    elif group == "decay" and any(g.get("weight_decay") for g in optimizer.param_groups):
        yield Candidate("no weight decay", "rate", code={"optimizer": _all_groups('g["weight_decay"] = 0.0')})


def _pace(optimizer: torch.optim.Optimizer) -> Iterator[Candidate]:
    """Rates and optimizers."""
    for name, factor in RATES.items():
        code = {"optimizer": _all_groups(f'g["lr"] *= {factor}')}
        yield Candidate(name, "rate", code=code, direction=1 if factor > 1 else -1)
    warm = f"warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters={WARM})"
    yield Candidate("warm-up", "rate", code={"optimizer": warm, "step": "warm.step()"}, direction=-1)
    clip = f"torch.nn.utils.clip_grad_norm_(model.parameters(), {LONGEST})"
    yield Candidate("clipping", "rate", code={"gradient": clip}, direction=-1)
    if any(g.get("eps", 0.0) > LEAST_EPS for g in optimizer.param_groups):
        yield Candidate("Adam's own eps", "rate", code={"optimizer": _all_groups(f'g["eps"] = {LEAST_EPS}')})
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        adam = "optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)"
        yield Candidate("Adam", "optimizer", code={"optimizer": adam})


def _all_groups(what: str) -> str:
    return f"for g in optimizer.param_groups: {what}"


def _last(model: nn.Module) -> tuple[str, nn.Module] | None:
    """(qualified name, module) of the module that stands last, where it is one that no logits should pass."""
    leaves = [(name, m) for name, m in model.named_modules() if name and not list(m.children())]
    return leaves[-1] if leaves and isinstance(leaves[-1][1], SQUASHES) else None


def _probabilities(output: Any) -> bool:
    """Shares of 1, over the second dimension or the last.  Cross-entropy of their logarithm is right: its sum is 1."""
    if not (isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1):
        return False
    return bool((output >= 0).all()) and any(bool(((output.sum(dim) - 1).abs() < CLOSE).all()) for dim in (1, -1))


def _scale(batch: Any) -> tuple[float, float] | None:
    """Mean and standard deviation of a batch's finite input numbers; None where there is no tensor of such to scale."""
    if not (isinstance(batch, tuple | list) and batch and isinstance(x := batch[0], Tensor) and x.is_floating_point()):
        return None
    known = x[x.isfinite()].double()
    if known.numel() < 2 or not (deviation := float(known.std())) > 0:
        return None
    return float(known.mean()), deviation
