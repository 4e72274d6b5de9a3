"""Small tensors wait, as copies, until the step ends: those of one shape are then measured by a handful of operations.

An operation on a few thousand elements costs far more than its arithmetic, and one on a stack of twenty such tensors
costs hardly more than on one.  What a tensor holds may be overwritten before the step ends, so it is copied.

A shelf learns from each sample how many of a kind there are and makes room for as many in the next; what finds no
room, as all of the first sample, is measured at once by whoever asked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from bpdiag import statistics

LARGEST = 2**16  # elements of a tensor that waits: of a larger one the arithmetic is what costs
WIDE = LARGEST  # elements of them that are copied into a wider format at once: on a CPU these stay in its cache
ROOM = 2**20  # elements of all that waits: 4 MiB in float32

MOST_PARTS = 4096  # of a norm kept in parts until the step ends: more would be memory
_PLAIN = (Tensor, torch.nn.Parameter)
_REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Kind = tuple[torch.Size, torch.dtype, torch.device, Any]  # shape, and what it is: only what is alike stands together


class Box:
    """Room for a number of tensors of one kind."""

    def __init__(self, kind: Kind, capacity: int, wide: Tensor) -> None:
        shape, dtype, device, _ = kind
        self.stack = torch.empty((capacity, *shape), dtype=dtype, device=device)
        self.capacity, self._wide = capacity, wide
        self._slots = self.stack.unbind()
        self.clear()

    def clear(self) -> None:
        """Nothing stands in it."""
        self._free = list(range(self.capacity - 1, -1, -1))

    def put(self, x: Tensor) -> int:
        """Copy ``x`` in; its place.

        Raises:
            IndexError: It is full.
        """
        place = self._free.pop()  # at once: a backward has threads of its own
        self._slots[place].copy_(x.detach())
        return place

    def taken(self) -> Tensor:
        """(n, B, N) all that stands in it, N numbers for each of B samples."""
        stack = self.stack[: self.capacity - len(self._free)]
        return stack.flatten(2) if stack.dim() > 2 else stack.unsqueeze(2)

    def lengths(self) -> Tensor:
        """(n, B) ‖x_i‖ for each sample of each tensor that stands in it, as ``statistics.lengths``."""
        stack = self.taken()
        rows = stack.flatten(0, 1)
        if rows.device.type != "cpu" or rows.dtype == torch.float64:
            return statistics.lengths(rows).view(stack.shape[:2])
        # into a wide copy that stays: new memory for each would cost more than the sums
        found = torch.empty(len(rows), dtype=torch.float64)
        several = max(WIDE // rows.shape[1], 1)
        for part, told in zip(rows.split(several), found.split(several), strict=True):
            wide = self._wide[: part.numel()].view(part.shape)
            torch.linalg.vector_norm(wide.copy_(part), dim=1, out=told)
        return found.view(stack.shape[:2])

    def at(self, places: list[int]) -> Tensor:
        """(n, *shape) what stands at these places."""
        return self.stack[: len(places)] if places == list(range(len(places))) else self.stack[places]


class Held(NamedTuple):
    """One tensor that waits, and what is wanted of it: in a table of numbers it stands for the number."""

    box: Box
    place: int
    of_units: bool = False  # ‖sum of x_i / ‖x_i‖‖ instead of ‖x‖


class Shelf:
    """The boxes of a step."""

    def __init__(self) -> None:
        self._boxes: dict[Kind, Box] = {}
        self._asked: dict[Kind, int] = {}
        self._wide = torch.empty(WIDE, dtype=torch.float64, device="cpu")

    def forget(self) -> None:
        """The step is over: make room for as many as it had."""
        before, self._boxes, left = self._boxes, {}, ROOM
        for kind, number in self._asked.items():
            needed = number * kind[0].numel()
            if needed <= left:
                left -= needed
                box = before.get(kind)
                if box is None or box.capacity != number:
                    box = Box(kind, number, self._wide)
                box.clear()
                self._boxes[kind] = box
        self._asked.clear()

    def hold(self, x: Tensor, what: Any) -> Held | None:
        """A copy of ``x``, which stands with others that are ``what``; None where it is to be measured at once."""
        if type(x) not in _PLAIN or x.layout is not torch.strided or x.dtype not in _REAL:
            return None
        shape = x.shape
        if not 0 < shape.numel() <= LARGEST or not shape or shape[0] > MOST_PARTS or is_functorch_wrapped_tensor(x):
            return None
        kind = shape, x.dtype, x.device, what
        self._asked[kind] = self._asked.get(kind, 0) + 1
        box = self._boxes.get(kind)
        try:
            return None if box is None else Held(box, box.put(x))
        except IndexError:
            return None
