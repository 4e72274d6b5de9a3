"""Every number of a measured step, for all members at once: left on the device, read by the host when asked.

    size    |x_k| = sqrt(sum_b r_kb^2),  r_kb^2 = sum_n x_knb^2     r tells which samples are not finite
    cosine  c_k = (|sum_b z_kb / r_kb|^2 - B) / (B (B - 1))

Letters as in ``stack``: x (k, N, B) is a tensor of the members ``s``, of pictures (k, C Q, B, J).  A step only sums
squares; what can wait until ``read`` waits, and is done for all layers in one operation.

What float32 squares wrongly is squared again in float64, as ``statistics`` does; a device that would have to be waited
for squares in float64 at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpdiag import statistics
from bpdiag.backprop.kernels import Kernel
from bpdiag.backprop.update import Named
from bpdiag.rules import Activation

Key = tuple[str, int]  # what, of which weight layer
Numbers = dict[Key, np.ndarray]
IN_UNITS = ("g_out", "g_u", "g_z", "edge", "g_W", "g_gamma")  # what is multiplied by the unit of its layer
WINDOW = 8  # sampled batches that a unit must be silent in to be called dead


class Meter:
    """What a step brings: a number for each member, (K,) under each key."""

    def __init__(self, members: int, device: torch.device) -> None:
        self.K, self.device = members, device
        self.wide = statistics.wide(device)
        self._squares: dict[Key, Tensor] = {}  # (K, B) r^2
        self._together: dict[int, Tensor] = {}  # (K, N) sum of z / r
        self._numbers: dict[Key, Tensor] = {}  # (K,)
        self._samples = 0  # of a batch
        self._silence: dict[int, Tensor] = {}
        self._copies: dict[Key, Tensor] = {}  # of weights, until they are updated
        self._alike: dict[int, set[int]] = {}  # layer -> members whose rows are still to be told apart

    def begin(self, xs: Sequence[Tensor], orders: Sequence[int]) -> None:
        """A step: its input."""
        lengths = torch.stack([statistics.lengths(x) for x in xs])[list(orders)]
        self._squares["x", 0], self._samples = lengths.to(self.wide).square_(), len(xs[0])

    def size(self, what: str, layer: int, s: slice, x: Tensor, spare: Tensor) -> Tensor:
        """|x_k|; returns r^2, (k, B).  ``spare``: room as large as x."""
        key, batch = (what, layer), x.shape[2]
        held = self._squares.get(key)
        if held is None or held.shape[1] != batch:
            held = self._squares[key] = torch.empty(self.K, batch, dtype=self.wide, device=self.device)
        if x.dtype == self.wide or x.device.type == "cpu":
            squares = torch.mul(x, x, out=spare).sum(_features(x))
            if x.dtype == self.wide or _right(squares, x[0].numel() // batch):
                return held[s].copy_(squares)
        return torch.sum(x.to(self.wide).square_(), _features(x), out=held[s])

    def cosine(self, layer: int, s: slice, z: Tensor, squares: Tensor, spare: Tensor) -> None:
        """c of the samples' z, of which ``size`` gave the squares."""
        held = self._together.get(layer)
        if held is None:
            features = z[0].numel() // z.shape[2]
            held = self._together[layer] = torch.empty(self.K, features, dtype=z.dtype, device=self.device)
        r = squares.sqrt().to(z.dtype).view(len(z), 1, -1, *[1] * (z.dim() - 3))
        torch.sum(torch.div(z, r, out=spare), 2, out=held[s].view(len(z), z.shape[1], *z.shape[3:]))

    def slopes(self, layer: int, s: slice, kept: Tensor, rule: type[Activation], its: Kernel, spare: Tensor) -> None:
        """How large the slopes are, how many elements pass almost nothing, which units no batch woke lately."""
        slope = its.vjp_of_ones(kept, spare)
        elements = slope[0].numel()
        if rule.is_switch:
            awake = slope.sum(2)
            passing = awake.sum(1, dtype=self.wide)
            norm = passing.sqrt()
        else:
            size = slope.abs_()
            norm = self._norm(size)
            awake = size.sum(2)  # 0 where all are; a maximum costs twenty times as much
            limit = statistics.SATURATED * rule.largest_slope * (1 - torch.finfo(size.dtype).eps)
            passing = elements - torch.le(size, limit, out=size).sum(2).sum(1, dtype=self.wide)
        self._put("slope_norm", layer, s, norm)
        self._put("passing", layer, s, passing)
        if layer not in self._silence:
            self._silence[layer] = awake.new_full((self.K, awake.shape[1]), WINDOW)
        silence = self._silence[layer][s]
        silence.add_(1).mul_(awake == 0)
        self._put("asleep", layer, s, (silence >= WINDOW).sum(1))

    def before(self, one: Named, s: slice) -> None:
        """A parameter as it is, and its gradient, before the update."""
        if one.name:
            self._put(f"g_{one.name}", one.layer, s, self._norm(one.G))
            self._put(one.name, one.layer, s, self._norm(one.p.W))
            held = self._copies.get((one.name, one.layer))
            if held is None or held.shape != one.p.W.shape:
                held = self._copies[one.name, one.layer] = torch.empty_like(one.p.W)
            held.copy_(one.p.W)

    def after(self, one: Named, s: slice) -> None:
        """What the update took from it."""
        if one.name:
            taken = self._copies[one.name, one.layer].sub_(one.p.W)
            self._put(f"d{one.name}", one.layer, s, self._norm(taken))

    def _norm(self, x: Tensor) -> Tensor:
        """(k,) |x_k| of what has no samples."""
        if x.dtype != self.wide and x.device.type == "cpu":
            norms = torch.linalg.vector_norm(x, dim=(1, 2))
            if _right(norms.to(self.wide).square_(), x[0].numel()):
                return norms
        return statistics.lengths(x.flatten(1))

    def clipped(self, s: slice, factor: Tensor) -> None:
        """What every gradient was multiplied by."""
        self._put("clip", 0, s, factor)

    def distinct_rows(self, layer: int, s: slice, W: Tensor) -> None:
        """Share of rows that differ, at the first step and as long as half are alike."""
        asked = self._alike.get(layer)
        if asked is None:
            asked = self._alike[layer] = set(range(self.K))
        for member in sorted(asked & set(range(s.start, s.stop))) if asked else ():
            self._put("distinct", layer, slice(member, member + 1), statistics.distinct_rows(W[member - s.start]))

    def forget_silence(self) -> None:
        """Units have been silent for no sample: what ``look`` saw is none of training's."""
        self._silence.clear()

    def read(self, units: np.ndarray) -> Numbers:
        """(K,) under each key, as numbers of the host; its one wait."""
        found: dict[Key, Tensor] = {}
        for keys, squares in _alike(self._squares):
            found |= zip(keys, squares.sum(2, dtype=self.wide).sqrt_().unbind(), strict=True)
        for layers, together in _alike(self._together):
            total, n = statistics.lengths(together.flatten(0, 1)).view(len(layers), -1), self._samples
            cosines = (total * total - n) / (n * (n - 1)) if n > 1 else total * math.nan
            found |= {("z_cosine", layer): cosine for layer, cosine in zip(layers, cosines.unbind(), strict=True)}
        found |= self._numbers
        table = torch.stack(list(found.values())).cpu().numpy()
        unit = np.array([units[layer] if what in IN_UNITS else np.ones(self.K) for what, layer in found])
        raw = dict(zip(found, table, strict=True))
        for layer, asked in self._alike.items():
            if ("distinct", layer) in raw:
                asked &= set(np.flatnonzero(raw["distinct", layer] <= 0.5).tolist())
        self._numbers = {key: x for key, x in self._numbers.items() if key[0] != "distinct"}
        return dict(zip(found, table / unit, strict=True))

    def has_samples(self, key: Key) -> bool:
        """Whether ``strangers`` can be asked of it."""
        return key in self._squares

    def strangers(self, key: Key, member: int) -> tuple[np.ndarray, np.ndarray]:
        """(B,) bool each: samples that hold a nan, and an infinity."""
        squares = self._squares[key][member].cpu().numpy()
        return np.isnan(squares), np.isinf(squares)

    def _put(self, what: str, layer: int, s: slice, numbers: Tensor) -> None:
        held = self._numbers.get((what, layer))
        if held is None:
            held = self._numbers[what, layer] = torch.full((self.K,), math.nan, dtype=self.wide, device=self.device)
        held[s] = numbers


def _right(squares: Tensor, elements: int) -> bool:
    """Whether sums of so many squares lie where float32 squares rightly."""
    low, high = (limit**2 * elements for limit in statistics.RIGHT)
    least, most = squares.aminmax()
    return bool(least > low) and bool(most < high)


def _features(x: Tensor) -> tuple[int, ...]:
    """All dimensions but members and samples."""
    return (1,) if x.dim() == 3 else (1, 3)


def _alike(tensors: dict[Any, Tensor]) -> Iterator[tuple[list[Any], Tensor]]:
    """Those of one shape and dtype, with their keys, as one tensor."""
    kinds: dict[Any, list[Any]] = {}
    for key, x in tensors.items():
        kinds.setdefault((x.shape, x.dtype), []).append(key)
    for keys in kinds.values():
        yield keys, torch.stack([tensors[key] for key in keys])
