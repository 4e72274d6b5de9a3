"""The chain rule in scalars: every factor named, and one sweep from the cost down that shares them.

    z_l = w_l a_{l-1} + b_l,   a_l = squish(z_l),   l = 1..L,   C = (a_L - y)^2
    dC/dw_l = dC/da_L · da_L/da_{L-1} · ... · da_{l+1}/da_l · da_l/dw_l

One unit a layer, so that a layer's factor is a number and not a matrix.  All that is computed is a dictionary from the
name of a quantity, as it is written on paper, to its value.

Needs the standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bpdiag.config import UsageError, choose


def sigmoid(z: float) -> float:
    """1 / (1 + e^-z), without overflow on either side.

    Example:
        >>> sigmoid(0.0), sigmoid(-1000.0)
        (0.5, 0.0)
    """
    if z >= 0:
        return 1 / (1 + math.exp(-z))
    e = math.exp(z)
    return e / (1 + e)


class Squish(NamedTuple):
    """a = forward(z),  da/dz = slope(a): all four slopes can be told from what came out."""

    forward: Callable[[float], float]
    slope: Callable[[float], float]
    formula: str  # of the slope, for layer {l}


SQUISHES = {
    "none": Squish(lambda z: z, lambda a: 1.0, "1"),
    "sigmoid": Squish(sigmoid, lambda a: a * (1 - a), "a{l} · (1 - a{l})"),
    "tanh": Squish(math.tanh, lambda a: 1 - a * a, "1 - a{l}²"),
    "relu": Squish(lambda z: max(z, 0.0), lambda a: 1.0 if a > 0 else 0.0, "1 where a{l} > 0, else 0"),
}
LASTS = ("squish", "linear")


@dataclass(frozen=True)
class Chain:
    """C = (a_L - y)^2 of a chain of L units; the defaults are the lesson's.

    Args:
        a0: the input.
        w: w_1, ..., w_L, at least one.
        y: what a_L should be.
        squish: the name of what every layer does to z: none, sigmoid, tanh, relu (slope 0 at its kink).
        last: squish, or linear: the last layer gives out z.
        b: b_1, ..., b_L, what else enters each layer: a bias, or what other paths bring.  Empty: nothing.

    Raises:
        UsageError: A name is unknown, there is no weight, or w and b differ in length.

    Example:
        >>> Chain().forward()
        {'a0': 1.0, 'z1': 2.0, 'a1': 2.0, 'z2': 6.0, 'a2': 6.0, 'z3': 3.0, 'a3': 3.0, 'C': 1.0}
        >>> Chain().path(1)
        ['dC/da3', 'da3/da2', 'da2/da1', 'da1/dw1']
        >>> [Chain().factors()[name] for name in Chain().path(1)]
        [2.0, 0.5, 3.0, 1.0]
        >>> Chain().backward()
        {'dC/da3': 2.0, 'dC/dw3': 12.0, 'dC/da2': 1.0, 'dC/dw2': 2.0, 'dC/da1': 3.0, 'dC/dw1': 3.0}
    """

    a0: float = 1.0
    w: Sequence[float] = (2.0, 3.0, 0.5)
    y: float = 2.0
    squish: str = "none"
    last: str = "squish"
    b: Sequence[float] = ()

    def __post_init__(self) -> None:
        choose("squish", self.squish, SQUISHES)
        choose("last", self.last, LASTS)
        if not len(self.w):
            raise UsageError("w: no weight; a chain has one a layer, as in w=2,3,0.5")
        if len(self.b) not in (0, len(self.w)):
            raise UsageError(f"b: {len(self.b)} numbers for {len(self.w)} layers; give one a layer, or none")

    @property
    def depth(self) -> int:
        """L, the number of layers."""
        return len(self.w)

    def squish_of(self, layer: int) -> str:
        """What layer number ``layer`` (from 1) does to its z."""
        return "none" if layer == self.depth and self.last == "linear" else self.squish

    def forward(self) -> dict[str, float]:
        """a0, then z and a of every layer upwards, then C.  inf and nan where a double cannot hold it."""
        a = self.a0
        told = {"a0": a}
        for layer, w in enumerate(self.w, 1):
            z = w * a + (self.b[layer - 1] if self.b else 0.0)
            a = SQUISHES[self.squish_of(layer)].forward(z)
            told |= {f"z{layer}": z, f"a{layer}": a}
        return told | {"C": (a - self.y) * (a - self.y)}

    def factors(self) -> dict[str, float]:
        """How far each thing moves for a small move of the one below it: dC/da_L, then each layer's three.

        da_l/dz_l is the squish's slope; da_l/da_{l-1} = da_l/dz_l w_l;  da_l/dw_l = da_l/dz_l a_{l-1}.
        """
        v, top = self.forward(), self.depth
        told = {f"dC/da{top}": 2 * (v[f"a{top}"] - self.y)}
        for layer in range(top, 0, -1):
            slope = SQUISHES[self.squish_of(layer)].slope(v[f"a{layer}"])
            told |= {
                f"da{layer}/dz{layer}": slope,
                f"da{layer}/da{layer - 1}": slope * self.w[layer - 1],
                f"da{layer}/dw{layer}": slope * v[f"a{layer - 1}"],
            }
        return told

    def path(self, layer: int) -> list[str]:
        """The names of the factors on the way from the cost down to w of ``layer``; their product is dC/dw."""
        top = self.depth
        between = [f"da{k}/da{k - 1}" for k in range(top, layer, -1)]
        return [f"dC/da{top}", *between, f"da{layer}/dw{layer}"]

    def backward(self) -> dict[str, float]:
        """dC/da and dC/dw of every layer in one sweep from the top: dC/da is carried down, each w takes it from there.

        2 L - 1 multiplications of factors, where a product for each weight takes L (L + 1) / 2.
        """
        f, top = self.factors(), self.depth
        g = f[f"dC/da{top}"]
        told = {f"dC/da{top}": g}
        for layer in range(top, 0, -1):
            told[f"dC/dw{layer}"] = g * f[f"da{layer}/dw{layer}"]
            if layer > 1:
                g = g * f[f"da{layer}/da{layer - 1}"]
                told[f"dC/da{layer - 1}"] = g
        return told

    def multiplications(self) -> tuple[int, int]:
        """(2 L - 1, L (L + 1) / 2): of factors, in one sweep; and for every weight's product by itself.

        Example:
            >>> Chain().multiplications(), Chain(w=[1.0] * 100).multiplications()
            ((5, 6), (199, 5050))
        """
        return 2 * self.depth - 1, self.depth * (self.depth + 1) // 2

    def decades(self) -> dict[str, float]:
        """log10 |dC/da_l / dC/da_L| for a_L down to a_1: the sum of the logs of the factors between.

        It stands where the product itself leaves the range of a double.  -inf below a factor that is exactly 0.

        Example:
            >>> {name: round(d, 3) for name, d in Chain().decades().items()}
            {'a3': 0.0, 'a2': -0.301, 'a1': 0.176}
        """
        f, sum_of_logs = self.factors(), 0.0
        told = {f"a{self.depth}": sum_of_logs}
        for layer in range(self.depth, 1, -1):
            size = abs(f[f"da{layer}/da{layer - 1}"])
            sum_of_logs += math.log10(size) if size else -math.inf
            told[f"a{layer - 1}"] = sum_of_logs
        return told

    def step(self, lr: float) -> Chain:
        """The chain after one step of gradient descent, w - lr dC/dw; biases stay.

        Example:
            >>> [round(w, 10) for w in Chain().step(0.01).w]
            [1.97, 2.98, 0.38]
        """
        g = self.backward()
        return dataclasses.replace(self, w=tuple(w - lr * g[f"dC/dw{i}"] for i, w in enumerate(self.w, 1)))

    def foretold(self, lr: float) -> float:
        """-lr · sum of (dC/dw)^2: how far a step would move C if its slopes stayed what they are.

        Example:
            >>> Chain().foretold(0.01)
            -1.57
        """
        g = self.backward()
        return -lr * sum(g[f"dC/dw{layer}"] * g[f"dC/dw{layer}"] for layer in range(1, self.depth + 1))

    def remarks(self) -> list[str]:
        """In words: what left the range of a double, and what lets nothing pass; empty for a quiet chain.

        Example:
            >>> Chain().remarks(), Chain(w=[1e200, 1e200]).remarks()
            ([], ['Overflow: z2 is beyond the largest double, 1.8e308; what follows from it is inf or nan.'])
        """
        f, swept, decades = self.factors(), self.backward(), self.decades()
        told = []
        large = next((name for name, x in (self.forward() | f | swept).items() if not math.isfinite(x)), None)
        if large:
            told.append(f"Overflow: {large} is beyond the largest double, 1.8e308; what follows from it is inf or nan.")
        if f[f"dC/da{self.depth}"] == 0:
            return [*told, f"a{self.depth} is what it should be: dC/da{self.depth} = 0, and every weight stays."]
        for layer in range(self.depth, 0, -1):
            slope, passed = f"da{layer}/dz{layer}", f"da{layer}/da{layer - 1}"
            if f[slope] == 0 or (f[passed] == 0 and layer > 1):
                cut, deaf = (slope, layer) if f[slope] == 0 else (passed, layer - 1)
                below = " or any weight below it" if deaf > 1 else ""
                told.append(f"Cut: {cut} is exactly 0: nothing of the cost reaches w{deaf}{below}.")
                break
        lost = next((a for a, d in decades.items() if swept[f"dC/d{a}"] == 0 and d > -math.inf), None)
        if lost:
            told.append(
                f"Underflow: dC/d{lost} is 0 though no factor is: the product is below the smallest double, 4.9e-324. "
                f"The sum of the logs still knows it: 10^{decades[lost]:.2f} of dC/da{self.depth}."
            )
        return told


def descend(chain: Chain, lr: float, steps: int) -> list[Chain]:
    """The chain, and what each of ``steps`` steps of gradient descent makes of it.

    Example:
        >>> [round(c.forward()["C"], 8) for c in descend(Chain(), 0.01, 2)]
        [1.0, 0.05328157, 0.00407416]
    """
    chains = [chain]
    for _ in range(steps):
        chains.append(chains[-1].step(lr))
    return chains
