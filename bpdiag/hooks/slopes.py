"""The slopes of activations: how large, how many elements pass almost nothing, which units no batch woke lately."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bpdiag import statistics
from bpdiag.hooks.call import Call
from bpdiag.hooks.reading import Reading
from bpdiag.hooks.reading import kept as kept_parts
from bpdiag.hooks.shelf import Box, Held
from bpdiag.rules import Activation

DEAD_WINDOW = 8  # sampled batches a unit must be silent in: in one, chance alone silences many (see diagnosis)

# n calls; (n, N) elements of a unit with a slope that is not small; (n, N) the largest |slope| of a unit
Measured = tuple[Sequence[Call], Tensor, Tensor | None]


class Slopes:
    """Reduced to a few numbers for each unit at the call, to one for each call when the step ends, of all at once."""

    def __init__(self) -> None:
        self._silence: dict[tuple[str, int], Tensor] = {}  # (N,) sampled batches that a unit has been silent for
        self.forget()

    def forget(self) -> None:
        """What this step measured; how long each unit has been silent is kept."""
        self._measured: list[Measured] = []
        self._units: dict[Call, int] = {}
        self._elements: dict[Call, int] = {}
        # what waits, by kind: the calls, and the place of what their slope is computed from
        self._waiting: dict[tuple[Box, type[Activation], int], list[tuple[Call, int]]] = {}

    def measure(self, call: Call, rule: type[Activation], kept: Tensor, *learned: Tensor) -> None:
        """Of one call, from what its slope is computed from."""
        slope = rule.slope(kept.detach(), *[p.detach() for p in learned]).unsqueeze(0)
        self._measure([call], rule, statistics.dense(slope))

    def wait(self, call: Call, rule: type[Activation], kept: Held) -> None:
        """Of one call whose slope is computed from nothing but what waits on a shelf."""
        self._waiting.setdefault((kept.box, rule, call.axis), []).append((call, kept.place))

    def _measure(self, calls: Sequence[Call], rule: type[Activation], slopes: Tensor) -> None:
        """Of n calls alike, from their slopes (n, ...)."""
        unit = slopes.dim() + calls[0].axis
        others = [d for d in range(1, slopes.dim()) if d != unit]
        passing, elements = slopes, slopes[0].numel()
        if not rule.is_switch:
            shape = slopes.shape[:2] if slopes.dim() > 1 and elements else (len(calls), 1)
            norms = statistics.lengths(slopes.reshape(shape[0] * shape[1], -1)).view(shape)
            for call, norm in zip(calls, norms.unbind(), strict=True):
                call.values["_slope_norm"] = kept_parts(norm)
            passing = statistics.passing(slopes, rule.largest_slope)
        if passing.element_size() < 4:
            passing = passing.float()
        if others:
            passing = passing.sum(others[0] if len(others) == 1 else others)  # a list costs as much as the sum of a row
        passing = passing.reshape(len(calls), -1)
        self._elements.update(dict.fromkeys(calls, elements))
        largest = None
        if unit >= 1 and elements:
            self._units.update(dict.fromkeys(calls, slopes.shape[unit]))
            largest = passing if rule.is_switch else statistics.largest_of_units(slopes, unit, stacked=True)
        self._measured.append((calls, passing, largest))

    def finish(self, calls: Sequence[Call], reading: Reading) -> None:
        """Have the host told of these calls; of the first forward pass, also how many units sleep."""
        for (box, rule, _), waiting in self._waiting.items():
            stack = box.at([place for _, place in waiting])
            self._measure([call for call, _ in waiting], rule, statistics.dense(rule.slope(stack)))
        kept = set(calls)
        for alike, passing, largest in _joined(self._measured):
            numbers = passing.sum(1, dtype=statistics.wide(passing.device))
            reading.tell(numbers, [(call.values, "_passing") for call in alike])
            rows = [i for i, call in enumerate(alike) if call in kept and call.backward == 0]
            if largest is None or not rows:
                continue
            if len(rows) < len(alike):
                alike, largest = [alike[i] for i in rows], largest[rows]
            kind = largest.shape[1:], largest.device
            known = [(x := self._silence.get(c.key)) is not None and (x.shape, x.device) == kind for c in alike]
            # strangers are taken for silent as long as it takes
            strange = largest.new_full(kind[0], DEAD_WINDOW)
            before = [self._silence[c.key] if met else strange for c, met in zip(alike, known, strict=True)]
            silence = (torch.stack(before) + 1) * (largest == 0)
            self._silence.update(zip([c.key for c in alike], silence.unbind(), strict=True))
            asleep = (silence >= DEAD_WINDOW).sum(1, dtype=statistics.wide(silence.device))
            columns = ["_asleep" if met else "_first" for met in known]
            reading.tell(asleep, [(c.values, column) for c, column in zip(alike, columns, strict=True)])

    def enter(self, calls: Sequence[Call]) -> None:
        """What the host has read, as columns."""
        for call in calls:
            if call in self._elements:
                elements, passing = self._elements[call], call.values.pop("_passing")
                norm = call.values.pop("_slope_norm", math.sqrt(passing))
                call.values["slope_rms"] = norm / math.sqrt(elements) if elements else math.nan
                call.values["a_saturated_fraction"] = (elements - passing) / elements if elements else math.nan
            if "_asleep" in call.values:
                call.values["a_dead_fraction"] = call.values.pop("_asleep") / self._units[call]


def _joined(measured: Iterable[Measured]) -> Iterable[Measured]:
    """What is of the same kind, as one."""
    alike: dict[Any, list[Measured]] = {}
    for calls, passing, largest in measured:
        kind = passing.shape[1], passing.device, passing.dtype, largest is passing, largest is None or largest.dtype
        alike.setdefault((*kind, None if largest is None else largest.shape[1]), []).append((calls, passing, largest))
    for group in alike.values():
        if len(group) == 1:
            yield group[0]
            continue
        passing, largest = torch.cat([x for _, x, _ in group]), group[0][2]
        if largest is group[0][1]:
            largest = passing
        elif largest is not None:
            largest = torch.cat([x for _, _, x in group if x is not None])
        yield [call for calls, _, _ in group for call in calls], passing, largest
