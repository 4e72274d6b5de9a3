"""What a stack measured, as the trace of each of its members: the one that ``watch`` would have written of it alone.

``watch`` measures one member's first step on an ordinary module; its layer table, what it cannot tell and why, are
those of all steps.  The stack's numbers, a line for each sampled step, are put in its columns here, all at once:

    gain of weight layer l, next weight layer m, last layer on the way v:
    G = |g_z_l| / |g_z_m|,   w = |g_v| / |g_z_m|,   s = |g_z_l| / |g_v|,   D = log10(|g_z_l| / |g_z_L|)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from bpdiag.backprop.meter import Key, Meter, Numbers
from bpdiag.trace import COLUMNS, ROWS, STEPS, Layer, Missing, Sample, Trace

TENSORS = {
    "input": ("x", ""),
    "weight": ("z", "g_z"),
    "norm": ("u", "g_u"),
    "activation": ("a", "g_out"),
    "pool": ("p", "g_out"),
    "sum": ("s", "g_out"),
}
NOT_YET = "a_dead_fraction"  # told from the second sample on
Columns = dict[str, np.ndarray]


class Record:
    """The numbers of all members, sample by sample, until ``take`` makes a part of a trace of them."""

    def __init__(self, members: int) -> None:
        self.K = members
        self.begun = [False] * members  # whether a part has been taken
        self.last = 0  # sampled step
        self._steps: list[int] = []
        self._batches: list[int] = []
        self._numbers: list[Numbers] = []
        self._strangers: list[dict[tuple[int, Key], tuple[np.ndarray, np.ndarray]]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, batch: int, numbers: Numbers, meter: Meter) -> None:
        """One sampled step, read."""
        self.last = step
        self._steps.append(step)
        self._batches.append(batch)
        self._numbers.append(numbers)
        samples = [key for key in numbers if meter.has_samples(key)]
        bad = {key: np.flatnonzero(~np.isfinite(numbers[key])) for key in samples}
        self._strangers.append(
            {(member, key): meter.strangers(key, member) for key, members in bad.items() for member in members.tolist()}
        )

    def clear(self) -> None:
        """All members have taken their part."""
        for kept in (self._steps, self._batches, self._numbers, self._strangers):
            kept.clear()

    def rates(self, member: int) -> list[float]:
        """Its learning rate at each sample since ``clear``."""
        return [float(numbers["rate", 0][member]) for numbers in self._numbers]

    def take(self, member: int, first: Trace, scales: Sequence[float | None]) -> Trace:
        """A member's part: the samples since ``clear``.

        Args:
            member: which.
            first: the trace of its first step, measured alone.
            scales: of each weight layer, the branch's where a block ends.
        """
        if not self._steps:
            missing = _missing(first, self.last)
            return Trace(ROWS.empty_table(), STEPS.empty_table(), first.layers, missing, first.meta)
        numbers = {key: np.array([one[key][member] if key in one else np.nan for one in self._numbers])
                   for key in set().union(*self._numbers)}  # fmt: skip
        table = _Table(first, numbers, np.array(self._batches, float), scales)
        columns = table.columns()
        for i, strangers in enumerate(self._strangers):
            told = {key: counts for (owner, key), counts in strangers.items() if owner == member}
            table.enter_strangers(i, told, columns)
        steps = np.array(self._steps)
        if not self.begun[member] and NOT_YET in columns:
            columns[NOT_YET][0] = np.nan
        rows = _as_rows(first, steps, columns, table.edges(), first_part=not self.begun[member])
        self.begun[member] = True
        return Trace(rows, STEPS.empty_table(), first.layers, _missing(first, self.last), first.meta)


class _Table:
    """One member's columns, each (S, R): S samples, R lines of its layer table; nan where there is none."""

    def __init__(self, first: Trace, numbers: dict[Key, np.ndarray], batch: np.ndarray, scales: Sequence[float | None]):
        self.layers, self.numbers, self.batch, self.scales = first.layers, numbers, batch, scales
        self.there = {name: first.column(name)[1][0] for name in COLUMNS}
        self.places = [_place(layer) for layer in self.layers]

    def _of(self, what: str, layer: int) -> np.ndarray:
        return self.numbers.get((what, layer), np.full(len(self.batch), np.nan))

    def _own(self, row: int) -> np.ndarray:
        """The norm of a line's own cotangent."""
        kind, layer = self.places[row]
        g, scale = self._of(TENSORS[kind][1], layer), self.scales[layer]
        return g * scale if kind == "activation" and scale is not None else g

    @np.errstate(all="ignore")
    def columns(self) -> Columns:
        """All of them."""
        columns = {name: np.full((len(self.batch), len(self.layers)), np.nan) for name in COLUMNS}
        for row, (layer, (kind, number)) in enumerate(zip(self.layers, self.places, strict=True)):
            tensor = "a" if kind == "activation" else "z"
            elements = np.sqrt(self.batch * math.prod(layer.shape[1:]))
            told = {f"{tensor}_norm": self._of(TENSORS[kind][0], number), f"g_{tensor}_norm": self._own(row)}
            told |= {name.replace("norm", "rms"): x / elements for name, x in told.items()}
            if kind == "activation":
                passing = self._of("passing", number) / elements**2
                told["slope_rms"] = self._of("slope_norm", number) / elements
                told["a_saturated_fraction"] = 1 - passing
                told["a_dead_fraction"] = self._of("asleep", number) / layer.shape[1]
            elif kind in ("weight", "norm"):
                told |= self._weight(layer, kind, number)
            if kind in ("input", "weight") and number == 0:
                x, read = self._of("x", 0), self.layers[0].fan_in or math.prod(self.layers[0].shape[1:])
                told |= {"x_norm": x, "x_rms": x / np.sqrt(self.batch * read)}
            for name, x in told.items():
                columns[name][:, row] = x
        self._between(columns)
        return columns

    def _weight(self, layer: Layer, kind: str, number: int) -> Columns:
        name = "W" if kind == "weight" else "gamma"
        own = layer.shape[1] if kind == "weight" or "batch" in layer.kind else math.prod(layer.shape[1:])
        size = math.sqrt(own * (layer.fan_in or 1))
        G, clip = self._of(f"g_{name}", number), self.numbers.get(("clip", 0), np.ones(len(self.batch)))
        W, dW = self._of(name, number) / size, self._of(f"d{name}", number) / size
        told = {"W_rms": W, "dW_rms": dW, "update_ratio": dW / W, "g_W_raw_norm": G, "g_W_norm": G * clip}
        told["g_W_stale_norm"] = np.zeros_like(G)
        if kind == "weight":
            told |= {"z_cosine": self._of("z_cosine", number), "W_distinct_rows": self._of("distinct", number)}
        return told

    def _between(self, columns: Columns) -> None:
        weights = [row for row, (kind, _) in enumerate(self.places) if kind == "weight"]
        top = self._own(weights[-1])
        for i, row in enumerate(weights):
            layer, g = self.layers[row], self._own(row)
            feed = columns["x_rms"][:, row] if i == 0 else columns["z_rms"][:, weights[i - 1]]
            columns["forward_gain"][:, row] = columns["z_rms"][:, row] / feed
            columns["decades"][:, row] = np.log10(g / top)
            if layer.next is not None:
                above, entering = self._own(layer.next), self._own(layer.via[-1] if layer.via else row)
                columns["backward_gain"][:, row] = g / above
                columns["weight_factor"][:, row] = entering / above
                columns["slope_factor"][:, row] = g / entering
        for name, x in columns.items():  # what ``watch`` does not tell of a line, neither is told here
            if name not in (NOT_YET, "W_distinct_rows"):
                x[:, ~self.there[name]] = np.nan

    @np.errstate(all="ignore")
    def edges(self) -> dict[int, list[list[float]]]:
        """Line -> of each sample the gain of each of its ways down, where they part."""
        found = {}
        for row, (kind, number) in enumerate(self.places):
            own, scale = self._own(row), self.scales[number]
            if kind == "sum":
                branch = self._own(row - 1)
                found[row] = np.stack([own / own, branch / own], axis=1).tolist()
            elif kind == "weight" and scale is not None:
                found[row] = (self._of("edge", number) / own)[:, None].tolist()
        return found

    def enter_strangers(self, sample: int, told: dict[Key, tuple[np.ndarray, np.ndarray]], columns: Columns) -> None:
        """In how many samples of the batch a line's numbers are not finite; which one, where it is one alone."""
        for row, (kind, number) in enumerate(self.places):
            keys: list[Key] = [("x", 0)] if kind in ("weight", "input") and number == 0 else []
            keys += [(what, number) for what in TENSORS[kind]]
            counts = next((told[key] for key in keys if key in told), None)
            if counts is not None:
                nan, infinite = counts
                columns["nan_samples"][sample, row] = nan.sum()
                columns["inf_samples"][sample, row] = infinite.sum()
                if nan.sum() + infinite.sum() == 1:
                    columns["nonfinite_sample"][sample, row] = np.flatnonzero(nan | infinite)[0]


def _place(layer: Layer) -> tuple[str, int]:
    """What a line is, and of which weight layer, which is the number in its name."""
    if layer.kind == "unflatten":
        return "input", 0
    own = layer.activation or ""  # which may end in a number itself
    number = int(re.findall(r"\d+$", layer.name.removeprefix(own))[0]) - 1
    if layer.is_weight_layer:
        return "weight", number
    if layer.activation:
        return "activation", number
    return {"sum": "sum", "maxpool2d": "pool", "flatten": "pool"}.get(layer.kind, "norm"), number


def _as_rows(
    first: Trace, steps: np.ndarray, columns: Columns, edges: dict[int, list[list[float]]], first_part: bool
) -> pa.Table:
    S, R = len(steps), len(first.layers)
    names = np.array([layer.name for layer in first.layers], object)
    there = {name: np.broadcast_to(first.column(name)[1][0], (S, R)) for name in COLUMNS}
    asleep = np.array([bool(layer.activation) for layer in first.layers])
    there[NOT_YET] = np.broadcast_to(asleep, (S, R)).copy()
    if first_part:
        there[NOT_YET][0] = False
    for name in ("W_distinct_rows", "nonfinite_sample", "nan_samples", "inf_samples"):
        there[name] = ~np.isnan(columns[name])
    if first_part:
        there["W_distinct_rows"][0] |= first.column("W_distinct_rows")[1][0]
    told = {"step": np.repeat(steps, R), "backward": np.zeros(S * R, np.int32)}
    table: dict[str, Any] = {name: pa.array(x) for name, x in told.items()}
    table["layer"] = pa.array(np.tile(names, S), pa.string())
    table["call"] = pa.array(np.zeros(S * R, np.int32))
    for name in COLUMNS:
        table[name] = pa.array(columns[name].ravel(), mask=~there[name].ravel())
    ways: list[Any] = [edges[row][i] if row in edges else None for i in range(S) for row in range(R)]
    table["edge_gain"] = pa.array(ways, pa.list_(pa.float64()))
    table["gap_gain"] = pa.nulls(S * R, pa.list_(pa.float64()))
    return pa.table([table[field.name] for field in ROWS], schema=ROWS)


def _missing(first: Trace, last: int) -> list[Missing]:
    """What is missing at the first step is so in all; but for what the first batch alone cannot tell."""
    return [m if m.column == NOT_YET else Missing(m.layer, m.call, m.column, m.from_step, last, m.reason)
            for m in first.missing]  # fmt: skip


def samples(part: Trace, columns: Sequence[str], losses: Sequence[float], begun: int) -> Iterator[Sample]:
    """A part as samples, of some columns: what a dashboard is given.

    Args:
        part: of a trace, with its steps table.
        columns: of the rows.
        losses: of every step from ``begun`` on.
        begun: the first step that no earlier part told.
    """
    R, told = len(part.layers), 0
    kept = [*(c for c in columns if c in COLUMNS), "edge_gain", "gap_gain"]
    values = {name: part.table[name].to_pylist() for name in kept}
    rates = dict(zip(part.steps_table["step"].to_pylist(), part.steps_table["learning_rate"].to_pylist(), strict=True))
    for i, step in enumerate(part.sampled_steps.tolist()):
        rows = [
            (0, row, {name: x[i * R + row] for name, x in values.items() if x[i * R + row] is not None})
            for row in range(R)
        ]
        upto = min(step + 1 - begun, len(losses))
        yield Sample(step, part.layers, rows, [(begun + j, losses[j]) for j in range(told, upto)], rates.get(step))
        told = upto
