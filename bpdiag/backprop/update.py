"""How a stack's gradients become steps: torch's optimizers, of K members with rates of their own.

    SGD     G += decay W;  V = mu V + G;  W -= rate V;  Nesterov: W -= rate (G + mu V)
    Adam    G += decay W;  m += (1 - b1) (G - m);  v = b2 v + (1 - b2) G^2;
            W -= rate / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
    AdamW   W -= rate decay W first, and no decay in G

The product G = g a^T of plain SGD is accumulated into V by the matrix product itself (beta = mu): no pass of its own.
A rate is a number for each member, multiplied in the pass that subtracts; it may change from step to step.

Source:
    torch.optim.SGD, Adam, AdamW; Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bpdiag.config import UsageError

KNOWN = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class Optimizer:
    """What the members of a stack share; rate, decay and eps are lists of one number for each."""

    rate: Sequence[float]
    name: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    decay: Sequence[float] = ()
    eps: Sequence[float] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    clip: Sequence[float] = ()  # the largest norm of a member's whole gradient; inf: as it is

    def __post_init__(self) -> None:
        if self.name not in KNOWN:
            raise UsageError(f"optimizer {self.name}: unknown; known: {', '.join(KNOWN)}")
        for name in ("rate", "decay", "eps", "clip"):
            numbers = getattr(self, name)
            if numbers and len(numbers) != len(self.rate):
                raise UsageError(f"{name}: {len(numbers)} numbers for {len(self.rate)} members")
            if any(not 0 <= x <= (math.inf if name == "clip" else 1e30) for x in numbers):
                raise UsageError(f"{name}: {list(numbers)}: each must be 0 or more, and finite")

    @property
    def accumulates(self) -> bool:
        """Whether the matrix product may accumulate into the velocity."""
        return self.name == "sgd" and not self.nesterov and not any(self.decay) and not self.clip


@dataclass
class Parameter:
    """A parameter of some members, (k, N, M), and what its optimizer remembers of it."""

    W: Tensor
    states: list[Tensor]
    members: slice = field(default_factory=lambda: slice(None))

    @classmethod
    def begin(cls, W: Tensor, optimizer: Optimizer) -> Parameter:
        """Of all members, at rest."""
        return cls(W, [torch.zeros_like(W) for _ in range(1 if optimizer.name == "sgd" else 2)])

    def of(self, members: slice) -> Parameter:
        """The same memory, of some of them."""
        return Parameter(self.W[members], [state[members] for state in self.states], members)


class Named(NamedTuple):
    """A parameter, its gradient, and how what is measured of it is called; unnamed, it is not measured."""

    p: Parameter
    G: Tensor
    name: str
    layer: int


class Update:
    """The optimizer at work."""

    def __init__(self, optimizer: Optimizer, like: Tensor) -> None:
        self.optimizer, self.like, self.steps = optimizer, like, 0
        self.set_rate(optimizer.rate)
        self._decay = self._column(optimizer.decay) if any(optimizer.decay) else None
        self._eps = self._column(optimizer.eps or [1e-8] * len(optimizer.rate))
        self.most = self._column(optimizer.clip)
        self._alike = all(len(set(x)) < 2 for x in (optimizer.decay, optimizer.eps))

    def set_rate(self, rate: Sequence[float]) -> None:
        """From the next step on; one number for each member."""
        if len(rate) != len(self.optimizer.rate):
            raise UsageError(f"rate: {len(rate)} numbers for {len(self.optimizer.rate)} members")
        self.host_rate = list(rate)
        self.rate = self._column(rate)

    def begin(self) -> None:
        """A step."""
        self.steps += 1

    def descend(self, p: Parameter, rate: Tensor) -> None:
        """W -= rate V;  where V is in a unit of its own, the rate is divided by it."""
        p.W.addcmul_(p.states[0], rate, value=-1)

    def accumulate(self, p: Parameter, G: Tensor, rate: Tensor) -> None:
        """V = mu V + G and W -= rate V, of a gradient that is no product: a bias's."""
        torch.add(G, p.states[0], alpha=self.optimizer.momentum, out=p.states[0])
        self.descend(p, rate)

    def apply(self, p: Parameter, G: Tensor, spare: Tensor) -> None:
        """A step by the gradient G, which is overwritten; ``spare``: room as large."""
        if self.optimizer.name == "sgd":
            self._sgd(p, G)
        else:
            self._adam(p, G, spare)

    def _sgd(self, p: Parameter, G: Tensor) -> None:
        (V,), mu, rate = p.states, self.optimizer.momentum, self.rate[p.members]
        if self._decay is not None:
            G.addcmul_(p.W, self._decay[p.members])
        torch.add(G, V, alpha=mu, out=V)
        p.W.addcmul_(G.add_(V, alpha=mu) if self.optimizer.nesterov else V, rate, value=-1)

    def _adam(self, p: Parameter, G: Tensor, spare: Tensor) -> None:
        (m, v), (b1, b2), rate = p.states, self.optimizer.betas, self.rate[p.members]
        if self._is_one_setting(p.members):
            self._fused(p, G)
            return
        if self._decay is not None and self.optimizer.name == "adamw":
            p.W.addcmul_(p.W, self._decay[p.members] * rate, value=-1)
        elif self._decay is not None:
            G.addcmul_(p.W, self._decay[p.members])
        m.lerp_(G, 1 - b1)
        v.mul_(b2).addcmul_(G, G, value=1 - b2)
        spare = spare if spare.shape == G.shape else torch.empty_like(G)  # a bias is small
        torch.sqrt(v, out=spare).mul_((1 - b2**self.steps) ** -0.5).add_(self._eps[p.members])
        spare.mul_((1 - b1**self.steps) / rate)  # of rate 0 infinite: nothing moves
        p.W.addcdiv_(m, spare, value=-1)

    def _is_one_setting(self, members: slice) -> bool:
        """Whether torch's kernel, which knows one setting, can do it in one pass."""
        rates = self.host_rate[members]
        return self._alike and all(rate == rates[0] for rate in rates)

    def _fused(self, p: Parameter, G: Tensor) -> None:
        (m, v), (b1, b2), o = p.states, self.optimizer.betas, self.optimizer
        step = torch.full((), float(self.steps), dtype=torch.float32, device=G.device)
        kernel = torch._fused_adamw_ if o.name == "adamw" else torch._fused_adam_
        kernel(
            [p.W], [G], [m], [v], [], [step], amsgrad=False, lr=self.host_rate[p.members][0], beta1=b1, beta2=b2,
            weight_decay=o.decay[0] if o.decay else 0.0, eps=o.eps[0] if o.eps else 1e-8, maximize=False,
        )  # fmt: skip

    def _column(self, numbers: Sequence[float]) -> Tensor:
        """(K, 1, 1)."""
        return torch.tensor(list(numbers), dtype=self.like.dtype, device=self.like.device).view(-1, 1, 1)
