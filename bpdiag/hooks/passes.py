"""The forward passes of a step: which one is under way, and what place a call has in it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

MOST_PASSES = 64  # forward passes kept per step: a validation loop without no_grad must not fill the memory


class Place(NamedTuple):
    """Of a call to be recorded."""

    number: int  # of its forward pass
    order: int  # of execution
    call: int  # which one of its module in its pass


class Passes:
    """Of the thread whose call came first in the step; ``pass_over`` is told of every call that is not recorded."""

    def __init__(self, pass_over: Callable[[nn.Module, str], None]) -> None:
        self._pass_over = pass_over
        self.number = 0
        self.order = 0  # of the last call
        self._depth = 0  # calls of the model under way: one that calls itself is in one pass
        self._counts: dict[nn.Module, int] = {}
        self._waiting: dict[nn.Module, deque[Place]] = {}  # calls without gradient inside a pass
        self._thread: int | None = None

    def are_listened_to(self) -> bool:
        """Whether a forward pass of the thread that began this step may be under way, with gradient."""
        return torch.is_grad_enabled() and not recomputing() and self._is_ours()

    def enter(self) -> bool:
        """The model is called; whether a forward pass begins."""
        if not self.are_listened_to():
            return False
        self._depth += 1
        return self._depth == 1

    def leave(self) -> bool:
        """A call of the model is over, or failed; whether its forward pass is."""
        if not self.are_listened_to() or not self._depth:
            return False
        self._depth -= 1
        return not self._depth

    def begin(self, is_new: bool) -> None:
        """Count from the beginning; ``is_new``: the pass before was not empty."""
        self.number += is_new
        self._counts.clear()

    def place(self, module: nn.Module) -> Place | None:
        """Of a call to be recorded; None of one that is not.

        A call without gradient inside the forward pass keeps its place: a reentrant checkpoint calls again, with
        gradient, when the backward comes there.
        """
        if recomputing():
            waiting = self._waiting.get(module)
            return waiting.popleft() if waiting and torch.is_grad_enabled() else None
        if not self._is_ours():
            self._pass_over(module, "called from another thread only")
            return None
        if not torch.is_grad_enabled():
            self._pass_over(module, "called without gradient only")
            if not self._depth:
                return None
        self.order += 1
        call = self._counts.get(module, 0)
        self._counts[module] = call + 1
        place = Place(self.number, self.order, call)
        if self.number >= MOST_PASSES:
            return None
        if torch.is_grad_enabled():
            return place
        self._waiting.setdefault(module, deque()).append(place)
        return None

    def is_without_gradient(self) -> bool:
        """Whether a call made now is inside a pass, and without gradient."""
        return bool(self._depth) and not torch.is_grad_enabled() and not recomputing() and self._is_ours()

    def without_gradient(self) -> Iterator[tuple[nn.Module, Place]]:
        """Calls inside a pass that no checkpoint has made again."""
        for module, places in self._waiting.items():
            for place in places:
                yield module, place

    def _is_ours(self) -> bool:
        here = threading.get_ident()
        if self._thread is None:
            self._thread = here
        return here == self._thread


def recomputing() -> bool:
    """Whether a backward is under way: a forward inside it is a checkpoint's recomputation, not a new call."""
    return torch._C._current_graph_task_id() != -1
