"""Elementwise nonlinearities: each function with its slope ("the squish's factor") under it.

    a = phi(z)        g_z = phi'(z) * g_a

A class states phi (``forward``), the rule (``vjp``), which of the two the rule ``saves``, where the slope jumps and
what it is there, the largest slope, and

    r = 1 / sqrt(critical sigma_w^2), rounded to theory's two classes: 1/sqrt(2) for the relu kind, else 1

so that d_w = log10(sig r) and d_s = log10(sl / r) are both 0 in a net that neither shrinks nor grows a gradient.
Where a slope made from z cancels, it is computed in float32 at least.

``oracle`` is torch's own module of the same function and ``node`` the name autograd gives its backward: the tests
compare with the first, the recorder recognizes both.

Source:
    Blame of weights and slopes: ours; critical variances: He et al. 2015 (2, relu), Schoenholz et al. 2017 (1, tanh).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bpdiag.rules.arguments import floats, number, wrong
from bpdiag.rules.function import Rule, wide

RELU_KIND = 1 / math.sqrt(2)
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


class Activation(Rule):
    """a = phi(z),  g_z = phi'(z) * g_a, elementwise on any shape.

    ``vjp(g_a, kept)`` takes what ``saves`` names: ``a`` where the slope is a function of the output (the output is
    kept by the next layer anyway, so it costs nothing), else ``z``.  ``apply`` refuses all but
    a tensor of real numbers.
    """

    saves: ClassVar[Literal["output", "input"]] = "output"
    largest_slope: ClassVar[float] = 1.0  # sup |phi'|
    is_switch: ClassVar[bool] = False  # the slope is 0 or 1 and nothing else
    r: ClassVar[float] = 1.0
    kinks: ClassVar[dict[float, float]] = {}  # z where the slope jumps -> the slope used there
    oracle: ClassVar[type[nn.Module]]
    node: ClassVar[str]
    learnable: ClassVar[dict[str, float]] = {}  # further inputs, which are trained -> where they begin
    settings: ClassVar[dict[str, Any]] = {}  # the oracle's arguments that make it this function
    node_settings: ClassVar[dict[str, Any]]  # what its node saved of them; the settings unless said

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "vjp" in cls.__dict__:
            cls.is_switch = cls.__dict__.get("is_switch", False)

    @classmethod
    def guard(cls, apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``apply`` for a tensor of real numbers; no shape and no device is wrong for an elementwise rule."""
        name = cls.name

        def call(z: Tensor, *learned: Any) -> Tensor:
            floats(name, z=z)
            return apply(z, *learned)

        return call

    @classmethod
    def is_done_by(cls, module: nn.Module) -> bool:
        """Whether a module of torch computes exactly this function."""
        return type(module) is cls.oracle and all(getattr(module, k) == v for k, v in cls.settings.items())

    @classmethod
    def made(cls, node: Any) -> bool:
        """Whether a node of autograd's graph is this function's backward."""
        settings = getattr(cls, "node_settings", cls.settings)
        return node.name() == cls.node and all(getattr(node, f"_saved_{k}") == v for k, v in settings.items())

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
        """The output or the input, as ``saves`` says."""
        return (output if cls.saves == "output" else inputs[0],)

    @classmethod
    def pull_back(
        cls, g: Tensor, kept: tuple[Tensor | None, ...], needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """(g_z,)."""
        return (cls.vjp(g, *kept) if needs[0] else None,)

    @classmethod
    def slope(cls, kept: Tensor, *learned: Tensor) -> Tensor:
        """phi'(z), elementwise: the vjp of ones.

        Example:
            >>> Tanh.slope(torch.tensor([0.0, 0.5]))
            tensor([1.0000, 0.7500])
        """
        return cls.vjp(torch.ones_like(kept), kept, *learned)


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
    is_switch = True
    r = RELU_KIND
    kinks: ClassVar = {0.0: 0.0}
    oracle = nn.ReLU
    node = "ReluBackward0"

    def forward(z):
        return torch.clamp_min(z, 0)

    def vjp(g_a, a):
        # not g_a * (a > 0): inf * 0 is nan; detached, as of a there is nothing to differentiate
        return torch.ops.aten.threshold_backward(g_a, a.detach(), 0)

    @classmethod
    def slope(cls, kept: Tensor, *learned: Tensor) -> Tensor:
        """The same in one pass; of a rule derived from this one with a vjp of its own, that one's."""
        if cls.vjp is not Relu.vjp:
            return super().slope(kept)
        return torch.ops.aten.threshold_backward(kept.new_ones(()), kept, 0)


class LeakyRelu(Activation):
    """a = z for z > 0, else z/100,  da/dz = 1 for z > 0, else 1/100.  Kink at 0, slope there 1/100."""

    name = "leaky_relu"
    r = RELU_KIND
    kinks: ClassVar = {0.0: 0.01}
    oracle = nn.LeakyReLU
    settings: ClassVar = {"negative_slope": 0.01}
    node = "LeakyReluBackward0"

    def forward(z):
        return nn.functional.leaky_relu(z, 0.01)

    def vjp(g_a, a):
        return torch.ops.aten.leaky_relu_backward(g_a, a.detach(), 0.01, False)  # a and z have the same sign


class Prelu(Activation):
    """a = z for z > 0, else p z,  da/dz = 1 for z > 0, else p,  g_p = sum of g_a z where z <= 0.

    p (1,), or (C,) with one for each channel of z (B, C, ...), is learned and begins at 1/4 (He et al. 2015, section
    2.1).  Kink at 0, slope there p.  Keeps z: where p < 0 the output does not tell its sign.
    """

    name = "prelu"
    saves = "input"
    r = RELU_KIND
    kinks: ClassVar = {0.0: 0.25}
    learnable: ClassVar = {"weight": 0.25}
    oracle = nn.PReLU
    node = "PreluKernelBackward0"

    def forward(z, p=0.25):
        if not isinstance(p, Tensor):
            number("prelu", "p", p, "a number or a tensor")
            p = z.new_full((1,), p)
        floats("prelu", z=z, p=p)
        channels = z.shape[1] if z.dim() > 1 else 1
        if p.dim() > 1 or p.numel() not in (1, channels):
            raise wrong("prelu", "p", p, f"a number, or one for each of the {channels} channels of z")
        return nn.functional.prelu(z, p)

    def vjp(g_a, z, p=0.25):
        return torch.where(z > 0, g_a, _by_channel(p, z) * g_a)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
        """z and p: a tensor where it is learned, else a number."""
        return inputs

    @classmethod
    def pull_back(cls, g: Tensor, kept: tuple[Any, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """(g_z, g_p); None where not asked for, as g_p is where p is a number."""
        z, p = kept
        (g_z,) = super().pull_back(g, kept, needs)
        # not g times min(z, 0): inf * 0 is nan
        g_p = _to_channels(torch.where(z > 0, 0, g * z), p) if needs[1] else None
        return g_z, g_p


def _by_channel(p: Any, z: Tensor) -> Any:
    """One number for each channel of z (B, C, ...), ready to be multiplied with it."""
    if not isinstance(p, Tensor):
        return p
    return p.reshape(()) if p.numel() == 1 else p.view(-1, *[1] * (z.dim() - 2))


def _to_channels(g: Tensor, p: Tensor) -> Tensor:
    """The sum of g (B, C, ...) over everything but what p has a number for."""
    return g.sum().view_as(p) if p.numel() == 1 else g.sum([d for d in range(g.dim()) if d != 1]).view_as(p)


class Elu(Activation):
    """a = z for z > 0, else e^z - 1,  da/dz = 1 for z > 0, else e^z <= 1.  No kink; slope 0 at -inf, 1 at inf."""

    name = "elu"
    saves = "input"  # e^z; from the output a + 1 it would be 0 already at z = -37
    oracle = nn.ELU
    settings: ClassVar = {"alpha": 1.0}
    node = "EluBackward0"
    node_settings: ClassVar = {"alpha": 1.0, "scale": 1.0}

    def forward(z):
        return torch.where(z > 0, z, torch.expm1(z))

    def vjp(g_a, z):
        return g_a * torch.where(z <= 0, torch.exp(torch.clamp_max(z, 0)), 1.0)


class Selu(Activation):
    """a = lambda (z for z > 0, else alpha (e^z - 1)),  da/dz = lambda for z > 0, else lambda alpha e^z <= 1.758.

    lambda 1.0507, alpha 1.6733 make mean 0, variance 1 a fixed point (Klambauer et al. 2017, eq. 14).  Kink at 0, slope
    there lambda alpha; slope 0 at -inf, lambda at inf.
    """

    name = "selu"
    saves = "input"
    largest_slope = SELU_SCALE * SELU_ALPHA
    kinks: ClassVar = {0.0: SELU_SCALE * SELU_ALPHA}
    oracle = nn.SELU
    node = "EluBackward0"
    node_settings: ClassVar = {"alpha": SELU_ALPHA, "scale": SELU_SCALE}

    def forward(z):
        return SELU_SCALE * torch.where(z > 0, z, SELU_ALPHA * torch.expm1(z))

    def vjp(g_a, z):
        return g_a * torch.where(z <= 0, SELU_SCALE * SELU_ALPHA * torch.exp(torch.clamp_max(z, 0)), SELU_SCALE)


class Gelu(Activation):
    """a = z Phi(z),  da/dz = Phi(z) + z phi(z) in -.129 ... 1.129.

    Phi and phi are the normal distribution and its density (Hendrycks & Gimpel 2016).  No kink; at -inf a is nan, at
    both infinities the slope, as in torch.
    """

    name = "gelu"
    saves = "input"
    largest_slope = 1.128904145185155  # at z = sqrt 2
    r = RELU_KIND
    oracle = nn.GELU
    settings: ClassVar = {"approximate": "none"}
    node = "GeluBackward0"

    def forward(z):
        x = wide(z)
        return (x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))).to(z.dtype)

    def vjp(g_a, z):
        z = wide(z)
        Phi = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
        return g_a * (Phi + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))


class GeluTanh(Activation):
    """a = z (1 + t) / 2,  da/dz = (1 + t + z (1 - t^2) dv/dz) / 2,  t = tanh v,  v = sqrt(2/pi) (z + .044715 z^3).

    The approximation of ``gelu`` that many transformers use; slopes within -.129 ... 1.129.  No kink; at -inf a is nan,
    at both infinities the slope, as in torch.
    """

    name = "gelu_tanh"
    saves = "input"
    largest_slope = 1.128993068658772  # at z = 1.4185
    r = RELU_KIND
    oracle = nn.GELU
    settings: ClassVar = {"approximate": "tanh"}
    node = "GeluBackward0"

    def forward(z):
        x = wide(z)
        return (0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))).to(z.dtype)

    def vjp(g_a, z):
        z = wide(z)
        t = torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z))
        dv = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)
        return g_a * (0.5 * (1 + t) + 0.5 * z * (1 - t * t) * dv)


class Silu(Activation):
    """a = z sigmoid(z),  da/dz = p (1 + z (1 - p)) in -.0998 ... 1.0998,  p = sigmoid(z).

    No kink; at -inf a is nan, at both infinities the slope, as in torch.
    """

    name = "silu"
    saves = "input"
    largest_slope = 1.0998393201288672  # at z = 2.3994
    r = RELU_KIND
    oracle = nn.SiLU
    node = "SiluBackward0"

    def forward(z):
        return z * torch.sigmoid(z)

    def vjp(g_a, z):
        z = wide(z)
        p = torch.sigmoid(z)
        return g_a * p * (1 + z * (1 - p))


class Softplus(Activation):
    """a = log(1 + e^z),  da/dz = sigmoid(z) <= 1.  No kink; slope 0 at -inf, 1 at inf.

    Exact for every z; torch's own goes over to a = z from z = 20 on, 2e-9 off.
    """

    name = "softplus"
    saves = "input"
    r = RELU_KIND
    oracle = nn.Softplus
    settings: ClassVar = {"beta": 1.0, "threshold": 20.0}
    node = "SoftplusBackward0"

    def forward(z):
        return torch.logaddexp(z, torch.zeros_like(z))

    def vjp(g_a, z):
        return g_a * torch.sigmoid(z)


class Mish(Activation):
    """a = z w,  da/dz = w + z p (1 - w^2) in -.113 ... 1.0885,  w = tanh(log(1 + e^z)),  p = sigmoid(z).

    No kink; at -inf a is nan, at both infinities the slope, as in torch (Misra 2019).
    """

    name = "mish"
    saves = "input"
    largest_slope = 1.088498161251728  # at z = 1.4906
    r = RELU_KIND
    oracle = nn.Mish
    node = "MishBackward0"

    def forward(z):
        return z * torch.tanh(torch.logaddexp(z, torch.zeros_like(z)))

    def vjp(g_a, z):
        z = wide(z)
        w = torch.tanh(torch.logaddexp(z, torch.zeros_like(z)))
        return g_a * (w + z * torch.sigmoid(z) * (1 - w * w))


class Hardtanh(Activation):
    """a = z within -1 ... 1, else -1 or 1,  da/dz = 1 inside, 0 outside.  Kinks at -1 and 1, slope there 0."""

    name = "hardtanh"
    is_switch = True
    kinks: ClassVar = {-1.0: 0.0, 1.0: 0.0}
    oracle = nn.Hardtanh
    settings: ClassVar = {"min_val": -1.0, "max_val": 1.0}
    node = "HardtanhBackward0"

    def forward(z):
        return torch.clamp(z, -1, 1)

    def vjp(g_a, a):
        return g_a.masked_fill((a <= -1) | (a >= 1), 0)


class Relu6(Activation):
    """a = z within 0 ... 6, else 0 or 6,  da/dz = 1 inside, 0 outside.  Kinks at 0 and 6, slope there 0; nan passes."""

    name = "relu6"
    is_switch = True
    r = RELU_KIND
    kinks: ClassVar = {0.0: 0.0, 6.0: 0.0}
    oracle = nn.ReLU6
    node = "HardtanhBackward0"
    node_settings: ClassVar = {"min_val": 0.0, "max_val": 6.0}

    def forward(z):
        return torch.clamp(z, 0, 6)

    def vjp(g_a, a):
        return g_a.masked_fill((a <= 0) | (a >= 6), 0)


class Hardswish(Activation):
    """a = z min(max(z + 3, 0), 6) / 6,  da/dz = 0 up to -3, z/3 + 1/2 up to 3, then 1; sup 3/2.

    Kinks at -3, slope there 0, and at 3, slope there 1.  At -inf a is nan, as in torch (Howard et al. 2019).
    """

    name = "hardswish"
    saves = "input"
    largest_slope = 1.5
    r = RELU_KIND
    kinks: ClassVar = {-3.0: 0.0, 3.0: 1.0}
    oracle = nn.Hardswish
    node = "HardswishBackward0"

    def forward(z):
        return z * torch.clamp(z + 3, 0, 6) / 6

    def vjp(g_a, z):
        return (g_a * torch.where(z < 3, wide(z) / 3 + 0.5, 1.0)).masked_fill(z <= -3, 0)


class Hardsigmoid(Activation):
    """a = min(max(z + 3, 0), 6) / 6,  da/dz = 1/6 within -3 ... 3, 0 outside.  Kinks at -3 and 3, slope there 0.

    Torch's own takes 1/6 in float32 even for float64: 3e-8 off.
    """

    name = "hardsigmoid"
    saves = "input"  # the output rounds to 1 before z is 3
    largest_slope = 1 / 6
    kinks: ClassVar = {-3.0: 0.0, 3.0: 0.0}
    oracle = nn.Hardsigmoid
    node = "HardsigmoidBackward0"

    def forward(z):
        return torch.clamp(z + 3, 0, 6) / 6

    def vjp(g_a, z):
        return (g_a / 6).masked_fill((z <= -3) | (z >= 3), 0)


class Softsign(Activation):
    """a = z / (1 + |z|),  da/dz = 1 / (1 + |z|)^2 <= 1.  No kink; at the infinities a is nan as in torch, slope 0."""

    name = "softsign"
    saves = "input"  # (1 - |a|)^2 would lose digits where a is near 1
    oracle = nn.Softsign
    node = ""  # torch composes it: no node of its own

    def forward(z):
        return z / (1 + torch.abs(z))

    def vjp(g_a, z):
        return g_a / (1 + torch.abs(z)).square()


class LogSigmoid(Activation):
    """a = -log(1 + e^-z),  da/dz = sigmoid(-z) <= 1.  No kink; slope 1 at -inf, 0 at inf."""

    name = "log_sigmoid"
    saves = "input"
    r = RELU_KIND
    oracle = nn.LogSigmoid
    node = "LogSigmoidBackward0"

    def forward(z):
        return -torch.logaddexp(-z, torch.zeros_like(z))

    def vjp(g_a, z):
        return g_a * torch.sigmoid(-z)


_TABLE = (
    Identity, Sigmoid, Tanh, Relu, LeakyRelu, Prelu, Elu, Selu, Gelu, GeluTanh, Silu, Softplus, Mish, Hardtanh, Relu6,
    Hardswish, Hardsigmoid, Softsign, LogSigmoid,
)  # fmt: skip
ACTIVATIONS: dict[str, type[Activation]] = {rule.name: rule for rule in _TABLE}
