"""Places where the gradient's way down ends though the numbers go on: a detach, a no_grad, a tensor made anew."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from bpdiag.hooks.call import Call, leaves

LOST = "called, and no gradient came back: nothing that the loss depends on was computed from it"
CUT = "cut off: called, and no gradient came back; above it reads what has no graph: "
UNGRADED = "cut off: called without gradient only; above it reads what has no graph: "


class Cuts:
    """Whose gradient came, who never had any, and who reads numbers that came from nowhere, over all samples."""

    def __init__(self) -> None:
        self._entered: set[int] = set()  # storages of the model's input
        self._reached: set[nn.Module] = set()  # a gradient came back to an output of theirs
        self._unread: dict[nn.Module, str] = {}  # called, their output read by no watched layer nor given out
        self._ungraded: set[nn.Module] = set()  # called inside a forward pass, under no_grad
        self._orphans: dict[nn.Module, str] = {}  # trained, and read neither a watched layer nor the model's input
        self._order: dict[nn.Module, int] = {}  # of the first call

    def begin(self, args: Any) -> None:
        """A forward pass of the model begins."""
        self._entered = {_storage(t) for t in leaves(args)}

    def called(self, call: Call, x: Tensor | None) -> None:
        """A layer read ``x``."""
        self._order.setdefault(call.module, len(self._order))
        if x is None or call.parents or call.through or call.within is not None or x.requires_grad:
            return
        if self._entered and _storage(x) not in self._entered and x.numel() and x.dim() > 1:
            self._orphans.setdefault(call.module, call.name)

    def skipped(self, module: nn.Module, name: str) -> None:
        """A layer was called inside the forward pass, without gradient."""
        self._order.setdefault(module, len(self._order))
        self._unread.setdefault(module, name)
        self._ungraded.add(module)

    def finish(self, calls: Sequence[Call], given: Collection[Call]) -> None:
        """A sample is complete."""
        read = {parent for call in calls for parent in call.parents} | set(given)
        for call in calls:
            if call.events:
                self._reached.add(call.module)
            elif call not in read:
                self._unread.setdefault(call.module, call.name)
        for call in reversed(calls):  # what only an unread layer reads is unread
            if not call.events and call.module in self._unread:
                for parent in call.parents:
                    if not parent.events:
                        self._unread.setdefault(parent.module, parent.name)

    def found(self, trained: Iterable[nn.Parameter]) -> list[dict[str, str]]:
        """The layers without gradient though an optimizer has their parameters; where the cut is, if that is seen."""
        owned = set(trained)
        ends = sorted((self._order[m], name) for m, name in self._orphans.items() if m in self._reached)
        found = []
        for module, name in self._unread.items():
            asked = [p for p in module.parameters() if p.requires_grad and p in owned]
            above = next((end for order, end in ends if order > self._order[module]), None)
            if asked and module not in self._reached and all(p.grad is None for p in asked):
                cut = UNGRADED if module in self._ungraded else CUT
                reason = LOST if above is None else f"{cut}{above}"
                found.append((self._order[module], {"what": "module", "name": name, "reason": reason}))
        return [line for _, line in sorted(found, key=lambda pair: pair[0])]


def _storage(t: Tensor) -> int:
    """What views of one tensor share; of a tensor without storage its own identity."""
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return id(t)
