"""Changes of a model of anybody's, in place: how its weights begin, what stands between its layers.

Each is one line to paste after the model is made and before its optimizer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bpdiag import initialization
from bpdiag.config import UsageError
from bpdiag.rules import ACTIVATIONS
from bpdiag.session import watch
from bpdiag.trace import Trace
from bpdiag.trial import of_model_and_batch

# torch's module: the rule that it is
ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Softplus: "softplus",
    nn.Hardtanh: "hardtanh",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Softsign: "softsign",
    nn.LogSigmoid: "log_sigmoid",
}
# that leave the shape as it is
ELEMENTWISE = (*ACTIVATION_MODULES, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.Dropout)
SWEEPS = 20  # of ``rescale``, at most; a relu net needs one
CLOSE = 0.02  # decades that a gain may be off: 5 %
MOST = 10.0  # that one sweep multiplies a weight by, or divides


def weight_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | _ConvNd]]:
    """(parent, its name there, the layer) of every linear layer and convolution; attention's own are left out."""
    for parent in model.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear | _ConvNd) and not isinstance(parent, nn.MultiheadAttention):
                yield parent, name, layer


def activations(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, its name there, the module) of every activation that is a module."""
    for parent in model.modules():
        for name, module in parent.named_children():
            if type(module) in ACTIVATION_MODULES:
                yield parent, name, module


@torch.no_grad()
def _draw(model: nn.Module, draw: Callable[[Tensor, float, torch.Generator], None]) -> None:
    """New weights at the critical variance of the model's activation, relu's where none is a module; no biases."""
    names = [ACTIVATION_MODULES[type(module)] for _, _, module in activations(model)]
    r = ACTIVATIONS[names[0] if names else "relu"].r
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    for _, _, layer in weight_layers(model):
        W = torch.empty(layer.weight.shape)
        draw(W, 1 / r**2, generator)
        layer.weight.copy_(W)
        if layer.bias is not None:
            layer.bias.zero_()


def critical(model: nn.Module) -> None:
    """Var W = 1 / (r^2 fan_in): 2/fan_in for the relu kind (He), 1/fan_in for the tanh kind (LeCun); no biases.

    Example:
        >>> net = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))
        >>> critical(net)
        >>> round(float(net[0].weight.detach().var() * 1000), 1), float(net[0].bias.detach().abs().max())
        (2.0, 0.0)
    """
    _draw(model, initialization.normal)


def orthogonal(model: nn.Module) -> None:
    """Orthogonal weights of the critical size; no biases (Saxe et al. 2014)."""
    _draw(model, initialization.orthogonal)


def rescale(model: nn.Module, batch: Any, loss: Callable[..., Tensor]) -> None:
    """Divide each weight by the gain it owns, measured on ``batch``, until every backward gain is 1.

    The gain of a step is the factor that the weights above it and the slopes below it make; the weights are divided by
    it, and the first layer's by the rms of what it gives out.  Biases become 0.  A net whose slopes shrink as its
    weights grow (tanh, sigmoid) takes several sweeps and may not get there; one whose numbers are not finite begins
    at critical weights.  Gradients are cleared.

    Source:
        Mishkin & Matas 2016 (LSUV) scale so that the outputs have variance 1; by the gradient instead: ours.
    """
    with torch.no_grad():
        for _, _, layer in weight_layers(model):
            if layer.bias is not None:
                layer.bias.zero_()
    loss = of_model_and_batch(loss, model, batch)
    for _ in range(SWEEPS):
        with watch(model) as watching:
            loss(model, batch).backward()
            watching.step()
        model.zero_grad(set_to_none=True)
        if _overflows(watching.trace):
            critical(model)
            continue
        factors = _factors(watching.trace)
        if all(abs(math.log10(factor)) < CLOSE for factor in factors.values()):
            break
        with torch.no_grad():
            for name, factor in factors.items():
                owner = model.get_submodule(name)
                if isinstance(owner, nn.Linear | _ConvNd):
                    owner.weight.mul_(min(max(factor, 1 / MOST), MOST))


def _overflows(trace: Trace) -> bool:
    """A weight layer gives out, or gets back, what is not finite."""
    values = [trace.value(name, i, 0) for i in trace.weight_layers() for name in ("z_rms", "g_z_norm")]
    return any(value is not None and not math.isfinite(value) for value in values)


def _factors(trace: Trace) -> dict[str, float]:
    """Layer -> what its weights are to be multiplied by."""
    rows = trace.weight_layers()
    factors = {}
    for i in rows:
        gain, above = trace.value("backward_gain", i, 0), trace.layers[i].next
        if gain and above is not None and math.isfinite(gain):
            factors[trace.layers[above].name] = 1 / gain
    if rows and (size := trace.value("z_rms", rows[0], 0)) and math.isfinite(size):
        factors[trace.layers[rows[0]].name] = 1 / size
    return factors


def swap(model: nn.Module, kind: Callable[[], nn.Module]) -> None:
    """``kind()`` in the place of every activation that is a module, and its critical weights.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1))
        >>> swap(net, nn.ReLU)
        >>> net[1]
        ReLU()
    """
    for parent, name, _ in list(activations(model)):
        setattr(parent, name, kind())
    critical(model)


def normalize(model: nn.Module) -> None:
    """A layer norm behind every linear layer, a batch norm behind every convolution; the last layer stays as it is.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1))
        >>> normalize(net)
        >>> [type(m).__name__ for m in net[0]], type(net[2]).__name__
        (['Linear', 'LayerNorm'], 'Linear')
    """
    norms = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    for parent, name, layer in list(weight_layers(model))[:-1]:
        norm: nn.Module
        if isinstance(layer, nn.Linear):
            norm = nn.LayerNorm(layer.out_features)
        else:
            norm = norms[layer.weight.dim() - 2](layer.out_channels)
        setattr(parent, name, nn.Sequential(layer, norm.to(layer.weight)))


class Residual(nn.Module):
    """x + scale * branch(x), of a branch that leaves the shape as it is."""

    def __init__(self, branch: nn.Module, scale: float) -> None:
        super().__init__()
        self.branch, self.scale = branch, scale

    def forward(self, x: Tensor) -> Tensor:
        """What comes in, and what the branch adds to it."""
        return x + self.scale * self.branch(x)


def residual(model: nn.Module) -> None:
    """x + branch(x) / sqrt(blocks) for every block of the model's nn.Sequentials and nn.ModuleLists.

    A block is a layer that leaves the shape as it is and, in a Sequential, the norms, activations and dropout behind
    it.  The sum stands where the layer stood, and nn.Identity in the place of the rest.

    Raises:
        UsageError: There is no block.

    Source:
        He et al. 2016; the scale: Hanin & Rolnick 2018, De & Smith 2020.

    Example:
        >>> net = nn.Sequential(*[nn.Linear(4, 4), nn.Tanh()] * 2, nn.Linear(4, 2))
        >>> residual(net)
        >>> [type(m).__name__ for m in net], net[0].scale
        (['Residual', 'Identity', 'Residual', 'Identity', 'Linear'], 0.7071067811865475)
    """
    found = list(blocks(model))
    if not found:
        raise UsageError("no block of the model leaves its shape as it is")
    for parent, names in found:
        inside = [getattr(parent, name) for name in names]
        branch = nn.Sequential(*inside) if len(inside) > 1 else inside[0]
        setattr(parent, names[0], Residual(branch, 1 / math.sqrt(len(found))))
        for name in names[1:]:
            setattr(parent, name, nn.Identity())


def blocks(model: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    """(a Sequential or ModuleList, the names in it of the modules of one block) of every block that can be a branch."""
    for parent in model.modules():
        if not isinstance(parent, nn.Sequential | nn.ModuleList):
            continue
        children = [(name, parent._modules[name]) for name in parent._modules]
        for n, (name, layer) in enumerate(children):
            if isinstance(layer, nn.Linear | _ConvNd) and _leaves_shape(layer):
                tail = itertools.takewhile(lambda child: isinstance(child[1], ELEMENTWISE), children[n + 1 :])
                yield parent, [name, *([key for key, _ in tail] if isinstance(parent, nn.Sequential) else [])]


def _leaves_shape(layer: nn.Linear | _ConvNd) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.in_features == layer.out_features
    same = layer.padding == "same" or all(
        s == 1 and isinstance(p, int) and 2 * p == d * (k - 1)
        for s, p, d, k in zip(layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True)
    )
    return same and not layer.transposed and layer.in_channels == layer.out_channels


def register(model: nn.Module) -> None:
    """Modules that stand in a plain list or dict become the model's own: nn.ModuleList, nn.ModuleDict.

    Raises:
        UsageError: There are none.
    """
    found = list(unregistered(model))
    if not found:
        raise UsageError("no module of the model keeps others in a plain list or dict")
    for parent, name, held in found:
        setattr(parent, name, nn.ModuleList(held) if isinstance(held, list) else nn.ModuleDict(held))


def unregistered(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, its attribute, the list or dict) of every one that holds modules and nothing else."""
    for parent in model.modules():
        for name, held in vars(parent).items():
            inside = held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()
            if not name.startswith("_") and inside and all(isinstance(x, nn.Module) for x in inside):
                yield parent, name, held


def own(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """The optimizer updates every parameter of the model that asks for gradient."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    if left_out:
        optimizer.add_param_group({"params": left_out})
