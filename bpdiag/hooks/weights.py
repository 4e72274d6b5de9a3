"""Weights around an update: their size before it, the gradient the optimizer meets, what the update adds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from bpdiag import statistics
from bpdiag.hooks.call import Call
from bpdiag.hooks.gains import Gap
from bpdiag.hooks.scale import ScalerClock


class Weights:
    """One copy of each weight, from before the update to the end of the step; numbers of everything else."""

    def __init__(self, clock: ScalerClock | None) -> None:
        self._clock = clock
        self.forget()

    def forget(self) -> None:
        """What this step measured."""
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._sizes: dict[nn.Parameter, Tensor] = {}  # norms of the copies
        self._left: dict[nn.Parameter, tuple[Tensor, int]] = {}  # the gradient as the backward left it, its version
        self._raw: dict[nn.Parameter, Tensor] = {}  # its norm then
        self._gradients: dict[nn.Parameter, Tensor] = {}  # and as the optimizer meets it

    def left_by_backward(self, p: nn.Parameter) -> None:
        """A backward has added to a weight's gradient."""
        if p.grad is not None:
            self._left[p] = p.grad, p.grad._version
            self._raw[p] = statistics.norm(p.grad)

    def copy(self, weights: Iterable[nn.Parameter], with_gradients: bool) -> None:
        """What an optimizer is about to change: those not yet copied."""
        for p in weights:
            if p not in self._copies:
                self._copies[p] = copy = p.detach().clone()
                self._sizes[p] = statistics.norm(copy)  # at once, as all here: it is still in the cache
                if with_gradients:
                    self._take_gradient(p)

    def _take_gradient(self, p: nn.Parameter) -> None:
        """Its norm as the optimizer meets it: that which the backward left, if nobody has changed it since."""
        if p.grad is None:
            return
        left, version = self._left.get(p, (None, 0))
        if left is p.grad and version == p.grad._version:
            self._gradients[p] = self._raw[p]
            return
        self._gradients[p] = statistics.norm(p.grad)
        scale = self._clock.scale() if self._clock else None
        if scale is not None and p in self._raw:
            self._raw[p] = self._raw[p] / scale

    def drawn(self, call: Call) -> list[tuple[str, Tensor]]:
        """What a histogram is made of; before ``finish``."""
        weight = call.weight
        if weight is None:
            return []
        pairs = [("W", self._copies.get(weight)), ("g_W", weight.grad if weight in self._gradients else None)]
        return [(tensor, x) for tensor, x in pairs if x is not None]

    def finish(self, calls: Sequence[Call], no_update: str) -> list[Gap]:
        """The norms into the values of the calls whose weights they are; what is missing, and why."""
        told: dict[nn.Parameter, dict[str, Tensor]] = {}
        for weight in {call.weight: None for call in calls}:
            if weight is None:
                continue
            if weight not in self._gradients:  # a closure's, or a loop's without an optimizer
                self._take_gradient(weight)
            numbers = {
                "W_norm": self._sizes.get(weight) if weight.numel() else None,
                "g_W_norm": self._gradients.get(weight),
                "g_W_raw_norm": self._raw.get(weight),
            }
            before = self._copies.pop(weight, None)
            if before is not None and before.numel() and not no_update:
                numbers["dW_norm"] = statistics.norm(before.sub_(weight.detach()))  # in place: one copy is enough
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
            elif "g_W_raw_norm" not in call.values:
                gaps.append((call, "g_W_raw_norm", "the backward that left it was not watched"))
        return gaps
