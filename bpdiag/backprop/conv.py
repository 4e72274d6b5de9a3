"""Convolutions of a stack, and the max pool above each: the rules ``conv`` and ``max_pool`` on memory that is there.

    forward   z = W * x + b,   p_j = max_q a_jq,   q the places of the pool's window j
    backward  g_a_jq = g_p_j where a_jq is the first largest of its window, else 0;   g_x = g_z * W transposed

Letters: K members, C channels, B samples, J windows of the pool, Q places in each.  A stack keeps its features first,
and of a picture these are the channels: z is (K, C, Q B J), every place of every sample a column.  Bias, batch norm,
activation and update are then those of a linear layer, and the pool is the largest of Q long rows.

The first convolution is a matrix product, too: the patches of a batch are laid out once, and all members that read it
share them.  Each above is torch's, member by member: as one convolution of K groups it takes half as long again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

from bpdiag.backprop.meter import Meter

aten = torch.ops.aten


@dataclass(frozen=True)
class Picture:
    """What a convolution reads and gives, and the pool above it."""

    read: tuple[int, int, int]  # channels, height, width
    channels: int
    kernel: tuple[int, int]
    padding: tuple[int, int]
    pool: int

    @property
    def places(self) -> tuple[int, int]:
        """Height and width of z."""
        high, wide = (n + 2 * p - k + 1 for n, p, k in zip(self.read[1:], self.padding, self.kernel, strict=True))
        return high, wide

    @property
    def windows(self) -> tuple[int, int]:
        """Height and width of what the pool gives."""
        high, wide = self.places
        return high // self.pool, wide // self.pool


def pictures_of(net: nn.Module) -> list[Picture]:
    """Of each convolution of a net, in order.

    Example:
        >>> from bpdiag.config import ModelConfig
        >>> from bpdiag.model import build
        >>> [one.windows for one in pictures_of(build(ModelConfig(name="cnn"), (1, 28, 28), 10, seed=0))]
        [(14, 14), (5, 5)]
    """
    found: list[Picture] = []
    read: tuple[int, ...] = ()
    conv: Any = None
    for module in net.children():
        if isinstance(module, nn.Unflatten):
            read = tuple(map(int, module.unflattened_size))
        elif isinstance(module, nn.Conv2d):
            conv = module
        elif isinstance(module, nn.MaxPool2d) and conv is not None:
            pool = _pair(module.kernel_size)[0]
            found.append(Picture((read[0], read[1], read[2]), conv.out_channels, conv.kernel_size, conv.padding, pool))
            read = conv.out_channels, *found[-1].windows
    return found


def by_window(x: Tensor, pool: int) -> Tensor:
    """(..., H, W) as (..., pool, pool, H / pool, W / pool): a view in which place q of every window is a row.

    Example:
        >>> by_window(torch.arange(16).view(4, 4), 2)[0, 1]
        tensor([[ 1,  3],
                [ 9, 11]])
    """
    *rest, high, wide = x.shape
    return x.view(*rest, high // pool, pool, wide // pool, pool).movedim((-3, -1), (-4, -3))


def patches(x: Tensor, at: Picture, out: Tensor) -> Tensor:
    """What each place of z reads, (c k k, Q B J), of a batch (B, N_0)."""
    (high, wide), (p, q) = at.kernel, at.padding
    x = functional.pad(x.view(len(x), *at.read), (q, q, p, p))
    read = x.unfold(2, high, 1).unfold(3, wide, 1).permute(1, 4, 5, 0, 2, 3)
    return _copied(by_window(read, at.pool).movedim(3, 5), out)


def _copied(x: Tensor, out: Tensor) -> Tensor:
    out.view(x.shape).copy_(x)
    return out


Room = Callable[[object, int, int, int], Tensor]  # of a name (n, rows, columns), with room for so many numbers


class Convolution:
    """One of a chunk of n members: every view that a step needs.

    Args:
        at: its picture.
        W: (n, C, c k k).
        z: (n, C, Q B J).
        a: likewise.
        batch: B.
        below: what it reads, (n, B, c H W); None: patches.
        flat: whether a linear layer reads it, (n, C J, B), or a convolution, (n, B, C J).
        number: of the layer.
        room: where memory comes from.
    """

    def __init__(
        self, at: Picture, W: Tensor, z: Tensor, a: Tensor, batch: int, below: Tensor | None, flat: bool, number: int,
        room: Room,
    ) -> None:  # fmt: skip
        n, J, Q = len(W), math.prod(at.windows), at.pool**2
        C, self.at, self.number, self.z, self.flat = at.channels, at, number, z, flat
        self.seen = n, C * Q, batch, J  # a shape of z in which samples are a dimension of their own, as in a Meter
        self.pooled = room(("pooled", number), C, batch * J, C * batch * J)
        self.g_pooled = room(("g pooled", number), C, batch * J, C * batch * J)
        self._beside = room(("pool's spare", number), C, batch * J, C * batch * J)
        self._split = n, C, batch, J
        self._a = a.view(n, C, Q, batch * J)
        self.side = (C * J, batch) if flat else (batch, C * J)  # of what the next layer reads
        self.out = room(("out", number), *self.side, C * batch * J)
        self._out = self.by_channel(self.out)
        self._nearly = -torch.finfo(a.dtype).tiny
        if below is not None:
            self._x = below.view(n, batch, *at.read)
            self._W = W.view(n, C, at.read[0], *at.kernel)
            self._g = room(("map", number), batch, C * Q * J, batch * C * Q * J).view(n, batch, C, *at.places)
            self._turned = room(("turned", number), C, batch * Q * J, C * batch * Q * J)[0].view(C, batch, *at.places)
            self._by_window = by_window(self._turned, at.pool).permute(2, 3, 0, 1, 4, 5)

    def by_channel(self, x: Tensor) -> Tensor:
        """What the next layer reads, or its cotangent, as (n, C, B, J)."""
        n, C, B, J = self._split
        return x.view(n, C, J, B).transpose(2, 3) if self.flat else x.view(n, B, C, J).transpose(1, 2)

    def forward(self) -> None:
        """z = W * x of every member."""
        for k, z in enumerate(self.z):
            y = torch.convolution(self._x[k], self._W[k], None, [1, 1], self.at.padding, [1, 1], False, [0, 0], 1)
            self._turned.copy_(y.transpose(0, 1))  # two copies along memory take a third of one across it
            _copied(self._by_window.movedim(2, 0), z)

    def pool(self) -> None:
        """The largest of each window, and as the next layer reads it."""
        torch.amax(self._a, 2, out=self.pooled)
        self._out.copy_(self.pooled.view(self._split))

    def arrive(self, g: Tensor) -> None:
        """g_p, as it came from the layer above."""
        self.g_pooled.view(self._split).copy_(self.by_channel(g))

    def measure(self, meter: Meter, what: str, s: slice) -> None:
        """|p|, or |g_p| as it arrived."""
        x = (self.pooled if what == "p" else self.g_pooled).view(self._split)
        meter.size(what, self.number, s, x, self._beside.view(self._split))

    def unpool(self, out: Tensor) -> None:
        """g_a from the g_p that arrived, which is used up: what one place has taken is 0 for those after it."""
        for a, g in zip(self._a.unbind(2), out.view_as(self._a).unbind(2), strict=True):
            torch.sub(a, self.pooled, out=self._beside)
            aten.threshold_backward.grad_input(self.g_pooled, self._beside, self._nearly, grad_input=g)
            self.g_pooled.sub_(g)

    def onward(self, g: Tensor, out: Tensor) -> None:
        """g_x, (n, B, c H W), from g_z."""
        C, B, *_ = self._turned.shape
        corners = [corner for row in self._by_window for corner in row]
        for k in range(len(g)):
            for corner, g_q in zip(corners, g[k].view(C, len(corners), B, *self.at.windows).unbind(1), strict=True):
                corner.copy_(g_q)
            self._g[k].copy_(self._turned.transpose(0, 1))
            _copied(self._vjp(k, x=True), out[k])

    def gradient(self, out: Tensor, mu: float | None) -> None:
        """V = mu V + g_W; without mu G = g_W; of the g_z that ``onward`` was given."""
        for k, V in enumerate(out):
            g_W = self._vjp(k, x=False).view_as(V)
            if mu is None:
                V.copy_(g_W)
            else:
                torch.add(g_W, V, alpha=mu, out=V)

    def _vjp(self, k: int, x: bool) -> Tensor:
        """Of member k: g_x, or g_W."""
        walk = [1, 1], self.at.padding, [1, 1], False, [0, 0], 1
        asked = [x, not x, False]
        told = aten.convolution_backward(self._g[k], self._x[k], self._W[k], None, *walk, asked)
        return told[0 if x else 1]
