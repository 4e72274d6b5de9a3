"""Networks built from our rules, and how their weights begin.

    z_l = W_l a_{l-1} + b_l,   a_l = phi(z_l),   l = 1..depth;   a_0 is the input, z_depth the logits.

With ``model.backward=autograd`` the same network, from the same seed, is built from torch's own modules instead.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from bpdiag.config import ModelConfig, UsageError, choose, nearest
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
    """a = phi(z) by a rule of ``rules.activation``; what it learns is a parameter, named as torch names it."""

    def __init__(self, rule: type[Activation]) -> None:
        super().__init__()
        self.rule = rule
        for name, start in rule.learnable.items():
            self.register_parameter(name, nn.Parameter(torch.tensor([start])))

    def forward(self, z: Tensor) -> Tensor:
        """Elementwise on any shape."""
        return self.rule.apply(z, *self.parameters())

    def extra_repr(self) -> str:
        """The rule's name."""
        return self.rule.name


def normal(W: Tensor, variance: float, generator: torch.Generator) -> None:
    """W ~ N(0, variance / fan_in)."""
    W.normal_(0, math.sqrt(variance / W.shape[1]), generator=generator)


def he(W: Tensor, rule: type[Activation], generator: torch.Generator) -> None:
    """sigma_w^2 = 2: keeps the backward gain of a relu net at 1 (He et al. 2015, eq. 14)."""
    normal(W, 2.0, generator)


def lecun(W: Tensor, rule: type[Activation], generator: torch.Generator) -> None:
    """sigma_w^2 = 1: keeps it at 1 where the slope at 0 is 1 (LeCun et al. 1998, eq. 16)."""
    normal(W, 1.0, generator)


def glorot(W: Tensor, rule: type[Activation], generator: torch.Generator) -> None:
    """Var W = 2 / (fan_in + fan_out), normal: a compromise of both directions (Glorot & Bengio 2010, eq. 12)."""
    normal(W, 2 * W.shape[1] / (W.shape[0] + W.shape[1]), generator)


def torch_default(W: Tensor, rule: type[Activation], generator: torch.Generator) -> None:
    """W ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)): nn.Linear's default, sigma_w^2 = 1/3."""
    bound = 1 / math.sqrt(W.shape[1])
    W.uniform_(-bound, bound, generator=generator)


def orthogonal(W: Tensor, rule: type[Activation], generator: torch.Generator) -> None:
    """Equal singular values, of the size critical for the activation: sig = 1/r (Saxe et al. 2014, section 3)."""
    draw = torch.empty(max(W.shape), min(W.shape)).normal_(generator=generator)
    Q, R = torch.linalg.qr(draw)
    Q = Q * torch.sign(torch.diagonal(R))  # else the draw is not uniform over the rotations
    W.copy_(Q if W.shape == Q.shape else Q.t())
    W.mul_(max(1.0, math.sqrt(W.shape[0] / W.shape[1])) / rule.r)


# a preset of the weights: (rule of the weights, sigma_b^2 fan_in of the bias that goes with it)
INITIALIZERS = {
    "he": (he, 0.0),
    "lecun": (lecun, 0.0),
    "glorot": (glorot, 0.0),
    "torch": (torch_default, 1 / 3),
    "orthogonal": (orthogonal, 0.0),
}


def number(key: str, value: str, presets: Iterable[str]) -> float | None:
    """A variance given as a number, None for the name of a preset.

    Raises:
        UsageError: It is neither, or negative, or not finite.

    Example:
        >>> number("model.weight_variance", "1.7", INITIALIZERS), number("model.weight_variance", "he", INITIALIZERS)
        (1.7, None)
    """
    if value in presets:
        return None
    try:
        variance = float(value)
    except ValueError:
        raise UsageError(f"{key}={value}: unknown; a number, or a preset; {nearest(value, presets)}") from None
    if not 0 <= variance < math.inf:
        raise UsageError(f"{key}={value}: must be 0 or more, and finite")
    return variance


def initialize(W: Tensor, b: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """Draw W, then b, as ``config`` says; a bias without variance draws nothing."""
    rule = ACTIVATIONS[config.activation]
    variance = number("model.weight_variance", config.weight_variance, INITIALIZERS)
    if variance is None:
        INITIALIZERS[config.weight_variance][0](W, rule, generator)
    else:
        normal(W, variance, generator)
    spread = number("model.bias_variance", config.bias_variance, BIAS_PRESETS)
    if spread is not None:
        b.normal_(0, math.sqrt(spread), generator=generator)
        return
    preset = config.weight_variance if config.bias_variance == "preset" else config.bias_variance
    third = INITIALIZERS[preset][1] if preset in INITIALIZERS else 0.0
    bound = math.sqrt(3 * third / W.shape[1])
    b.uniform_(-bound, bound, generator=generator) if bound else b.zero_()


BIAS_PRESETS = ("preset", *INITIALIZERS)


def check(config: ModelConfig) -> None:
    """Every name in ``config`` is known, every variance a preset or a number.

    Raises:
        UsageError: One is not; the message names the nearest.
    """
    choose("model.name", config.name, MODELS)
    choose("model.activation", config.activation, ACTIVATIONS)
    number("model.weight_variance", config.weight_variance, INITIALIZERS)
    number("model.bias_variance", config.bias_variance, BIAS_PRESETS)
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
            initialize(linear.weight, linear.bias, config, generator)
        modules[f"linear{layer}"] = linear
        if layer < config.depth:
            modules[f"{rule.name}{layer}"] = Nonlinearity(rule) if by_hand else rule.oracle(**rule.settings)
    return nn.Sequential(modules)
