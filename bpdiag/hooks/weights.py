"""Weights around an update: their size before it, the gradient the optimizer meets, what the update adds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from bpdiag import statistics
from bpdiag.hooks.call import Call
from bpdiag.hooks.gains import Gap
from bpdiag.hooks.scale import ScalerClock


class Weights:
    """One copy of each weight, from before the update to the end of the step; numbers of everything else."""

    def __init__(self, clock: ScalerClock | None) -> None:
        self._clock = clock
        self._touched = False  # whether gradients were seen to change between backward and step
        self.forget()

    def forget(self) -> None:
        """What this step measured."""
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._left: dict[nn.Parameter, tuple[Tensor, int]] = {}  # the gradient as the backward left it, its version
        self._raw: dict[nn.Parameter, Tensor] = {}

    def left_by_backward(self, p: nn.Parameter) -> None:
        """A backward has added to a weight's gradient; its norm is taken where such have been changed afterwards."""
        if p.grad is not None:
            self._left[p] = p.grad, p.grad._version
            if self._touched:
                self._raw[p] = statistics.norm(p.grad)

    def copy(self, weights: Sequence[nn.Parameter], with_gradients: bool) -> None:
        """What an optimizer is about to change: those not yet copied."""
        fresh = [p for p in weights if p not in self._copies]
        for p in fresh:
            self._copies[p] = p.detach().clone()
        if with_gradients:
            self._take_gradients(fresh)

    def _take_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Their norms as the optimizer meets them, and as the backward left them."""
        there = [(p, p.grad) for p in weights if p.grad is not None]
        self._gradients.update(zip([p for p, _ in there], statistics.norms([g for _, g in there]), strict=True))
        for p, g in there:
            left, version = self._left.get(p, (None, 0))
            if left is g and version == g._version:
                self._raw[p] = self._gradients[p]
                continue
            self._touched = True
            scale = self._clock.scale() if self._clock else None
            if scale is not None and p in self._raw:
                self._raw[p] = self._raw[p] / scale

    def drawn(self, call: Call) -> list[tuple[str, Tensor]]:
        """What a histogram is made of; before ``finish``."""
        weight = call.weight
        pairs = [("W", self._copies.get(weight)), ("g_W", weight.grad if weight in self._gradients else None)]
        return [(tensor, x) for tensor, x in pairs if x is not None]

    def finish(self, calls: Sequence[Call], no_update: str) -> list[Gap]:
        """The norms into the values of the calls whose weights they are; what is missing, and why.

        The copies become the updates, in place: there is one of them.
        """
        weights = list(dict.fromkeys(call.weight for call in calls if call.weight is not None))
        # a closure's, or a loop's without an optimizer
        self._take_gradients([p for p in weights if p not in self._gradients])
        told = {p: {"g_W_norm": self._gradients[p]} if p in self._gradients else {} for p in weights}
        for p in weights:
            if p in self._raw:
                told[p]["g_W_raw_norm"] = self._raw[p]
        changed = [p for p in weights if p in self._copies and p.numel()]
        copies = [self._copies[p] for p in changed]
        for p, norm in zip(changed, statistics.norms(copies), strict=True):
            told[p]["W_norm"] = norm
        if not no_update:
            plain = [(c, p) for c, p in zip(copies, changed, strict=True) if statistics.is_plain(c)]
            if plain:
                torch._foreach_sub_([c for c, _ in plain], [p.detach() for _, p in plain])
            for i, (c, p) in enumerate(zip(copies, changed, strict=True)):
                if not statistics.is_plain(c):
                    copies[i] = c - p.detach()
            for p, norm in zip(changed, statistics.norms(copies), strict=True):
                told[p]["dW_norm"] = norm
        self._copies.clear()
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
                gaps.append((call, "g_W_raw_norm", "changed between backward and step: told from the next sample on"))
        return gaps
