"""Units that are copies of each other: rows of a weight that are alike, from the first sample until they part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bpdiag import statistics
from bpdiag.hooks.call import Call

ALIKE = 1e-5  # of a row's length: projections of two rows so near are one; rounding is 1e-7, a random row's neighbor
# among a thousand 1e-3 away


def distinct_rows(weight: Tensor, groups: int = 1) -> Tensor:
    """Share of the rows that differ, counted by their projections on one fixed direction.

    1 for random weights; 1/N_out where all rows are the same or 0: units that compute the same and, while their
    gradients are the same too, go on doing so.

    Args:
        weight: (N_out, ...).
        groups: of units that read different inputs: only those of one group can be copies of each other.

    Returns:
        () float64; nan if a number is not finite.

    Example:
        >>> distinct_rows(torch.ones(4, 3)).item(), distinct_rows(torch.eye(4)).item()
        (0.25, 1.0)
        >>> distinct_rows(torch.ones(4, 3), groups=4).item()
        1.0
    """
    rows = statistics.by_sample(weight)
    rows = rows.to(statistics.wide(rows.device))
    direction = torch.cos(torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device) ** 2)
    places = (rows @ direction).view(groups, -1).sort().values
    near = ALIKE * statistics.lengths(rows).amax() * statistics.norm(direction)
    share = (groups + (places.diff() > near).sum()) / len(rows)
    return torch.where(torch.isfinite(places).all(), share, torch.nan)


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
            call.values["W_distinct_rows"] = distinct_rows(*_rows(module, weight))

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
