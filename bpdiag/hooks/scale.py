"""The scale of a loss: what its backward began with, and which steps a gradient scaler skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Scales:
    """dTotal/dLoss of every loss told before its backward, by forward pass: a scaler's factor, an accumulation's 1/k.

    Read from the loss's own gradient, so that whoever multiplied it, and when, does not matter.
    """

    def __init__(self) -> None:
        self.told: dict[int, dict[int, Tensor | float]] = {}

    def await_gradient(self, loss: Tensor, number: int) -> None:
        """Note the gradient of ``loss``, of forward pass ``number``, when it comes."""
        of_pass = self.told.setdefault(number, {})
        key = len(of_pass)
        of_pass[key] = math.nan  # until its backward

        def arrived(g: Tensor) -> None:
            of_pass[key] = g.detach()

        loss.register_hook(arrived)

    def of(self, number: int) -> float | None:
        """The scale of a pass, read to the host by then; None where no loss told it, or several differ."""
        scales = {float(s) for s in self.told.get(number, {}).values() if not math.isnan(s)}
        scale = scales.pop() if len(scales) == 1 else math.nan
        return scale if math.isfinite(scale) and scale != 0 else None


class ScalerClock:
    """A GradScaler's ``update`` ends a step, taken or skipped: the optimizer's own hooks see no skipped one.

    It stands on the scaler, as an attribute, while watching; a copy or a pickle of the scaler updates and tells nobody.
    """

    def __init__(self, scaler: torch.amp.GradScaler, ended: Callable[[], None] | None = None) -> None:
        self.scaler, self.ended = scaler, ended

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Update, then tell."""
        type(self.scaler).update(self.scaler, *args, **kwargs)
        if self.ended is not None:
            self.ended()

    def start(self) -> None:
        """Stand in for ``update``."""
        self.scaler.update = self  # type: ignore[method-assign]

    def stop(self) -> None:
        """Give it back."""
        self.scaler.__dict__.pop("update", None)

    def scale(self) -> Tensor | None:
        """Its factor, on its device; None before its first use."""
        return self.scaler._scale

    def __deepcopy__(self, memo: dict[int, Any]) -> ScalerClock:
        return ScalerClock(memo.get(id(self.scaler), self.scaler))

    def __reduce__(self) -> tuple[type[ScalerClock], tuple[torch.amp.GradScaler]]:
        return ScalerClock, (self.scaler,)


def divide(values: dict[Any, Any], keys: Sequence[Any], scale: float) -> None:
    """Divide some of the numbers in place."""
    for key in keys:
        if values[key] is not None:
            values[key] = values[key] / scale
