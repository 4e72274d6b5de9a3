"""Units that are copies of each other: rows of a weight that are alike, from the first sample until they part."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bpdiag import statistics
from bpdiag.hooks.call import Call


class Symmetry:
    """Which weights are still to be looked at: every one on its first sample, then those whose rows are alike."""

    def __init__(self) -> None:
        self._parted: set[nn.Parameter] = set()

    def measure(self, call: Call) -> None:
        """Of a call's weight, before the update; of a frozen one, or a table that is added or read, no copy matters."""
        weight, module = call.weight, call.module
        if weight is None or not weight.requires_grad or weight in self._parted or type(weight.data) is not Tensor:
            return
        if weight.dim() > 1 and isinstance(module, nn.Linear | _ConvNd):
            call.values["W_distinct_rows"] = statistics.distinct_rows(*_rows(module, weight))

    def enter(self, calls: Sequence[Call]) -> None:
        """The host has read the shares: who has parted from its likes is not asked again."""
        for call in calls:
            if call.weight is not None and not call.values.get("W_distinct_rows", 1.0) <= 0.5:
                self._parted.add(call.weight)


def _rows(module: nn.Module, weight: Tensor) -> tuple[Tensor, int]:
    """(N_out, ...), one row a unit, and in how many groups."""
    groups = int(getattr(module, "groups", 1))
    if not getattr(module, "transposed", False):
        return weight, groups
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1), groups
