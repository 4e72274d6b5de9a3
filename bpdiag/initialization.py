"""How weights begin: presets, or a variance given as a number.

Letters: fan_in, the numbers that one output sums (N_in; for a convolution C_in times the places of the kernel), fan_out
the numbers that one input reaches (N_out; C_out times the places).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

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


def he(rule: type[Activation], fan_in: int, fan_out: int) -> float:
    """sigma_w^2 = 2: keeps the backward gain of a relu net at 1 (He et al. 2015, eq. 14)."""
    return 2.0


def lecun(rule: type[Activation], fan_in: int, fan_out: int) -> float:
    """sigma_w^2 = 1: keeps it at 1 where the slope at 0 is 1 (LeCun et al. 1998, eq. 16)."""
    return 1.0


def glorot(rule: type[Activation], fan_in: int, fan_out: int) -> float:
    """Var W = 2 / (fan_in + fan_out): a compromise of both directions (Glorot & Bengio 2010, eq. 12)."""
    return 2 * fan_in / (fan_in + fan_out)


def torch_default(rule: type[Activation], fan_in: int, fan_out: int) -> float:
    """sigma_w^2 = 1/3: the default of torch's linear and convolution, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    return 1 / 3


def critical(rule: type[Activation], fan_in: int, fan_out: int) -> float:
    """sigma_w^2 = 1/r^2: critical for the activation, in theory's two classes."""
    return 1 / rule.r**2


def normal(W: Tensor, variance: float, generator: torch.Generator) -> None:
    """W ~ N(0, variance / fan_in)."""
    W.normal_(0, math.sqrt(variance / fan_in(W)), generator=generator)


def uniform(W: Tensor, variance: float, generator: torch.Generator) -> None:
    """W ~ U(-bound, bound),  bound^2 = 3 variance / fan_in."""
    bound = math.sqrt(3 * variance / fan_in(W))
    W.uniform_(-bound, bound, generator=generator)


def orthogonal(W: Tensor, variance: float, generator: torch.Generator) -> None:
    """Equal singular values, of the size that makes sigma_w^2 the variance (Saxe et al. 2014, section 3).

    They are those of the matrix (fan_out of one place, fan_in) that a convolution's weight is when it is written flat.
    """
    M = W.view(len(W), -1)
    draw = torch.empty(max(M.shape), min(M.shape)).normal_(generator=generator)
    Q, R = torch.linalg.qr(draw)
    Q = Q * torch.sign(torch.diagonal(R))  # else the draw is not uniform over the rotations
    M.copy_(Q if M.shape == Q.shape else Q.t())
    M.mul_(max(1.0, math.sqrt(M.shape[0] / M.shape[1])) * math.sqrt(variance))


@dataclass(frozen=True)
class Preset:
    """How large weights begin, how they are drawn, and the bias that goes with them."""

    weight_variance: Callable[[type[Activation], int, int], float]  # (rule, fan_in, fan_out) -> sigma_w^2
    draw: Callable[[Tensor, float, torch.Generator], None]  # of W with that sigma_w^2
    bias: float  # Var b fan_in, uniform


INITIALIZERS = {
    "he": Preset(he, normal, 0.0),
    "lecun": Preset(lecun, normal, 0.0),
    "glorot": Preset(glorot, normal, 0.0),
    "torch": Preset(torch_default, uniform, 1 / 3),
    "orthogonal": Preset(critical, orthogonal, 0.0),
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


def variances(config: ModelConfig, fan_in: int, fan_out: int) -> tuple[float, float]:
    """(sigma_w^2, sigma_b^2) = (Var W fan_in, Var b) of a layer, as ``config`` has it.

    Example:
        >>> variances(ModelConfig(weight_variance="glorot", bias_variance="0.5"), 30, 10)
        (1.5, 0.5)
    """
    rule = ACTIVATIONS[config.activation]
    weights = number("model.weight_variance", config.weight_variance, INITIALIZERS)
    if weights is None:
        weights = INITIALIZERS[config.weight_variance].weight_variance(rule, fan_in, fan_out)
    biases = number("model.bias_variance", config.bias_variance, BIAS_PRESETS)
    if biases is None:
        biases = _bias_of_preset(config) / fan_in
    return weights, biases


def _bias_of_preset(config: ModelConfig) -> float:
    """Var b fan_in where no number is given."""
    preset = config.weight_variance if config.bias_variance == "preset" else config.bias_variance
    return INITIALIZERS[preset].bias if preset in INITIALIZERS else 0.0


def initialize(W: Tensor, b: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """Draw W, then b, as ``config`` says; a bias without variance draws nothing."""
    weights, biases = variances(config, fan_in(W), fan_out(W))
    preset = INITIALIZERS.get(config.weight_variance)
    (preset.draw if preset else normal)(W, weights, generator)
    if number("model.bias_variance", config.bias_variance, BIAS_PRESETS) is not None:
        b.normal_(0, math.sqrt(biases), generator=generator)
        return
    bound = math.sqrt(3 * biases)
    b.uniform_(-bound, bound, generator=generator) if bound else b.zero_()
