"""The parameters of K networks, layer by layer, as stacks: read from what ``bpdiag.model.build`` made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bpdiag.backprop.norm import Norm
from bpdiag.backprop.update import Optimizer, Parameter
from bpdiag.config import UsageError
from bpdiag.modules import Sum
from bpdiag.rules import Activation


@dataclass
class Layer:
    """A weight layer of all members, and what follows it."""

    W: Parameter  # (K, N_out, N_in)
    b: Parameter  # (K, N_out, 1)
    norm: Norm | None = None
    gamma: Parameter | None = None
    beta: Parameter | None = None
    scale: float | None = None  # of the branch, where a block ends

    def parameters(self) -> list[Parameter]:
        """Those that are trained."""
        return [p for p in (self.W, self.b, self.gamma, self.beta) if p is not None]


Modules = tuple[Any, Any, float | None]  # linear, norm or None, scale of the sum or None


def modules_of(net: nn.Module) -> list[Modules]:
    """The modules of each weight layer; what is no linear layer, norm or sum is its activation.

    Example:
        >>> from bpdiag.config import ModelConfig
        >>> from bpdiag.model import build
        >>> [norm for _, norm, _ in modules_of(build(ModelConfig(depth=2), 3, 2, seed=0))]
        [None, None]
    """
    found: list[Modules] = []
    for module in net.children():
        if isinstance(module, nn.Linear):
            found.append((module, None, None))
        elif not found:
            raise UsageError(f"a stack takes nets of linear layers; this begins with {type(module).__name__}")
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
            found[-1] = (found[-1][0], module, None)
        elif isinstance(module, Sum):
            found[-1] = (*found[-1][:2], module.scale)
    return found


def _shape(net: nn.Module) -> Iterator[tuple[Any, ...]]:
    for linear, norm, scale in modules_of(net):
        told = (type(norm).__mro__[1:2], norm.eps, getattr(norm, "momentum", None)) if norm is not None else ()
        yield tuple(linear.weight.shape), linear.weight.dtype, linear.weight.device, told, scale


def check(nets: Sequence[nn.Module], rules: Sequence[type[Activation]], rates: int, orders: Sequence[int]) -> None:
    """They can be one stack.

    Raises:
        UsageError: They cannot.
    """
    if not nets:
        raise UsageError("a stack of no nets: give one or more")
    for what, number in (("activations", len(rules)), ("rates", rates), ("orders", len(orders))):
        if number != len(nets):
            raise UsageError(f"a stack of {len(nets)} nets: {number} {what}; give one for each")
    first = list(_shape(nets[0]))
    for k, net in enumerate(nets):
        for layer, (here, there) in enumerate(zip(_shape(net), first, strict=False)):
            if here != there:
                raise UsageError(f"nets 0 and {k} of a stack differ in layer {layer + 1}: {there} and {here}")
        depth = len(modules_of(net))
        if depth != len(first):
            raise UsageError(f"nets 0 and {k} of a stack differ in depth: {len(first)} and {depth} weight layers")
    learns = next((rule.name for rule in rules if rule.learnable), None)
    if learns:
        raise UsageError(f"activation {learns}: it learns; such a net is trained alone")


def parameters_of(nets: Sequence[nn.Module], optimizer: Optimizer) -> list[Layer]:
    """Copies of their parameters, stacked."""

    def stacked(tensors: Sequence[Tensor]) -> Tensor:
        together = torch.stack([t.detach() for t in tensors])
        return together if together.dim() == 3 else together.unsqueeze(2)

    layers = []
    for alike in zip(*(modules_of(net) for net in nets), strict=True):
        linears, norms, scale = [m for m, _, _ in alike], [m for _, m, _ in alike], alike[0][2]
        W, b = (stacked([getattr(m, name) for m in linears]) for name in ("weight", "bias"))
        layer = Layer(Parameter.begin(W, optimizer), Parameter.begin(b, optimizer), scale=scale)
        if norms[0] is not None:
            gamma, beta = (stacked([getattr(m, name) for m in norms]) for name in ("weight", "bias"))
            layer.norm = Norm("batch" if isinstance(norms[0], nn.BatchNorm1d) else "layer", gamma, beta, norms[0].eps)
            layer.gamma, layer.beta = Parameter.begin(gamma, optimizer), Parameter.begin(beta, optimizer)
            if layer.norm.kind == "batch":
                mean, var = (stacked([getattr(m, f"running_{name}") for m in norms]) for name in ("mean", "var"))
                layer.norm.running, layer.norm.momentum = (mean, var), norms[0].momentum
        layers.append(layer)
    return layers
