"""The numbers of a step stay on their devices until it ends; then the host reads all of them in one go."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bpdiag import statistics

MOST_PARTS = 4096  # of a norm kept in parts until the step ends: more would be memory

Table = dict[Any, Any]
Place = tuple[Table, Any]  # a table, and the key of a number in it


def norm_by_sample(x: Tensor) -> Tensor:
    """‖x_i‖ for each sample, (B,), which ``Reading`` reads as ‖x‖; () where the samples are too many to keep."""
    return kept(statistics.lengths(statistics.by_sample(x)))


def kept(parts: Tensor) -> Tensor:
    """The parts of a norm as they are kept until the step ends: all of them, or where they are too many the norm."""
    return parts if parts.shape[0] <= MOST_PARTS else statistics.norm(parts)


class Reading:
    """What the host is going to read.

    A table's () tensor is its number, a vector stands for its norm: those of a length are reduced together.
    """

    def __init__(self) -> None:
        self._told: list[tuple[Tensor, Sequence[Place]]] = []
        self._vectors: list[tuple[Tensor, Sequence[Place]]] = []

    def tell(self, numbers: Tensor, places: Sequence[Place]) -> None:
        """(n,) numbers of n places."""
        self._told.append((numbers, places))

    def read(self, tables: Iterable[Table]) -> None:
        """Replace every tensor in ``tables`` by its number, and enter those told."""
        singles: dict[torch.device, list[tuple[Tensor, Place]]] = {}
        vectors: dict[tuple[torch.device, int], list[tuple[Tensor, Place]]] = {}
        for table in tables:
            for key, x in table.items():
                if not isinstance(x, Tensor):
                    continue
                if type(x) is not Tensor and hasattr(x, "full_tensor"):
                    x = x.full_tensor()  # of a sharded tensor: the norm of the whole, on every process
                shape, entry = x.shape, (x, (table, key))
                alike = vectors.get((x.device, shape[0])) if shape else singles.get(x.device)
                if alike is not None:
                    alike.append(entry)
                elif shape:
                    vectors[x.device, shape[0]] = [entry]
                else:
                    singles[x.device] = [entry]
        for alike in vectors.values():
            stack, of_stack = torch.stack([x for x, _ in alike]), [place for _, place in alike]
            self._vectors.append((stack, of_stack))
            self.tell(statistics.lengths(stack), of_stack)
        for group in singles.values():
            self.tell(torch.stack([x for x, _ in group]), [place for _, place in group])
        by_device: dict[torch.device, list[tuple[Tensor, Sequence[Place]]]] = {}
        for numbers, places in self._told:
            by_device.setdefault(numbers.device, []).append((numbers, places))
        for told in by_device.values():
            read = torch.cat([numbers for numbers, _ in told]).tolist()
            for (table, key), number in zip((place for _, places in told for place in places), read, strict=True):
                table[key] = number

    def samples(self) -> dict[tuple[int, Any], int]:
        """(id of a table, key) of a norm that is not finite -> the sample that makes it so, where it is one alone.

        A further read, on such a step alone.
        """
        found = {}
        for stack, places in self._vectors:
            bad = [i for i, (table, key) in enumerate(places) if not math.isfinite(table[key])]
            if bad:
                for i, where in zip(bad, (~torch.isfinite(stack[bad])).tolist(), strict=True):
                    if sum(where) == 1:
                        found[id(places[i][0]), places[i][1]] = where.index(True)
        return found
