"""How weights begin: presets, or a variance given as a number.

Letters: fan_in, the numbers that one output sums (N_in; for a convolution C_in times the places of the kernel), fan_out
the numbers that one input reaches (N_out; C_out times the places).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from bpdiag.config import ModelConfig, UsageError, nearest
from bpdiag.rules import ACTIVATIONS, Activation


def fan_in(W: Tensor) -> int:
    """N_in, or C_in times the places of the kernel.

    Example:
        >>> fan_in(torch.empty(16, 3, 5, 5)), fan_out(torch.empty(16, 3, 5, 5))
        (75, 400)
    """
    return W[0].numel()


def fan_out(W: Tensor) -> int:
    """N_out, or C_out times the places of the kernel."""
    return W[:, 0].numel()


def normal(W: Tensor, variance: float, generator: torch.Generator) -> None:
    """W ~ N(0, variance / fan_in)."""
    W.normal_(0, math.sqrt(variance / fan_in(W)), generator=generator)


def he(W: Tensor, rule: type[Activation], generator: torch.Generator) -> None:
    """sigma_w^2 = 2: keeps the backward gain of a relu net at 1 (He et al. 2015, eq. 14)."""
    normal(W, 2.0, generator)


def lecun(W: Tensor, rule: type[Activation], generator: torch.Generator) -> None:
    """sigma_w^2 = 1: keeps it at 1 where the slope at 0 is 1 (LeCun et al. 1998, eq. 16)."""
    normal(W, 1.0, generator)


def glorot(W: Tensor, rule: type[Activation], generator: torch.Generator) -> None:
    """Var W = 2 / (fan_in + fan_out), normal: a compromise of both directions (Glorot & Bengio 2010, eq. 12)."""
    normal(W, 2 * fan_in(W) / (fan_in(W) + fan_out(W)), generator)


def torch_default(W: Tensor, rule: type[Activation], generator: torch.Generator) -> None:
    """W ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of torch's linear and convolution, sigma_w^2 = 1/3."""
    bound = 1 / math.sqrt(fan_in(W))
    W.uniform_(-bound, bound, generator=generator)


def orthogonal(W: Tensor, rule: type[Activation], generator: torch.Generator) -> None:
    """Equal singular values, of the size critical for the activation: sig = 1/r (Saxe et al. 2014, section 3).

    They are those of the matrix (fan_out of one place, fan_in) that a convolution's weight is when it is written flat.
    """
    M = W.view(len(W), -1)
    draw = torch.empty(max(M.shape), min(M.shape)).normal_(generator=generator)
    Q, R = torch.linalg.qr(draw)
    Q = Q * torch.sign(torch.diagonal(R))  # else the draw is not uniform over the rotations
    M.copy_(Q if M.shape == Q.shape else Q.t())
    M.mul_(max(1.0, math.sqrt(M.shape[0] / M.shape[1])) / rule.r)


# a preset of the weights: (rule of the weights, sigma_b^2 fan_in of the bias that goes with it)
INITIALIZERS = {
    "he": (he, 0.0),
    "lecun": (lecun, 0.0),
    "glorot": (glorot, 0.0),
    "torch": (torch_default, 1 / 3),
    "orthogonal": (orthogonal, 0.0),
}
BIAS_PRESETS = ("preset", *INITIALIZERS)


def number(key: str, value: str, presets: Iterable[str]) -> float | None:
    """A number of 0 or more, None for the name of a preset.

    Raises:
        UsageError: It is neither, or negative, or not finite.

    Example:
        >>> number("model.weight_variance", "1.7", INITIALIZERS), number("model.weight_variance", "he", INITIALIZERS)
        (1.7, None)
    """
    if value in presets:
        return None
    try:
        found = float(value)
    except ValueError:
        raise UsageError(f"{key}={value}: unknown; a number, or a preset; {nearest(value, presets)}") from None
    if not 0 <= found < math.inf:
        raise UsageError(f"{key}={value}: must be 0 or more, and finite")
    return found


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
    bound = math.sqrt(3 * third / fan_in(W))
    b.uniform_(-bound, bound, generator=generator) if bound else b.zero_()
