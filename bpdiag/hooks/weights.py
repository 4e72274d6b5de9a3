"""Weights around an update: their size before it, the gradient the optimizer meets, what the update adds.

Squares of float32 are summed in float64, which costs four times as much as in float32.  A weight is large and changes
little, so where the last sample found its numbers far from the ends of float32, the sums of a row of it are float32's.
The host, who reads the result anyway, sees whether that was right; where not, it is measured again in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from bpdiag import statistics
from bpdiag.hooks.call import Call
from bpdiag.hooks.gains import Gap
from bpdiag.hooks.reading import kept
from bpdiag.hooks.scale import ScalerClock

FAR = 1e-12, 1e12  # from the ends of float32: rms of what may be squared in it until the next sample
RIGHT = 1e-15, 1e18  # rms for which that was right; what is under 1e-19 squares to 0, and adds nothing to such a one
KINDS = {kind: f"{kind}_norm" for kind in ("W", "dW", "g_W", "g_W_raw")}


@dataclasses.dataclass(eq=False, slots=True)
class _Weight:
    """One weight and what this step measured of it."""

    p: nn.Parameter
    narrow: set[str] = dataclasses.field(default_factory=set)  # kinds of numbers far from the ends of float32
    room: Tensor | None = None  # for the copy, from one sample to the next
    copy: Tensor | None = None  # in the end what the update took away from it
    size: Tensor | None = None  # norm of the copy
    left: tuple[Tensor, int] | None = None  # the gradient as the backward left it, its version
    raw: Tensor | None = None  # its norm then
    met: tuple[Tensor, int] | None = None  # and as the optimizer meets it
    gradient: Tensor | None = None
    stale: Tensor | float | None = None  # what .grad held before

    def forget(self) -> None:
        """What this step measured."""
        self.copy = self.size = self.left = self.raw = self.met = self.gradient = self.stale = None

    @property
    def is_begun(self) -> bool:
        """Whether this step has measured anything of it."""
        return not (self.stale is None and self.left is None and self.copy is None)

    def norm(self, kind: str, x: Tensor) -> Tensor:
        """As a number, or in parts."""
        if kind in self.narrow and type(x) is Tensor and x.dtype == torch.float32 and x.dim() > 1 and x.is_contiguous():
            return kept(torch.linalg.vector_norm(x.view(x.shape[0], -1), dim=1))
        return statistics.norm(x)

    def take_copy(self) -> Tensor:
        """The weight as it is now."""
        now = self.p.detach()
        if self.room is None or not _alike(now, self.room):
            self.room = now.clone()
        else:
            self.room.copy_(now)
        return self.room


class Weights:
    """One copy of each weight, from before the update to the end of the step; numbers of everything else."""

    def __init__(self, clock: ScalerClock | None) -> None:
        self._clock = clock
        self._known: dict[nn.Parameter, _Weight] = {}
        self.forget()

    def forget(self) -> None:
        """What this step measured."""
        self._met: list[tuple[Call, nn.Parameter | None]] = []
        for one in self._known.values():
            one.forget()

    def give_back(self) -> None:
        """The memory of the copies, and of weights that are no more: the next step is not sampled."""
        for one in self._known.values():
            one.room = None
        self._known = {p: one for p, one in self._known.items() if one.narrow or one.is_begun}

    def of(self, p: nn.Parameter) -> _Weight:
        """What is known of a weight."""
        if p not in self._known:
            self._known[p] = _Weight(p)
        return self._known[p]

    def met_by_backward(self, one: _Weight, g: Tensor) -> None:
        """A backward is about to add to a weight's gradient: the first of a step should find none.

        A later one that finds less has met a gradient cleared since, as a critic's is after the other's turn.
        """
        before = one.p.grad
        if one.met is not None or one.stale == 0.0:
            return
        if before is None:
            one.stale = 0.0
        elif one.stale is None:
            one.stale = statistics.norm(before)
        else:
            one.stale = torch.minimum(torch.as_tensor(one.stale), statistics.norm(before))

    def left_by_backward(self, one: _Weight, p: nn.Parameter) -> None:
        """A backward has added to a weight's gradient; not what another's loss adds when it has been used."""
        gradient = p.grad
        if gradient is not None and one.met is None:
            one.left = gradient, gradient._version
            one.raw = one.norm("g_W_raw", gradient.detach())

    def copy(self, weights: Iterable[nn.Parameter], with_gradients: bool) -> None:
        """What an optimizer is about to change: those not yet copied."""
        for p in weights:
            one = self.of(p)
            if one.copy is None:
                one.copy = one.take_copy()
                one.size = one.norm("W", one.copy)  # at once, as all here: it is still in the cache
                if with_gradients:
                    self._take_gradient(one)

    def _take_gradient(self, one: _Weight) -> None:
        """Its norm as the optimizer meets it: that which the backward left, if nobody has changed it since."""
        gradient = one.p.grad
        if gradient is None:
            return
        one.met = gradient, gradient._version
        left, version = one.left or (None, 0)
        if left is gradient and version == gradient._version:
            one.gradient = one.raw
            return
        one.gradient = one.norm("g_W", gradient.detach())
        scale = self._clock.scale() if self._clock else None
        if scale is not None and one.raw is not None:
            one.raw = one.raw / scale

    def drawn(self, call: Call) -> list[tuple[str, Tensor]]:
        """What a histogram is made of; before ``finish``."""
        weight = call.weight
        if weight is None:
            return []
        one = self.of(weight)
        pairs = [("W", one.copy), ("g_W", weight.grad if one.gradient is not None else None)]
        return [(tensor, x) for tensor, x in pairs if x is not None]

    def finish(self, calls: Sequence[Call], no_update: str) -> list[Gap]:
        """The norms into the values of the calls whose weights they are; what is missing, and why."""
        self._met = [(call, call.weight) for call in calls]
        told: dict[nn.Parameter, dict[str, Tensor | float]] = {}
        for _, weight in self._met:
            if weight is None or weight in told:
                continue
            one = self.of(weight)
            if one.gradient is None:  # a closure's, or a loop's without an optimizer
                self._take_gradient(one)
            numbers = {
                "W_norm": one.size if weight.numel() else None,
                "g_W_norm": one.gradient,
                "g_W_raw_norm": one.raw,
                "g_W_stale_norm": one.stale,
            }
            if one.copy is not None and one.copy.numel() and not no_update:
                numbers["dW_norm"] = one.norm("dW", one.copy.sub_(weight.detach()))  # in place: one is enough
                if one.copy.element_size() < 4 and weight.grad is not None:
                    numbers["dW_rounded_fraction"] = statistics.mean(one.copy[weight.grad != 0] == 0)
            told[weight] = {column: x for column, x in numbers.items() if x is not None}
        gaps: list[Gap] = []
        for call, weight in self._met:
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

    def settle(self, no_update: str) -> list[Gap]:
        """The host has read the norms: measure again what float32 could not square; learn what it can, until the next.

        A further read, where a number has come near the ends of float32 since the last sample.
        """
        gaps: list[Gap] = []
        fit: dict[nn.Parameter, set[str]] = {}
        for call, weight in self._met:
            size = weight.numel() if weight is not None else 0
            if weight is None or not size:
                continue
            one, fit_here = self._known[weight], fit.setdefault(weight, set())
            for kind, column in KINDS.items():
                norm = call.values.get(column)
                if norm is None:
                    continue
                rms = norm / math.sqrt(size)
                if kind in one.narrow and not (RIGHT[0] < rms < RIGHT[1] or math.isnan(rms)):
                    again = self._again(kind, one, bool(no_update))
                    del call.values[column]
                    if again is None:
                        gaps.append((call, column, "it came near the ends of float32: told from the next sample on"))
                    else:
                        call.values[column] = again.item()
                elif FAR[0] < rms < FAR[1]:
                    fit_here.add(kind)
        for weight, one in self._known.items():
            one.narrow = fit.get(weight, set())
        return gaps

    def _again(self, kind: str, one: _Weight, no_update: bool) -> Tensor | None:
        """A norm in float64, of what is still there."""
        if kind.startswith("g_W"):
            assert one.met
            gradient, version = one.met
            changed = gradient._version != version or (kind == "g_W_raw" and one.raw is not one.gradient)
            return None if changed else statistics.norm(gradient)
        assert one.copy is not None
        if kind == "W" and not no_update:
            return statistics.norm(one.p.detach().double() + one.copy.double())
        return statistics.norm(one.copy)


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether one can be copied onto the other as a clone would be."""
    return type(x) is type(y) and (x.shape, x.dtype, x.device, x.stride()) == (y.shape, y.dtype, y.device, y.stride())
