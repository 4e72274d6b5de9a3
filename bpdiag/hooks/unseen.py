"""What a watcher did not see, each with its reason: modules never called, parameters that nobody updates or owns."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from bpdiag.hooks.call import is_leaf


def unseen(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    seen: Collection[str],
    without_gradient: Collection[str],
) -> list[dict[str, str]]:
    """``{"what": module or parameter, "name": ..., "reason": ...}``, in the order of the model.

    Args:
        model: the watched one.
        optimizers: those given.
        seen: names of the modules in the layer table.
        without_gradient: names of the modules that were called where no gradient is recorded.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
        >>> [line["name"] for line in unseen(model, [optimizer], ["0"], [])]
        ['1', '1.weight', '1.bias']
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and name in seen:
            found.append({"what": "module", "name": name, "reason": "fused: not visible inside"})
        if name not in seen and is_leaf(module) and not isinstance(module, nn.Identity):
            found.append({"what": "module", "name": name, "reason": _why(module, name in without_gradient)})
    if optimizers:
        owned = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        for name, p in model.named_parameters():
            if p.requires_grad and p not in owned:
                found.append({"what": "parameter", "name": name, "reason": "in no optimizer, so never updated"})
        strangers = [tuple(p.shape) for p in owned - set(model.parameters())]
        for shape in sorted(strangers):
            reason = "in an optimizer, in no module of the model: replaced since, or another model's"
            found.append({"what": "parameter", "name": f"of shape {shape}", "reason": reason})
    return found


def _why(module: nn.Module, without_gradient: bool) -> str:
    if without_gradient:
        return "called without gradient only"
    if any(p.grad is not None for p in module.parameters(recurse=False)):
        return "never called as a module: another one uses its parameters itself"
    return "never called"
