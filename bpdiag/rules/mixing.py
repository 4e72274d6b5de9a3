"""Nonlinearities in which numbers along one dimension meet: softmax, its logarithm, and gates.

Letters: i, j places along ``dim``; a, b the first and the second half of x along it; p = sigmoid.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bpdiag.rules.arguments import floats, whole, wrong
from bpdiag.rules.function import Rule, wide


class Softmax(Rule):
    """y_i = exp z_i / sum_j exp z_j,  g_z_i = y_i (g_y_i - sum_j g_y_j y_j),  along ``dim``.

    Shapes: z and y any.  Keeps y.  No kink; what is added to all z_i changes nothing, so that g_z sums to 0.  Of -inf
    alone, or with a +inf, all is nan, as in torch.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Example:
        >>> y = Softmax.apply(torch.zeros(4))
        >>> y
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
        >>> Softmax.vjp(torch.tensor([4.0, 0.0, 0.0, 0.0]), y)
        (tensor([ 0.7500, -0.2500, -0.2500, -0.2500]),)
    """

    name = "softmax"
    saves: ClassVar[Literal["output", "input"]] = "output"

    def forward(z, dim=-1):
        floats("softmax", z=z)
        return torch.softmax(z, _along("softmax", z, dim))

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The output and the dimension."""
        return output if needs[0] else None, int(inputs[1])

    def vjp(g_y, y, dim=-1, needs=(True,)):
        if not needs[0]:
            return (None,)
        y = wide(y)
        gy = g_y * y
        return (gy - y * gy.sum(dim, keepdim=True),)


class LogSoftmax(Rule):
    """y_i = z_i - log sum_j exp z_j,  g_z_i = g_y_i - exp(y_i) sum_j g_y_j,  along ``dim``.

    Shapes: z and y any.  Keeps y.  No kink; g_z sums to 0.  Stable where the logarithm of ``Softmax`` is -inf: the
    largest z_i is subtracted before the exponential.  Of -inf alone, or with a +inf, all is nan, as in torch.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Example:
        >>> y = LogSoftmax.apply(torch.zeros(4))
        >>> round(y[0].item(), 6)                                # -log 4
        -1.386294
        >>> LogSoftmax.vjp(torch.tensor([4.0, 0.0, 0.0, 0.0]), y)
        (tensor([ 3., -1., -1., -1.]),)
    """

    name = "log_softmax"
    saves: ClassVar[Literal["output", "input"]] = "output"

    def forward(z, dim=-1):
        floats("log_softmax", z=z)
        return torch.log_softmax(z, _along("log_softmax", z, dim))

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The output and the dimension."""
        return output if needs[0] else None, int(inputs[1])

    def vjp(g_y, y, dim=-1, needs=(True,)):
        if not needs[0]:
            return (None,)
        g = wide(g_y)
        return (g - torch.exp(wide(y)) * g.sum(dim, keepdim=True),)


class Glu(Rule):
    """y = a p(b),  g_a = g_y p(b),  g_b = g_y a p(b) (1 - p(b)): the second half is the gate of the first.

    Shapes: x (..., 2 N, ...) with N numbers of each half along ``dim``, y (..., N, ...).  Keeps x.  No kink.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Source:
        Dauphin et al. 2017, eq. 1.

    Example:
        >>> x = torch.tensor([8.0, 0.0])
        >>> Glu.apply(x), Glu.vjp(torch.tensor([1.0]), x)
        (tensor([4.]), (tensor([0.5000, 2.0000]),))
    """

    name = "glu"

    def forward(x, dim=-1):
        _check_halves("glu", x, dim)
        return nn.functional.glu(x, dim)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """x and the dimension."""
        return inputs[0] if needs[0] else None, int(inputs[1])

    def vjp(g_y, x, dim=-1, needs=(True,)):
        if not needs[0]:
            return (None,)
        a, b = wide(x).chunk(2, dim)
        p = torch.sigmoid(b)
        g_a = g_y * p
        return (torch.cat([g_a, g_a * a * (1 - p)], dim),)


class Swiglu(Rule):
    """y = a p(a) b,  g_a = g_y b p(a) (1 + a (1 - p(a))),  g_b = g_y a p(a): silu of the first half times the second.

    Shapes: x (..., 2 N, ...) with N numbers of each half along ``dim``, y (..., N, ...).  Keeps x, where a silu and a
    product keep three times as many numbers as y has.  No kink.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Source:
        Shazeer 2020, eq. 6.

    Example:
        >>> x = torch.tensor([0.0, 8.0])
        >>> Swiglu.apply(x), Swiglu.vjp(torch.tensor([1.0]), x)
        (tensor([0.]), (tensor([4., 0.]),))
    """

    name = "swiglu"

    def forward(x, dim=-1):
        _check_halves("swiglu", x, dim)
        a, b = wide(x).chunk(2, dim)
        return (a * torch.sigmoid(a) * b).to(x.dtype)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """x and the dimension."""
        return inputs[0] if needs[0] else None, int(inputs[1])

    def vjp(g_y, x, dim=-1, needs=(True,)):
        if not needs[0]:
            return (None,)
        a, b = wide(x).chunk(2, dim)
        p = torch.sigmoid(a)
        return (torch.cat([g_y * b * p * (1 + a * (1 - p)), g_y * (a * p)], dim),)


def _along(rule: str, t: Tensor, dim: Any) -> int:
    """A dimension of t; a number alone has one, as in torch."""
    dim, dims = whole(rule, "dim", dim, None), max(t.dim(), 1)
    if not -dims <= dim < dims:
        raise wrong(rule, "dim", dim, f"a dimension of {tuple(t.shape)}")
    return dim


def _check_halves(rule: str, x: Any, dim: Any) -> None:
    floats(rule, x=x)
    if not x.dim() or x.shape[_along(rule, x, dim)] % 2:
        raise wrong(rule, "x", x, f"two halves along dimension {dim}")
