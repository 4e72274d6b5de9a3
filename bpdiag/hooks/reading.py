"""The numbers of a step stay on their devices until it ends; then the host reads all of them in one go."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bpdiag import statistics
from bpdiag.hooks.shelf import MOST_PARTS, Box, Held, Shelf

Table = dict[Any, Any]
Place = tuple[int, Table, Any]  # which of several numbers, and where it goes: a table, and its key there


def norm_by_sample(x: Tensor, shelf: Shelf) -> Tensor | Held:
    """‖x_i‖ for each sample, (B,), which ``Reading`` reads as ‖x‖; () where the samples are too many to keep.

    Of a small tensor that finds room on ``shelf`` later.
    """
    return shelf.hold(x, "g") or kept(statistics.lengths(statistics.by_sample(x)))


def kept(parts: Tensor) -> Tensor:
    """The parts of a norm as they are kept until the step ends: all of them, or where they are too many the norm."""
    return parts if parts.shape[0] <= MOST_PARTS else statistics.norm(parts)


class Reading:
    """What the host is going to read.

    A table's () tensor is its number, a vector stands for its norm, and so does what waits on a shelf: those of one
    length, or in one box, are reduced together.
    """

    def __init__(self) -> None:
        self._told: list[tuple[Tensor, Sequence[Place]]] = []
        self._vectors: list[tuple[Tensor, Sequence[Place]]] = []

    def tell(self, numbers: Tensor, places: Sequence[tuple[Table, Any]]) -> None:
        """(n,) numbers of n places, each a table and a key."""
        self._told.append((numbers, [(i, table, key) for i, (table, key) in enumerate(places)]))

    def read(self, tables: Iterable[Table]) -> None:
        """Replace every tensor in ``tables`` by its number, and enter those told."""
        singles: dict[torch.device, list[tuple[Tensor, Table, Any]]] = {}
        vectors: dict[tuple[torch.device, torch.Size], list[tuple[Tensor, Table, Any]]] = {}
        waiting: dict[Box, tuple[list[Place], list[Place]]] = {}
        for table in tables:
            for key, x in table.items():
                if type(x) is Held:
                    if x.box not in waiting:
                        waiting[x.box] = [], []
                    waiting[x.box][x.of_units].append((x.place, table, key))
                elif isinstance(x, Tensor):
                    if type(x) is not Tensor and hasattr(x, "full_tensor"):
                        x = x.full_tensor()  # of a sharded tensor: the norm of the whole, on every process
                    if x.dim():
                        vectors.setdefault((x.device, x.shape), []).append((x, table, key))
                    else:
                        singles.setdefault(x.device, []).append((x, table, key))
        for box, (whole, units) in waiting.items():
            self._measure(box, whole, units)
        for alike in vectors.values():
            stack = torch.stack([x for x, _, _ in alike])
            self._reduce(stack, [(i, table, key) for i, (_, table, key) in enumerate(alike)])
        for group in singles.values():
            self.tell(torch.stack([x for x, _, _ in group]), [(table, key) for _, table, key in group])
        by_device: dict[torch.device, list[tuple[Tensor, Sequence[Place]]]] = {}
        for numbers, places in self._told:
            by_device.setdefault(numbers.device, []).append((numbers, places))
        for told in by_device.values():
            read, first = torch.cat([numbers for numbers, _ in told]).tolist(), 0
            for numbers, places in told:
                for i, table, key in places:
                    table[key] = read[first + i]
                first += len(numbers)

    def _reduce(self, stack: Tensor, places: Sequence[Place], narrow: bool = False) -> None:
        """Norms in parts (n, P); ``narrow``: each is that of numbers narrower than itself, which can be squared."""
        numbers = torch.linalg.vector_norm(stack, dim=1) if narrow else statistics.lengths(stack)
        self._vectors.append((stack, places))
        self._told.append((numbers, places))

    def _measure(self, box: Box, whole: Sequence[Place], units: Sequence[Place]) -> None:
        """All that waits in one box."""
        stack = box.taken()
        lengths = box.lengths()
        self._reduce(lengths, whole, narrow=stack.dtype != lengths.dtype)
        if units:
            self._told.append((statistics.lengths(statistics.sum_of_units(stack, lengths)), units))

    def strangers(self) -> dict[tuple[int, Any], tuple[list[bool], list[bool]]]:
        """(id of a table, key) of a norm that is not finite -> for each of its parts whether it is nan, infinite.

        A further read, on such a step alone.
        """
        found = {}
        for stack, places in self._vectors:
            bad = [place for place in places if not math.isfinite(place[1][place[2]])]
            if bad:
                parts = stack[[i for i, *_ in bad]]
                nan, infinite = torch.stack([parts.isnan(), parts.isinf()]).tolist()
                for n, (_, table, key) in enumerate(bad):
                    found[id(table), key] = nan[n], infinite[n]
        return found
