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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bpdiag.config import UsageError, choose

Numbers = dict[str, float]  # the name of a quantity: its value


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


def sigmoid_slope(z: float) -> float:
    """sigmoid(z) sigmoid(-z): a (1 - a) without the loss of digits where a rounds to 1; the same at -z.

    Example:
        >>> sigmoid_slope(0.0), sigmoid_slope(60.0)
        (0.25, 8.75651076269652e-27)
    """
    return sigmoid(z) * sigmoid(-z)


class Squish(NamedTuple):
    """a = forward(z),  da/dz = slope(z)."""

    forward: Callable[[float], float]
    slope: Callable[[float], float]
    formula: str  # of the slope, for layer {l}, from what came out


SQUISHES = {
    "none": Squish(lambda z: z, lambda z: 1.0, "1"),
    "sigmoid": Squish(sigmoid, sigmoid_slope, "a{l} · (1 - a{l})"),
    "tanh": Squish(math.tanh, lambda z: 4 * sigmoid_slope(2 * z), "1 - a{l}²"),
    "relu": Squish(lambda z: max(z, 0.0), lambda z: 1.0 if z > 0 else 0.0, "1 where a{l} > 0, else 0"),
}
LASTS = ("squish", "linear")


def _number(name: str, given: Any) -> float:
    try:
        if not isinstance(given, str):
            return float(given)
    except (TypeError, ValueError, OverflowError):
        pass
    raise UsageError(f"{name}: {given!r:.60} is not a number")


def _numbers(name: str, given: Any) -> tuple[float, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UsageError(f"{name}: {given!r:.60} is not a list of numbers, one a layer, as in [2, 3, 0.5]")
    return tuple(_number(name, x) for x in given)


class Values(NamedTuple):
    """All that is computed of a chain, each part from one before it."""

    forward: Numbers
    factors: Numbers
    backward: Numbers
    decades: Numbers


@dataclass(frozen=True)
class Chain:
    """C = (a_L - y)^2 of a chain of L units; the defaults are the lesson's.

    What a method takes beside its own arguments is another's result, where it is at hand: it is not computed again.

    Args:
        a0: the input.
        w: w_1, ..., w_L, at least one.
        y: what a_L should be.
        squish: the name of what every layer does to z: none, sigmoid, tanh, relu (slope 0 at its kink).
        last: squish, or linear: the last layer gives out z.
        b: b_1, ..., b_L, what else enters each layer: a bias, or what other paths bring.  Empty: nothing.

    w and b are kept as tuples of floats: chains of the same numbers are equal, and none changes under another's hand.

    Raises:
        UsageError: A name is unknown, there is no weight, w and b differ in length, or something is no number.

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
        for name in ("a0", "y"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        for name in ("w", "b"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        if not self.w:
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

    def forward(self) -> Numbers:
        """a0, then z and a of every layer upwards, then C.  inf and nan where a double cannot hold it."""
        a = self.a0
        told = {"a0": a}
        for layer, w in enumerate(self.w, 1):
            z = w * a + (self.b[layer - 1] if self.b else 0.0)
            a = SQUISHES[self.squish_of(layer)].forward(z)
            told |= {f"z{layer}": z, f"a{layer}": a}
        return told | {"C": (a - self.y) * (a - self.y)}

    def factors(self, forward: Numbers | None = None) -> Numbers:
        """How far each thing moves for a small move of the one below it: dC/da_L, then each layer's three.

        da_l/dz_l is the squish's slope; da_l/da_{l-1} = da_l/dz_l w_l;  da_l/dw_l = da_l/dz_l a_{l-1}.
        """
        v, top = forward or self.forward(), self.depth
        told = {f"dC/da{top}": 2 * (v[f"a{top}"] - self.y)}
        for layer in range(top, 0, -1):
            slope = SQUISHES[self.squish_of(layer)].slope(v[f"z{layer}"])
            told |= {
                f"da{layer}/dz{layer}": slope,
                f"da{layer}/da{layer - 1}": slope * self.w[layer - 1],
                f"da{layer}/dw{layer}": slope * v[f"a{layer - 1}"],
            }
        return told

    def path(self, layer: int) -> list[str]:
        """The names of the factors on the way from the cost down to w of ``layer``; their product is dC/dw.

        Raises:
            UsageError: There is no such layer; they count from 1.
        """
        top = self.depth
        if not 1 <= layer <= top:
            raise UsageError(f"layer={layer}: the chain has layers 1 to {top}")
        between = [f"da{k}/da{k - 1}" for k in range(top, layer, -1)]
        return [f"dC/da{top}", *between, f"da{layer}/dw{layer}"]

    def backward(self, factors: Numbers | None = None) -> Numbers:
        """dC/da and dC/dw of every layer in one sweep from the top: dC/da is carried down, each w takes it from there.

        2 L - 1 multiplications of factors, where a product for each weight takes L (L + 1) / 2.
        """
        f, top = factors or self.factors(), self.depth
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

    def decades(self, factors: Numbers | None = None) -> Numbers:
        """log10 |dC/da_l / dC/da_L| for a_L down to a_1: the sum of the logs of the factors between.

        It stands where the product itself leaves the range of a double.  -inf below a factor that is exactly 0.

        Example:
            >>> {name: round(d, 3) for name, d in Chain().decades().items()}
            {'a3': 0.0, 'a2': -0.301, 'a1': 0.176}
        """
        f, sum_of_logs = factors or self.factors(), 0.0
        told = {f"a{self.depth}": sum_of_logs}
        for layer in range(self.depth, 1, -1):
            size = abs(f[f"da{layer}/da{layer - 1}"])
            sum_of_logs += math.log10(size) if size else -math.inf
            told[f"a{layer - 1}"] = sum_of_logs
        return told

    def values(self) -> Values:
        """forward, factors, backward and decades, all from one way up."""
        v = self.forward()
        f = self.factors(v)
        return Values(v, f, self.backward(f), self.decades(f))

    def step(self, lr: float, backward: Numbers | None = None) -> Chain:
        """The chain after one step of gradient descent, w - lr dC/dw; biases stay.

        Example:
            >>> [round(w, 10) for w in Chain().step(0.01).w]
            [1.97, 2.98, 0.38]
        """
        g = backward or self.backward()
        return dataclasses.replace(self, w=tuple(w - lr * g[f"dC/dw{i}"] for i, w in enumerate(self.w, 1)))

    def foretold(self, lr: float, backward: Numbers | None = None) -> float:
        """-lr · sum of (dC/dw)^2: how far a step would move C if its slopes stayed what they are.

        Example:
            >>> Chain().foretold(0.01)
            -1.57
        """
        g = backward or self.backward()
        return -lr * sum(g[f"dC/dw{layer}"] * g[f"dC/dw{layer}"] for layer in range(1, self.depth + 1))

    def remarks(self, values: Values | None = None) -> list[str]:
        """In words: what left the range of a double, and what lets nothing pass; empty for a quiet chain.

        Example:
            >>> Chain().remarks(), Chain(a0=0.0, squish="sigmoid").remarks()
            ([], ['a0 is 0: w1 gets nothing.'])
            >>> Chain(w=[1e200, 1e200]).remarks()
            ['Overflow: z2 is beyond the largest double, 1.8e308; what follows from it may be inf or nan.']
        """
        v, f, swept, decades = values or self.values()
        told = []
        large = next((name for name, x in (v | f | swept).items() if not math.isfinite(x)), None)
        if large:
            told.append(
                f"Overflow: {large} is beyond the largest double, 1.8e308; what follows from it may be inf or nan."
            )
        if f[f"dC/da{self.depth}"] == 0:
            return [*told, f"a{self.depth} is what it should be: dC/da{self.depth} = 0, and every weight stays."]
        deaf = 0  # the highest weight that a cut keeps from the cost
        for layer in range(self.depth, 0, -1):
            slope, passed = f"da{layer}/dz{layer}", f"da{layer}/da{layer - 1}"
            if f[slope] == 0 or (f[passed] == 0 and layer > 1):
                cut, deaf = (slope, layer) if f[slope] == 0 else (passed, layer - 1)
                below = " or any weight below it" if deaf > 1 else ""
                told.append(f"Cut: {cut} is exactly 0: nothing of the cost reaches w{deaf}{below}.")
                break
        idle = [k for k in range(deaf + 1, self.depth + 1) if f[f"da{k}/dw{k}"] == 0 == swept[f"dC/dw{k}"]]
        if idle:
            low, *others = idle
            cause = f"a{low - 1}" if v[f"a{low - 1}"] == 0 else f"da{low}/dw{low}"  # which underflows
            likewise = f"; likewise {len(others)} of the weights above it" if others else ""
            told.append(f"{cause} is 0: w{low} gets nothing{likewise}.")
        lost = next((a for a, d in decades.items() if swept[f"dC/d{a}"] == 0 and d > -math.inf), None)
        if lost:
            told.append(
                f"Underflow: dC/d{lost} is 0 though no factor is: the product is below the smallest double, 4.9e-324. "
                f"The sum of the logs still knows it: 10^{decades[lost]:.2f} of dC/da{self.depth}."
            )
        return told


class Step(NamedTuple):
    """A chain on its way down: its C, and how far its slopes foretell that the next step moves it."""

    chain: Chain
    cost: float
    foretold: float


def descend(chain: Chain, lr: float, steps: int) -> Iterator[Step]:
    """The chain, and what each of ``steps`` steps of gradient descent makes of it; one sweep each.

    Example:
        >>> [(round(cost, 8), round(foretold, 4)) for _, cost, foretold in descend(Chain(), 0.01, 2)]
        [(1.0, -1.57), (0.05328157, -0.0774), (0.00407416, -0.0058)]
    """
    for _ in range(steps + 1):
        v = chain.forward()
        g = chain.backward(chain.factors(v))
        yield Step(chain, v["C"], chain.foretold(lr, g))
        chain = chain.step(lr, g)
