"""What a watcher did not see, each with its reason: modules never called, parameters that nobody updates or owns."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bpdiag.config import UsageError
from bpdiag.hooks.call import is_leaf


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by the names they have without the wrappers of torch.compile and DistributedDataParallel.

    Example:
        >>> [name for name, _ in named_modules(torch.compile(nn.Sequential(nn.ReLU())))]
        ['', '', '0']
    """
    spread = isinstance(model, nn.parallel.DistributedDataParallel)
    for name, module in model.named_modules():
        plain = re.sub(r"(^|\.)_orig_mod(?=\.|$)", "", name).removeprefix(".")
        yield (re.sub(r"^module(\.|$)", "", plain) if spread else plain), module


class Overlooked:
    """What the sampled steps met and have no row for."""

    def __init__(self) -> None:
        self.why: dict[nn.Module, str] = {}  # of modules with a call that was not recorded
        self.besides: set[nn.Module] = set()  # called without gradient in a pass with gradient
        self.used: set[nn.Module] = set()  # never called, and a gradient came to parameters of their own
        self.foreign: list[nn.Parameter] | None = None  # parameters of a forward pass that are not the model's

    def note_gradients(self, modules: Iterable[nn.Module]) -> None:
        """Before they are cleared: which of these modules, not called so far, got some."""
        for module in modules:
            if any(p is not None and p.grad is not None for p in module._parameters.values()):
                self.used.add(module)


def unseen(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], seen: Collection[str], overlooked: Overlooked
) -> list[dict[str, str]]:
    """``{"what": module or parameter, "name": ..., "reason": ...}``, in the order of the model.

    Args:
        model: the watched one.
        optimizers: those given.
        seen: names of the modules in the layer table.
        overlooked: by the hooks.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
        >>> [line["name"] for line in unseen(model, [optimizer], ["0"], Overlooked())]
        ['1', '1.weight', '1.bias']
    """
    found = []
    for name, module in named_modules(model):
        if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and name in seen:
            found.append({"what": "module", "name": name, "reason": "fused: not visible inside"})
        if name in seen and module in overlooked.besides:
            found.append({"what": "module", "name": name, "reason": "called without gradient too: that has no row"})
        owed = is_leaf(module) and (module in overlooked.why or not isinstance(module, nn.Identity))
        if owed and name not in seen:
            found.append({"what": "module", "name": name, "reason": _why(module, overlooked)})
    owned = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    foreign = overlooked.foreign or ()
    for p in foreign:
        if p not in owned:
            reason = "receives gradient, in no module of the model"
            found.append({"what": "parameter", "name": f"of shape {tuple(p.shape)}", "reason": reason})
    if optimizers:
        for name, p in model.named_parameters():
            if p.requires_grad and p not in owned:
                found.append({"what": "parameter", "name": name, "reason": "in no optimizer, so never updated"})
        strangers = [tuple(p.shape) for p in owned - set(model.parameters()) - set(foreign)]
        for shape in sorted(strangers):
            reason = "in an optimizer, in no module of the model: replaced since, or another model's"
            found.append({"what": "parameter", "name": f"of shape {shape}", "reason": reason})
    return found


def foreign_parameters(model: nn.Module, outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> list[nn.Parameter]:
    """Parameters that outputs were computed from and no module of the model has; what lies below the inputs is none.

    Example:
        >>> hidden, model = nn.Linear(2, 2), nn.Linear(2, 1)
        >>> x = torch.ones(1, 2)
        >>> sorted(tuple(p.shape) for p in foreign_parameters(model, [model(hidden(x))], [x]))
        [(2,), (2, 2)]
    """
    own, found = set(model.parameters()), dict[nn.Parameter, None]()
    if any(hasattr(p, "full_tensor") for p in own):
        return []  # sharded: the forward pass computes with others, gathered for it
    stack: list[Any] = [t.grad_fn for t in outputs]
    seen = {t.grad_fn for t in inputs} | {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and leaf not in own:
            found[leaf] = None
        stack += [below for below, _ in node.next_functions]
    return list(found)


def refuse(model: nn.Module) -> None:
    """A model that cannot be watched is refused by name.

    Raises:
        UsageError: It is scripted, quantized, or spread over devices by threads.
    """
    for name, module in model.named_modules():
        kind, where = type(module), f"model{'.' if name else ''}{name}"
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(f"{where}: {kind.__name__} is scripted and takes no hooks; watch it before torch.jit does")
        if isinstance(module, nn.DataParallel):
            raise UsageError(
                f"{where}: DataParallel runs copies in threads; watch its module, or use DistributedDataParallel"
            )
        if kind.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise UsageError(f"{where}: {kind.__name__} is quantized and has no gradient; watch the float model")


def _why(module: nn.Module, overlooked: Overlooked) -> str:
    used = "never called as a module: another one uses its parameters itself"
    return overlooked.why.get(module) or (used if module in overlooked.used else "never called")
