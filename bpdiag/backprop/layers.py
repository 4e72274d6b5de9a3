"""The parameters of K networks, layer by layer, as stacks: read from what ``bpdiag.model.build`` made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bpdiag.backprop.conv import Picture, by_window, pictures_of
from bpdiag.backprop.norm import Norm
from bpdiag.backprop.update import Optimizer, Parameter
from bpdiag.config import UsageError
from bpdiag.modules import Sum
from bpdiag.rules import Activation


@dataclass
class Layer:
    """A weight layer of all members, and what follows it."""

    W: Parameter  # (K, N_out, N_in); of a convolution (K, C, c k k)
    b: Parameter  # (K, N_out, 1)
    norm: Norm | None = None
    gamma: Parameter | None = None
    beta: Parameter | None = None
    scale: float | None = None  # of the branch, where a block ends
    picture: Picture | None = None  # of a convolution

    @property
    def columns(self) -> int:
        """How many numbers of one sample a feature has: of a convolution one for each place."""
        return math.prod(self.picture.places) if self.picture else 1

    def parameters(self) -> list[Parameter]:
        """Those that are trained."""
        return [p for p in (self.W, self.b, self.gamma, self.beta) if p is not None]


Modules = tuple[Any, Any, float | None]  # linear or convolution, norm or None, scale of the sum or None


def modules_of(net: nn.Module) -> list[Modules]:
    """The modules of each weight layer; what is no linear layer, convolution, norm or sum learns nothing.

    Example:
        >>> from bpdiag.config import ModelConfig
        >>> from bpdiag.model import build
        >>> [norm for _, norm, _ in modules_of(build(ModelConfig(depth=2), 3, 2, seed=0))]
        [None, None]
    """
    found: list[Modules] = []
    for module in net.children():
        if isinstance(module, nn.Linear | nn.Conv2d):
            found.append((module, None, None))
        elif isinstance(module, nn.Unflatten):
            continue
        elif not found:
            raise UsageError(
                f"a stack takes nets of linear layers and convolutions; this begins with {type(module).__name__}"
            )
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm1d | nn.BatchNorm2d):
            found[-1] = (found[-1][0], module, None)
        elif isinstance(module, Sum):
            found[-1] = (*found[-1][:2], module.scale)
    return found


def _shape(net: nn.Module) -> Iterator[tuple[Any, ...]]:
    layers = modules_of(net)
    for (linear, norm, scale), picture in zip(layers, _pictures(net, len(layers)), strict=True):
        told = (type(norm).__mro__[1:2], norm.eps, getattr(norm, "momentum", None)) if norm is not None else ()
        yield tuple(linear.weight.shape), linear.weight.dtype, linear.weight.device, told, scale, picture


def _pictures(net: nn.Module, depth: int) -> list[Picture | None]:
    """Of each weight layer."""
    found = pictures_of(net)
    return [*found, *[None] * (depth - len(found))]


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
    for picture in pictures_of(nets[0]):
        if any(n % picture.pool for n in picture.places):
            high, wide = picture.places
            raise UsageError(f"a stack pools pictures of even sides; here {high} x {wide}: such a net is trained alone")
    learns = next((rule.name for rule in rules if rule.learnable), None)
    if learns:
        raise UsageError(f"activation {learns}: it learns; such a net is trained alone")


def arranged(p: Tensor, picture: Picture | None) -> Tensor:
    """A view of one net's parameter, in which its numbers follow each other as in the stack."""
    return by_window(p, picture.pool) if picture is not None and p.dim() == 3 else p


def parameters_of(nets: Sequence[nn.Module], optimizer: Optimizer) -> list[Layer]:
    """Copies of their parameters, stacked."""

    def stacked(modules: Sequence[Any], name: str, picture: Picture | None) -> Tensor:
        each = [arranged(getattr(m, name).detach(), picture) for m in modules]
        return torch.stack([t.reshape(len(t), -1) for t in each])

    layers = []
    several = [modules_of(net) for net in nets]
    for alike, picture in zip(zip(*several, strict=True), _pictures(nets[0], len(several[0])), strict=True):
        linears, norms, scale = [m for m, _, _ in alike], [m for _, m, _ in alike], alike[0][2]
        W, b = (stacked(linears, name, picture) for name in ("weight", "bias"))
        layer = Layer(Parameter.begin(W, optimizer), Parameter.begin(b, optimizer), scale=scale, picture=picture)
        if norms[0] is not None:
            gamma, beta = (stacked(norms, name, picture) for name in ("weight", "bias"))
            layer.gamma, layer.beta = Parameter.begin(gamma, optimizer), Parameter.begin(beta, optimizer)
            layer.norm = _norm(norms[0], gamma, beta, picture)
            if layer.norm.kind == "batch":
                mean, var = (stacked(norms, f"running_{name}", picture) for name in ("mean", "var"))
                layer.norm.running, layer.norm.momentum = (mean, var), norms[0].momentum
        layers.append(layer)
    return layers


def _norm(module: Any, gamma: Tensor, beta: Tensor, picture: Picture | None) -> Norm:
    """On the memory of gamma and beta."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return Norm("batch", gamma, beta, module.eps)
    if picture is None:
        return Norm("layer", gamma, beta, module.eps)
    places = picture.channels * picture.pool**2, math.prod(picture.windows)
    gamma, beta = (x.view(len(x), places[0], 1, places[1]) for x in (gamma, beta))
    return Norm("layer", gamma, beta, module.eps, places=places)
