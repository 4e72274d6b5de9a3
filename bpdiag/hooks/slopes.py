"""The slopes of activations: how large, how many elements pass almost nothing, which units no batch woke lately."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bpdiag import statistics
from bpdiag.hooks.call import Call
from bpdiag.hooks.reading import Reading
from bpdiag.hooks.reading import kept as kept_parts
from bpdiag.hooks.shelf import Box, Held
from bpdiag.rules import Activation

DEAD_WINDOW = 8  # sampled batches a unit must be silent in: in one, chance alone silences many (see diagnosis)


class Slopes:
    """Reduced to a few numbers for each unit at the call, to one for each call when the step ends, of all at once."""

    def __init__(self) -> None:
        self._silence: dict[tuple[str, int], Tensor] = {}  # (N,) sampled batches that a unit has been silent for
        self.forget()

    def forget(self) -> None:
        """What this step measured; how long each unit has been silent is kept."""
        self._passing: dict[Call, Tensor] = {}  # (N,) elements of a unit with a slope that is not small
        self._largest: dict[Call, Tensor] = {}  # (N,) largest |slope| of a unit
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
        self._passing.update(zip(calls, passing.unbind(), strict=True))
        self._elements.update(dict.fromkeys(calls, elements))
        if unit >= 1 and elements:
            largest = passing if rule.is_switch else statistics.largest_of_units(slopes, unit, stacked=True)
            self._largest.update(zip(calls, largest.unbind(), strict=True))

    def finish(self, calls: Sequence[Call], reading: Reading) -> None:
        """Have the host told of these calls; of the first forward pass, also how many units sleep."""
        for (box, rule, _), waiting in self._waiting.items():
            stack = box.at([place for _, place in waiting])
            self._measure([call for call, _ in waiting], rule, statistics.dense(rule.slope(stack)))
        for alike, passing in _stacks(self._passing, calls):
            numbers = passing.sum(1, dtype=statistics.wide(passing.device))
            reading.tell(numbers, [(call.values, "_passing") for call in alike])
        for alike, largest in _stacks(self._largest, [call for call in calls if call.backward == 0]):
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
                call.values["a_dead_fraction"] = call.values.pop("_asleep") / self._largest[call].shape[0]


def _stacks(vectors: dict[Call, Tensor], calls: Iterable[Call]) -> Iterable[tuple[list[Call], Tensor]]:
    """Calls whose vectors are of the same kind, and these as one matrix."""
    alike: dict[tuple[torch.Size, torch.device, torch.dtype], list[Call]] = {}
    for call in calls:
        if call in vectors:
            x = vectors[call]
            alike.setdefault((x.shape, x.device, x.dtype), []).append(call)
    return [(group, torch.stack([vectors[call] for call in group])) for group in alike.values()]
