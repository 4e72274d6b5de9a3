"""Elementwise nonlinearities: each function with its slope ("the squish's factor") under it.

    a = phi(z)        g_z = phi'(z) * g_a

A class states phi (``forward``), the rule (``vjp``), which of the two the rule ``saves``, where the slope jumps and
what it is there, the largest slope, and

    r = 1 / sqrt(critical sigma_w^2), rounded to theory's two classes: 1/sqrt(2) for the relu kind, else 1

so that d_w = log10(sig r) and d_s = log10(sl / r) are both 0 in a net that neither shrinks nor grows a gradient.
``oracle`` is torch's own module of the same function and ``node`` the name autograd gives its backward: the tests
compare with the first, the recorder recognizes both.

Source:
    Blame of weights and slopes: ours; critical variances: He et al. 2015 (2, relu), Schoenholz et al. 2017 (1, tanh).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bpdiag.rules.function import Rule

RELU_KIND = 1 / math.sqrt(2)


class Activation(Rule):
    """a = phi(z),  g_z = phi'(z) * g_a, elementwise on any shape.

    ``vjp(g_a, kept)`` takes what ``saves`` names: ``a`` where the slope is a function of the output (the output is
    kept by the next layer anyway, so it costs nothing), else ``z``.
    """

    saves: ClassVar[Literal["output", "input"]] = "output"
    largest_slope: ClassVar[float] = 1.0  # sup |phi'|
    r: ClassVar[float] = 1.0
    kinks: ClassVar[dict[float, float]] = {}  # z where the slope jumps -> the slope used there
    oracle: ClassVar[type[nn.Module]]
    node: ClassVar[str]
    settings: ClassVar[dict[str, float]] = {}  # the oracle's arguments that make it this function

    @classmethod
    def is_done_by(cls, module: nn.Module) -> bool:
        """Whether a module of torch computes exactly this function."""
        return type(module) is cls.oracle and all(getattr(module, k) == v for k, v in cls.settings.items())

    @classmethod
    def made(cls, node: Any) -> bool:
        """Whether a node of autograd's graph is this function's backward."""
        return node.name() == cls.node and all(getattr(node, f"_saved_{k}") == v for k, v in cls.settings.items())

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
        """The output or the input, as ``saves`` says."""
        return (output if cls.saves == "output" else inputs[0],)

    @classmethod
    def pull_back(
        cls, g: Tensor, kept: tuple[Tensor | None, ...], needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """(g_z,)."""
        return (cls.vjp(g, *kept),)

    @classmethod
    def slope(cls, kept: Tensor) -> Tensor:
        """phi'(z), elementwise: the vjp of ones.

        Example:
            >>> Tanh.slope(torch.tensor([0.0, 0.5]))
            tensor([1.0000, 0.7500])
        """
        return cls.vjp(torch.ones_like(kept), kept)


class Identity(Activation):
    """a = z,  da/dz = 1.  No kink; inf stays inf.  Keeps nothing: the slope is the same everywhere."""

    name = "identity"
    oracle = nn.Identity
    node = ""  # torch's Identity adds nothing to the graph

    def forward(z):
        return z.clone()  # a fresh tensor: an in-place operation on a must not change z

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
        """Nothing."""
        return ()

    def vjp(g_a, a=None):
        return g_a


class Sigmoid(Activation):
    """a = 1 / (1 + exp -z),  da/dz = a (1 - a) <= 1/4.  No kink; slope 0 at both infinities."""

    name = "sigmoid"
    largest_slope = 0.25
    oracle = nn.Sigmoid
    node = "SigmoidBackward0"

    def forward(z):
        return torch.sigmoid(z)

    def vjp(g_a, a):
        return g_a * a * (1 - a)


class Tanh(Activation):
    """a = tanh z,  da/dz = 1 - a^2 <= 1.  Saturates on both sides; no kink; slope 0 at both infinities."""

    name = "tanh"
    oracle = nn.Tanh
    node = "TanhBackward0"

    def forward(z):
        return torch.tanh(z)

    def vjp(g_a, a):
        return g_a * (1 - a * a)


class Relu(Activation):
    """a = max(z, 0),  da/dz = 1 for z > 0, else 0.  Kink at 0, slope there 0; nan passes g_a on, as in torch."""

    name = "relu"
    r = RELU_KIND
    kinks: ClassVar = {0.0: 0.0}
    oracle = nn.ReLU
    node = "ReluBackward0"

    def forward(z):
        return torch.clamp_min(z, 0)

    def vjp(g_a, a):
        return g_a.masked_fill(a <= 0, 0)  # not g_a * (a > 0): inf * 0 is nan


class LeakyRelu(Activation):
    """a = z for z > 0, else z/100,  da/dz = 1 for z > 0, else 1/100.  Kink at 0, slope there 1/100."""

    name = "leaky_relu"
    r = RELU_KIND
    kinks: ClassVar = {0.0: 0.01}
    oracle = nn.LeakyReLU
    settings: ClassVar = {"negative_slope": 0.01}
    node = "LeakyReluBackward0"

    def forward(z):
        return torch.where(z > 0, z, 0.01 * z)

    def vjp(g_a, a):
        return torch.where(a > 0, g_a, 0.01 * g_a)  # a and z have the same sign


ACTIVATIONS: dict[str, type[Activation]] = {rule.name: rule for rule in (Identity, Sigmoid, Tanh, Relu, LeakyRelu)}
