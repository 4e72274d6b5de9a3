"""Weights around an update: their size before it, the gradient the optimizer meets, what the update adds.

Squares of float32 are summed in float64, which costs four times as much as in float32.  A weight is large and changes
little, so where the last sample found its numbers far from the ends of float32, the sums of a row of it are float32's.
The host, who reads the result anyway, sees whether that was right; where not, it is measured again in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bpdiag import statistics
from bpdiag.hooks.call import Call
from bpdiag.hooks.gains import Gap
from bpdiag.hooks.reading import kept
from bpdiag.hooks.scale import ScalerClock

FAR = 1e-12, 1e12  # from the ends of float32: rms of what may be squared in it until the next sample
RIGHT = 1e-15, 1e18  # rms for which that was right; what is under 1e-19 squares to 0, and adds nothing to such a one
KINDS = ("W", "dW", "g_W", "g_W_raw")


class Weights:
    """One copy of each weight, from before the update to the end of the step; numbers of everything else."""

    def __init__(self, clock: ScalerClock | None) -> None:
        self._clock = clock
        self._narrow: set[tuple[str, nn.Parameter]] = set()  # kinds of numbers that are far from the ends of float32
        self._copies: dict[nn.Parameter, Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """What this step measured; the memory of its copies is there for the next, until ``release``."""
        self._room, self._copies = self._copies, {}
        self._sizes: dict[nn.Parameter, Tensor] = {}  # norms of the copies
        self._left: dict[nn.Parameter, tuple[Tensor, int]] = {}  # the gradient as the backward left it, its version
        self._raw: dict[nn.Parameter, Tensor] = {}  # its norm then
        self._gradients: dict[nn.Parameter, Tensor] = {}  # and as the optimizer meets it
        self._stale: dict[nn.Parameter, Tensor | float] = {}  # what .grad held before
        self._met: dict[nn.Parameter, tuple[Tensor, int]] = {}  # that gradient, and its version

    def release(self) -> None:
        """Give the memory back: the next step is not sampled."""
        self._room = {}

    def met_by_backward(self, p: nn.Parameter, g: Tensor) -> None:
        """A backward is about to add to a weight's gradient: the first of a step should find none."""
        if p not in self._stale:
            self._stale[p] = 0.0 if p.grad is None else statistics.norm(p.grad)

    def left_by_backward(self, p: nn.Parameter) -> None:
        """A backward has added to a weight's gradient; not what another's loss adds when it has been used."""
        if p.grad is not None and p not in self._met:
            self._left[p] = p.grad, p.grad._version
            self._raw[p] = self._norm("g_W_raw", p, p.grad)

    def copy(self, weights: Iterable[nn.Parameter], with_gradients: bool) -> None:
        """What an optimizer is about to change: those not yet copied."""
        for p in weights:
            if p not in self._copies:
                self._copies[p] = copy = _copied(p.detach(), self._room.pop(p, None))
                self._sizes[p] = self._norm("W", p, copy)  # at once, as all here: it is still in the cache
                if with_gradients:
                    self._take_gradient(p)

    def _take_gradient(self, p: nn.Parameter) -> None:
        """Its norm as the optimizer meets it: that which the backward left, if nobody has changed it since."""
        if p.grad is None:
            return
        self._met[p] = p.grad, p.grad._version
        left, version = self._left.get(p, (None, 0))
        if left is p.grad and version == p.grad._version:
            self._gradients[p] = self._raw[p]
            return
        self._gradients[p] = self._norm("g_W", p, p.grad)
        scale = self._clock.scale() if self._clock else None
        if scale is not None and p in self._raw:
            self._raw[p] = self._raw[p] / scale

    def _norm(self, kind: str, p: nn.Parameter, x: Tensor) -> Tensor:
        """As a number, or in parts."""
        plain = type(x) is Tensor and x.dtype == torch.float32 and x.dim() > 1 and x.is_contiguous()
        if plain and (kind, p) in self._narrow:
            return kept(torch.linalg.vector_norm(x.detach().view(x.shape[0], -1), dim=1))
        return statistics.norm(x)

    def drawn(self, call: Call) -> list[tuple[str, Tensor]]:
        """What a histogram is made of; before ``finish``."""
        weight = call.weight
        if weight is None:
            return []
        pairs = [("W", self._copies.get(weight)), ("g_W", weight.grad if weight in self._gradients else None)]
        return [(tensor, x) for tensor, x in pairs if x is not None]

    def finish(self, calls: Sequence[Call], no_update: str) -> list[Gap]:
        """The norms into the values of the calls whose weights they are; what is missing, and why."""
        told: dict[nn.Parameter, dict[str, Tensor | float]] = {}
        for weight in {call.weight: None for call in calls}:
            if weight is None:
                continue
            if weight not in self._gradients:  # a closure's, or a loop's without an optimizer
                self._take_gradient(weight)
            numbers = {
                "W_norm": self._sizes.get(weight) if weight.numel() else None,
                "g_W_norm": self._gradients.get(weight),
                "g_W_raw_norm": self._raw.get(weight),
                "g_W_stale_norm": self._stale.get(weight),
            }
            copy = self._copies.get(weight)
            if copy is not None and copy.numel() and not no_update:
                numbers["dW_norm"] = self._norm("dW", weight, copy.sub_(weight.detach()))  # in place: one is enough
                if copy.element_size() < 4 and weight.grad is not None:
                    numbers["dW_rounded_fraction"] = statistics.mean(copy[weight.grad != 0] == 0)
            told[weight] = {column: x for column, x in numbers.items() if x is not None}
        gaps: list[Gap] = []
        for call in calls:
            weight = call.weight
            if weight is None:
                if call.fan_in is not None:
                    gaps += [
                        (call, c, "its weight is computed from others") for c in ("W_rms", "g_W_norm", "update_ratio")
                    ]
                continue
            call.values.update(told[weight])
            call.sizes["W"] = call.sizes["dW"] = weight.numel()
            if no_update:
                gaps += [(call, "dW_rms", no_update), (call, "update_ratio", no_update)]
            if "g_W_norm" not in call.values:
                reason = "no gradient arrived at this weight" if weight.requires_grad else "frozen"
                gaps.append((call, "g_W_norm", reason))
                continue
            if "g_W_stale_norm" not in call.values:
                gaps.append((call, "g_W_stale_norm", "no backward was seen to come to it"))
            if "g_W_raw_norm" not in call.values:
                gaps.append((call, "g_W_raw_norm", "the backward that left it was not watched"))
        return gaps

    def settle(self, calls: Sequence[Call], no_update: str) -> list[Gap]:
        """The host has read the norms: measure again what float32 could not square; learn what it can, until the next.

        A further read, where a number has come near the ends of float32 since the last sample.
        """
        gaps: list[Gap] = []
        told = [
            (call, weight, kind, f"{kind}_norm")
            for call in calls
            if (weight := call.weight) is not None and weight.numel()
            for kind in KINDS
            if f"{kind}_norm" in call.values
        ]
        fit = set()
        for call, weight, kind, column in told:
            rms = float(call.values[column]) / math.sqrt(weight.numel())
            if (kind, weight) in self._narrow and not (RIGHT[0] < rms < RIGHT[1] or math.isnan(rms)):
                again = self._again(kind, weight, bool(no_update))
                del call.values[column]
                if again is None:
                    gaps.append((call, column, "it came near the ends of float32: told from the next sample on"))
                else:
                    call.values[column] = again.item()
            elif FAR[0] < rms < FAR[1]:
                fit.add((kind, weight))
        self._narrow = fit
        return gaps

    def _again(self, kind: str, p: nn.Parameter, no_update: bool) -> Tensor | None:
        """A norm in float64, of what is still there."""
        if kind.startswith("g_W"):
            gradient, version = self._met[p]
            changed = gradient._version != version or (kind == "g_W_raw" and self._raw[p] is not self._gradients[p])
            return None if changed else statistics.norm(gradient)
        copy = self._copies[p]
        if kind == "W" and not no_update:
            return statistics.norm(p.detach().double() + copy.double())
        return statistics.norm(copy)


def _copied(now: Tensor, room: Tensor | None) -> Tensor:
    if room is None or type(room) is not type(now) or _kind(room) != _kind(now):
        return now.clone()
    return room.copy_(now)


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, x.stride()
