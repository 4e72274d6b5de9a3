"""Networks built from our rules, and how their weights begin.

    z_l = W_l a_{l-1} + b_l,   a_l = phi(z_l),   l = 1..depth;   a_0 is the input, z_depth the logits.

With ``model.backward=autograd`` the same network, from the same seed, is built from torch's own modules instead.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from bpdiag.config import ModelConfig, choose
from bpdiag.rules import ACTIVATIONS, RULES, Activation

MODELS = ("mlp",)
BACKWARDS = ("handwritten", "autograd")


class Linear(nn.Module):
    """z = x W^T + b by our rule; ``weight`` (N_out, N_in) and ``bias`` (N_out,), as nn.Linear names them."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """(..., N_in) -> (..., N_out)."""
        return RULES["linear"].apply(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear shows them."""
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"


class Nonlinearity(nn.Module):
    """a = phi(z) by a rule of ``rules.activation``."""

    def __init__(self, rule: type[Activation]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, z: Tensor) -> Tensor:
        """Elementwise on any shape."""
        return self.rule.apply(z)

    def extra_repr(self) -> str:
        """The rule's name."""
        return self.rule.name


def he(W: Tensor, b: Tensor, generator: torch.Generator) -> None:
    """W ~ N(0, 2 / fan_in),  b = 0: keeps the backward gain of a relu net at 1 (He et al. 2015, eq. 14)."""
    W.normal_(0, math.sqrt(2 / W.shape[1]), generator=generator)
    b.zero_()


def torch_default(W: Tensor, b: Tensor, generator: torch.Generator) -> None:
    """W, b ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)): nn.Linear's default, a weight variance of 1/3."""
    bound = 1 / math.sqrt(W.shape[1])
    W.uniform_(-bound, bound, generator=generator)
    b.uniform_(-bound, bound, generator=generator)


INITIALIZERS = {"he": he, "torch": torch_default}


def check(config: ModelConfig) -> None:
    """Every name in ``config`` is known.

    Raises:
        UsageError: One is not; the message names the nearest.
    """
    choose("model.name", config.name, MODELS)
    choose("model.activation", config.activation, ACTIVATIONS)
    choose("model.weight_variance", config.weight_variance, INITIALIZERS)
    choose("model.backward", config.backward, BACKWARDS)


def build(config: ModelConfig, n_in: int, n_out: int, seed: int) -> nn.Sequential:
    """The network that ``config`` describes, in float32 on the CPU; equal seeds give equal weights on any backward.

    Modules are named linear1, tanh1, linear2, ...: the number is the layer.

    Raises:
        UsageError: A name is unknown.

    Example:
        >>> [name for name, _ in build(ModelConfig(depth=2, activation="tanh"), 784, 10, seed=0).named_children()]
        ['linear1', 'tanh1', 'linear2']
    """
    check(config)
    rule, by_hand = ACTIVATIONS[config.activation], config.backward == "handwritten"
    generator = torch.Generator().manual_seed(seed)
    widths = [n_in, *[config.width] * (config.depth - 1), n_out]
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for layer in range(1, config.depth + 1):
        n_below, n_here = widths[layer - 1], widths[layer]
        linear = Linear(n_below, n_here) if by_hand else skip_init(nn.Linear, n_below, n_here)
        with torch.no_grad():
            INITIALIZERS[config.weight_variance](linear.weight, linear.bias, generator)
        modules[f"linear{layer}"] = linear
        if layer < config.depth:
            modules[f"{rule.name}{layer}"] = Nonlinearity(rule) if by_hand else rule.oracle(**rule.settings)
    return nn.Sequential(modules)
