"""Rules as kernels that write where they are told: one pass over memory, nothing allocated.

A rule's ``forward`` and ``vjp`` make a new tensor for each operation; a stack calls each thousands of times on the same
memory.  Torch has most of them as one operation with an ``out``; the rule itself serves where it has none, and is the
oracle of those (tests/test_backprop.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bpdiag.rules import ACTIVATIONS, Activation
from bpdiag.rules.activation import SELU_ALPHA, SELU_SCALE

aten = torch.ops.aten


class Kernel(NamedTuple):
    """a = phi(z) and g_z = phi'(z) g_a, each into ``out``; ``out`` of the first may be z where the rule saves a.

    Of an infinite z what torch gives: nan for gelu of -inf, where the rule has the limit.
    """

    forward: Callable[[Tensor, Tensor], object]  # (z, out)
    vjp: Callable[[Tensor, Tensor, Tensor], object]  # (g_a, what the rule saves, out), out may be g_a
    keeps_input: bool

    def vjp_of_ones(self, kept: Tensor, out: Tensor) -> Tensor:
        """phi'(z), into ``out``."""
        self.vjp(out.fill_(1), kept, out)
        return out


# rule: (forward, vjp); the rules that autograd's own kernels compute to the bit or within rounding
_FAST: dict[str, tuple[Callable[[Tensor, Tensor], object], Callable[[Tensor, Tensor, Tensor], object]]] = {
    "identity": (lambda z, out: out.copy_(z), lambda g, a, out: out.copy_(g)),
    "sigmoid": (
        lambda z, out: torch.sigmoid(z, out=out),
        lambda g, a, out: aten.sigmoid_backward.grad_input(g, a, grad_input=out),
    ),
    "tanh": (
        lambda z, out: torch.tanh(z, out=out),
        lambda g, a, out: aten.tanh_backward.grad_input(g, a, grad_input=out),
    ),
    "relu": (
        lambda z, out: torch.clamp_min(z, 0, out=out),
        lambda g, a, out: aten.threshold_backward.grad_input(g, a, 0, grad_input=out),
    ),
    "leaky_relu": (
        lambda z, out: aten.leaky_relu.out(z, 0.01, out=out),
        lambda g, a, out: aten.leaky_relu_backward.grad_input(g, a, 0.01, True, grad_input=out),
    ),
    "elu": (
        lambda z, out: aten.elu.out(z, 1.0, 1.0, 1.0, out=out),
        lambda g, z, out: aten.elu_backward.grad_input(g, 1.0, 1.0, 1.0, False, z, grad_input=out),
    ),
    "selu": (
        lambda z, out: aten.elu.out(z, SELU_ALPHA, SELU_SCALE, 1.0, out=out),
        lambda g, z, out: aten.elu_backward.grad_input(g, SELU_ALPHA, SELU_SCALE, 1.0, False, z, grad_input=out),
    ),
    "gelu": (
        lambda z, out: aten.gelu.out(z, approximate="none", out=out),
        lambda g, z, out: aten.gelu_backward.grad_input(g, z, approximate="none", grad_input=out),
    ),
    "gelu_tanh": (
        lambda z, out: aten.gelu.out(z, approximate="tanh", out=out),
        lambda g, z, out: aten.gelu_backward.grad_input(g, z, approximate="tanh", grad_input=out),
    ),
    "silu": (
        lambda z, out: aten.silu.out(z, out=out),
        lambda g, z, out: aten.silu_backward.grad_input(g, z, grad_input=out),
    ),
    "softplus": (
        lambda z, out: aten.softplus.out(z, 1.0, 20.0, out=out),
        lambda g, z, out: aten.softplus_backward.grad_input(g, z, 1.0, 20.0, grad_input=out),
    ),
}


def kernel(rule: type[Activation]) -> Kernel:
    """The kernel of a rule; a rule of one's own, unknown here, is called as it stands.

    Example:
        >>> z, out = torch.tensor([-1.0, 2.0]), torch.empty(2)
        >>> relu = kernel(ACTIVATIONS["relu"])
        >>> _ = relu.forward(z, out)
        >>> out
        tensor([0., 2.])
        >>> _ = relu.vjp(torch.ones(2), out, out)
        >>> out
        tensor([0., 1.])
    """
    fast = _FAST.get(rule.name) if ACTIVATIONS.get(rule.name) is rule else None
    forward, vjp = fast or (
        lambda z, out: out.copy_(rule.forward(z)),
        lambda g, kept, out: out.copy_(rule.vjp(g, kept)),
    )
    return Kernel(forward, vjp, rule.saves == "input")
