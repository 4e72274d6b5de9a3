"""Every number of a measured step, for all members at once: left on the device, read by the host when asked.

    total   |x_k| = sqrt(sum_b r_kb^2),  r_kb^2 = sum_n x_knb^2     one pass; r tells which sample is not finite
    cosine  c_k = (|sum_b z_kb / r_kb|^2 - B) / (B (B - 1))

Letters as in ``stack``: x (k, N, B) is a tensor of the members ``s``, of pictures (k, C Q, B, J).  What a float32
cannot square is squared again in float64, as ``statistics`` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bpdiag import statistics
from bpdiag.backprop.update import Named
from bpdiag.rules import Activation

Key = tuple[str, int]  # what, of which weight layer
Numbers = dict[Key, np.ndarray]
IN_UNITS = (
    "g_out",
    "g_u",
    "g_z",
    "edge",
    "g_W",
    "g_gamma",
)  # cotangents: the unit of their layer is divided out by ``read``
WINDOW = 8  # sampled batches that a unit must be silent in to be called dead


class Meter:
    """What a step brings: a number for each member, (K,) under each key; for tensors with samples their lengths too."""

    def __init__(self, members: int, device: torch.device) -> None:
        self.K, self.device = members, device
        self.wide = statistics.wide(device)
        self._numbers: dict[Key, Tensor] = {}
        self._lengths: dict[Key, Tensor] = {}
        self._silence: dict[int, Tensor] = {}
        self._copies: dict[Key, Tensor] = {}  # of weights, until they are updated
        self._alike: dict[int, set[int]] = {}  # layer -> members whose rows are still to be told apart

    def begin(self, xs: Sequence[Tensor], orders: Sequence[int]) -> None:
        """A step: its input."""
        lengths = torch.stack([statistics.lengths(x) for x in xs])[list(orders)]
        self._lengths["x", 0], self._numbers["x", 0] = lengths, statistics.lengths(lengths)

    def size(self, what: str, layer: int, s: slice, x: Tensor, spare: Tensor) -> Tensor:
        """|x_k|; returns r, (k, B).  ``spare``: room as large as x."""
        squares = torch.mul(x, x, out=spare).sum(_features(x))
        total = squares.sum(1, dtype=self.wide)
        if x.dtype != self.wide:
            total, squares = self._right(x, total, squares)
        lengths = squares.sqrt()
        self._put(what, layer, s, total.sqrt_())
        held = self._lengths.get((what, layer))
        if held is None or held.shape[1] != x.shape[2]:
            held = self._lengths[what, layer] = lengths.new_empty(self.K, x.shape[2])
        held[s] = lengths
        return lengths

    def _right(self, x: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Where float32 squared wrongly, again; a device that would have to be waited for squares all of it again."""
        if x.device.type != "cpu":
            squares = x.to(self.wide).square().sum(_features(x))
            return squares.sum(1), squares
        low, high = (limit**2 * x[0].numel() for limit in statistics.RIGHT)
        doubtful = (total <= low) | (total >= high)
        if doubtful.any():
            squares = squares.to(self.wide)
            squares[doubtful] = x[doubtful].to(self.wide).square().sum(_features(x))
            total[doubtful] = squares[doubtful].sum(1)
        return total, squares

    def cosine(self, layer: int, s: slice, z: Tensor, lengths: Tensor, spare: Tensor) -> None:
        """c of the samples' z."""
        r = lengths.view(len(z), 1, -1, *[1] * (z.dim() - 3))
        together = torch.div(z, r, out=spare) if r.dtype == z.dtype else z / r
        total, n = statistics.lengths(together.sum(2).flatten(1)), z.shape[2]
        self._put("z_cosine", layer, s, (total * total - n) / (n * (n - 1)) if n > 1 else total * math.nan)

    def slopes(self, layer: int, s: slice, kept: Tensor, rule: type[Activation]) -> None:
        """How large the slopes are, how many elements pass almost nothing, which units no batch woke lately."""
        slope = rule.slope(kept)
        passing = slope
        if not rule.is_switch:
            self._put("slope_norm", layer, s, statistics.lengths(slope.flatten(1)))
            passing = statistics.passing(slope, rule.largest_slope)
        passing = passing.sum(2)
        self._put("passing", layer, s, passing.sum(1, dtype=self.wide))
        if rule.is_switch:
            self._put("slope_norm", layer, s, self._numbers["passing", layer][s].sqrt())
        largest = passing if rule.is_switch else slope.abs().amax(2)
        if layer not in self._silence:
            self._silence[layer] = largest.new_full((self.K, largest.shape[1]), WINDOW)
        silence = self._silence[layer]
        silence[s] = (silence[s] + 1) * (largest == 0)
        self._put("asleep", layer, s, (silence[s] >= WINDOW).sum(1, dtype=self.wide))

    def before(self, one: Named, s: slice) -> None:
        """A parameter as it is, and its gradient, before the update."""
        if one.name:
            self._put(f"g_{one.name}", one.layer, s, statistics.lengths(one.G.flatten(1)))
            self._put(one.name, one.layer, s, statistics.lengths(one.p.W.flatten(1)))
            self._copies[one.name, one.layer] = one.p.W.clone()

    def after(self, one: Named, s: slice) -> None:
        """What the update took from it."""
        if one.name:
            taken = self._copies.pop((one.name, one.layer)).sub_(one.p.W)
            self._put(f"d{one.name}", one.layer, s, statistics.lengths(taken.flatten(1)))

    def clipped(self, s: slice, factor: Tensor) -> None:
        """What every gradient was multiplied by."""
        self._put("clip", 0, s, factor)

    def distinct_rows(self, layer: int, s: slice, W: Tensor) -> None:
        """Share of rows that differ, at the first step and as long as half are alike."""
        asked = self._alike.setdefault(layer, set(range(self.K)))
        for member in range(s.start, s.stop):
            if member in asked:
                self._put("distinct", layer, slice(member, member + 1), statistics.distinct_rows(W[member - s.start]))

    def forget_silence(self) -> None:
        """Units have been silent for no sample: what ``look`` saw is none of training's."""
        self._silence.clear()

    def read(self, units: np.ndarray) -> Numbers:
        """(K,) under each key, as numbers of the host; its one wait."""
        keys = list(self._numbers)
        table = torch.stack([self._numbers[key] for key in keys]).cpu().numpy()
        told = {}
        for key, numbers in zip(keys, table, strict=True):
            what, layer = key
            told[key] = numbers / units[layer] if what in IN_UNITS else numbers
        for layer, asked in self._alike.items():
            if ("distinct", layer) in told:
                asked &= set(np.flatnonzero(told["distinct", layer] <= 0.5).tolist())
        self._numbers = {key: x for key, x in self._numbers.items() if key[0] != "distinct"}
        return told

    def has_samples(self, key: Key) -> bool:
        """Whether ``strangers`` can be asked of it."""
        return key in self._lengths

    def strangers(self, key: Key, member: int) -> tuple[np.ndarray, np.ndarray]:
        """(B,) bool each: samples that hold a nan, and an infinity."""
        lengths = self._lengths[key][member].cpu().numpy()
        return np.isnan(lengths), np.isinf(lengths)

    def _put(self, what: str, layer: int, s: slice, numbers: Tensor) -> None:
        held = self._numbers.get((what, layer))
        if held is None:
            held = self._numbers[what, layer] = torch.full((self.K,), math.nan, dtype=self.wide, device=self.device)
        held[s] = numbers


def _features(x: Tensor) -> tuple[int, ...]:
    """All dimensions but members and samples."""
    return (1,) if x.dim() == 3 else (1, 3)
