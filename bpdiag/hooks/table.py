"""The layer table: a line for each call when it is first seen, in the order of execution."""

from __future__ import annotations

from collections.abc import Sequence

from bpdiag.hooks.call import Call
from bpdiag.hooks.gains import Gap, Way
from bpdiag.hooks.slopes import DEAD_WINDOW
from bpdiag.trace import Layer


class LayerTable:
    """It only grows: a call keeps its line, whatever it is in later steps."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self._index: dict[tuple[str, int], int] = {}

    def __getitem__(self, call: Call) -> int:
        """The line of a call."""
        return self._index[call.key]

    def names(self) -> set[str]:
        """Of what has a line."""
        return {name for name, _ in self._index}

    def enter(self, calls: Sequence[Call], ways: dict[Call, Way]) -> None:
        """Add calls seen for the first time; ``calls`` in execution order."""
        fresh = []
        for call in calls:
            if call.key not in self._index:
                self._index[call.key] = len(self._index)
                fresh.append(call)
        for call in fresh:
            parents = sorted((p for p in call.parents if p.key in self._index), key=self.__getitem__)
            onward, via = self._line(ways.get(call, ((), None, "")))
            self.layers.append(
                Layer(
                    name=call.name,
                    call=call.number,
                    kind=call.kind,
                    shape=call.shape,
                    parents=tuple(self[p] for p in parents),
                    gap=tuple(call.gap.get(p, ()) for p in parents) if any(call.gap.values()) else (),
                    next=onward,
                    via=via,
                    fan_in=call.fan_in,
                    units=call.units,
                    activation=call.rule.name if call.rule else call.kind if call.tensor == "a" else None,
                    largest_slope=call.rule.largest_slope if call.rule else None,
                    r=call.r,
                    window=DEAD_WINDOW if call.rule else 0,
                    dtype=call.dtype,
                    ops=call.ops,
                )
            )

    def by_parent(self, call: Call, gains: dict[Call, float]) -> list[float | None]:
        """In the order of the line's ``parents``."""
        told = {self[parent]: gain for parent, gain in gains.items()}
        return [told.get(i) for i in self.layers[self[call]].parents]

    def changed_ways(self, ways: dict[Call, Way]) -> list[Gap]:
        """A way that leads elsewhere than when first seen has no gain: it would be held against the wrong weights."""
        gaps: list[Gap] = []
        for call, way in ways.items():
            layer = self.layers[self[call]]
            if "backward_gain" in call.values and self._line(way) != (layer.next, layer.via):
                for column in ("backward_gain", "weight_factor", "slope_factor"):
                    call.values.pop(column, None)
                    gaps.append((call, column, "the way up leads elsewhere than when first seen"))
        return gaps

    def _line(self, way: Way) -> tuple[int | None, tuple[int, ...]]:
        """Where a way leads, as the layer table says it: next, via."""
        passed, child, _ = way
        return (self[child], tuple(map(self.__getitem__, passed))) if child else (None, ())
