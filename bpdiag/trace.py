"""What was measured of a run: named columns over (step, backward, layer, call), no tensors.  The project's waist.

Everything that measures ends in a ``Trace``, everything that judges or shows begins with one.  On disk it is a folder:

    part-NNNNN.parquet    one row per (step, backward, layer, call), one column per ``tensor_statistic``
    steps-NNNNN.parquet   one row per step: the loss (every step), the learning rate (sampled steps)
    missing.parquet       (layer, call, column, from_step, to_step, reason): why a null is null
    meta.json             schema version, the layer table, the optimizer, the horizon, the provenance of the numbers

Each file is written aside and renamed, so that a reader never meets a torn one and a kill loses at most the last
unwritten part.  A null is missing and has a reason; it is never written as 0.

Needs numpy and pyarrow, never torch.
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bpdiag import sketch, tables
from bpdiag.config import UsageError, says_yes

T = TypeVar("T")
SCHEMA = 1
KEYS = ("step", "backward", "layer", "call")

# column: what it holds, and where.  z is what a module that is no activation gives out, a what an activation gives out.
COLUMNS: dict[str, str] = {
    "z_norm": "l2 norm of the output of a layer that is no activation, over all elements, batch included",
    "z_rms": "the same per element: norm / sqrt(number of elements)",
    "z_cosine": "mean cosine of two samples' z, uncentred; weight layers only",
    "a_norm": "l2 norm of an activation's output (on the weight layer's row when the activation is a function call)",
    "a_rms": "the same per element",
    "a_saturated_fraction": "share of elements with |slope| under 5 % of the activation's largest",
    "a_dead_fraction": "share of units with slope exactly 0 for every sample of the last sampled batches",
    "slope_rms": "rms of the activation's slope, elementwise",
    "x_norm": "l2 norm of a layer's input, where that is no watched output: the data, what a function gave",
    "x_rms": "the same per element",
    "g_z_norm": "l2 norm of dL/dz",
    "g_z_rms": "the same per element",
    "g_a_norm": "l2 norm of dL/da",
    "g_a_rms": "the same per element",
    "W_rms": "rms of the layer's weight before the step",
    "W_distinct_rows": "share of W's rows that differ from each other, on the first sample and while under a half",
    "g_W_norm": "l2 norm of dL/dW as the optimizer meets it",
    "g_W_raw_norm": "the same as the backward left it, before clipping; a known scaler's factor divided out",
    "g_W_stale_norm": "l2 norm of what .grad held when the step's first backward came to it; 0 where it was cleared",
    "dW_rms": "rms of W after the step - W before it",
    "dW_rounded_fraction": "share of a half-precision W's elements with a gradient that the step did not change",
    "update_ratio": "dW_rms / W_rms",
    "forward_gain": "z_rms over that of the weight layer below (x_rms for the first)",
    "backward_gain": "G = |g_z| / |g_z of the next weight layer|, l2 norms; < 1 vanishes",
    "weight_factor": "w = |g_a| / |g_z of the next weight layer|: what the next layer's weights do",
    "slope_factor": "s = |g_z| / |g_a|: what the activation does;  G = w s",
    "decades": "D = log10(|g_z| / |g_z of the last weight layer|)",
    "nonfinite_sample": "index in the batch (first dimension) of the one sample whose numbers in this call are not "
    "finite: of its input, else its output, else its cotangent; null where all are finite or no sample is alone in it",
    "nan_samples": "how many samples of the batch hold a nan, of the same tensor; null where all are finite",
    "inf_samples": "how many hold an infinity and no nan, or too large a norm for a double; null likewise",
}


# columns of the steps table: what a loss of torch's own compares the output with, on sampled steps
TARGET = {
    "target_rms": "rms of a target of numbers",
    "target_spread": "their standard deviation",
    "target_lowest": "the least of them",
    "target_highest": "the greatest",
    "target_class": "the most frequent class of a batch",
    "target_class_share": "its share of the batch",
}


class TraceError(UsageError):
    """A folder holds no readable trace; the message says what was looked for and where."""


@dataclass(frozen=True)
class Layer:
    """One call of one module, or a sum of no module in which ways meet (kind add or sub): a line of the layer table."""

    name: str  # qualified name; "" for a model that is itself a leaf; "f+" for the sum that adds f's output
    call: int  # 0 for its first call in a forward pass
    kind: str  # linear, conv2d, relu, ...: the module's class in lower case, or the rule's name
    shape: tuple[int, ...] = ()  # of the output, batch first
    parents: tuple[int, ...] = ()  # indices of the watched layers whose outputs it was computed from
    next: int | None = None  # the next weight layer, where the way there does not fork
    via: tuple[int, ...] = ()  # the watched layers on that way
    fan_in: int | None = None  # of a weight layer
    units: int | None = None  # of a weight layer: N_out, or channels
    activation: str | None = None  # the rule whose slope this row carries
    largest_slope: float | None = None
    r: float | None = None  # 1/sqrt(critical weight variance), see rules.activation
    window: int = 0  # sampled batches that a_dead_fraction looks back on
    dtype: str = "float32"  # of the output
    # autograd's names, without Backward, of what stands between its parents and its output; how, not what it computes
    ops: tuple[str, ...] = field(default=(), compare=False)
    gap: tuple[tuple[str, ...], ...] = ()  # for each parent, operations of no module on the way from it, as they ran

    @property
    def key(self) -> str:
        """``name#call``."""
        return f"{self.name}#{self.call}"

    @property
    def short(self) -> str:
        """``name``; from its second call on ``name#call``."""
        return self.key.removesuffix("#0")

    @property
    def title(self) -> str:
        """How it is called in a sentence: its name; where that is a mere number, with its kind.

        Example:
            >>> Layer("linear1", 0, "linear").title, Layer("4", 1, "linear").title
            ('linear1', '4#1 (linear)')
        """
        name = self.short
        return name if any(c.isalpha() for c in self.name) else f"{name} ({self.kind})"

    @property
    def is_weight_layer(self) -> bool:
        """Whether it multiplies by a weight matrix: what depth counts."""
        return self.fan_in is not None


@dataclass(frozen=True)
class Missing:
    """Why a column is null for a layer over a range of sampled steps, both ends included."""

    layer: str
    call: int
    column: str
    from_step: int
    to_step: int
    reason: str


@dataclass
class Sample:
    """All that one sampled step brought: what a sink is given."""

    step: int
    layers: Sequence[Layer]  # the whole table so far
    rows: list[tuple[int, int, dict[str, Any]]]  # (backward, index into layers, column -> value)
    losses: list[tuple[int, float]]  # of all steps since the last sample
    learning_rate: float | None = None
    missing: list[tuple[int, str, str]] = field(default_factory=list)  # (index into layers, column, reason)
    # (index into layers, tensor, [low, high, not finite, counts ...]), where asked for; for a dashboard, not kept
    histograms: list[tuple[int, str, list[float]]] = field(default_factory=list)
    loss_scale: float | None = None  # what the cotangents were divided by; None: unknown, they are as delivered
    skipped: Sequence[int] = ()  # steps since the last sample that a gradient scaler skipped
    target: dict[str, float] = field(default_factory=dict)  # what the loss compares with, by the names of TARGET


class Sink(Protocol):
    """Where samples go: a trace folder, a dashboard."""

    def write(self, sample: Sample) -> None:
        """Take one sample."""

    def close(self) -> None:
        """Write what is pending; called once, also after an exception."""


@dataclass
class Trace:
    """A run's measurements in memory.

    ``table`` has KEYS, every column of COLUMNS (float64, null where missing), edge_gain and gap_gain, one number for
    each of the layer's ``parents`` (see ``edges``, ``gaps``); ``steps`` has step, loss and learning_rate; ``meta`` has
    what a judge must know: optimizer, planned_steps, every, provenance.
    """

    table: pa.Table
    steps_table: pa.Table
    layers: list[Layer]
    missing: list[Missing]
    meta: dict[str, Any]

    def __repr__(self) -> str:
        return f"Trace({sketch.words(self)}; diagnose(trace) judges it)"

    def _repr_html_(self) -> str:
        """The profile of the last step without a nan, for a notebook's cell."""
        return sketch.trace(self) or f"<pre>{html.escape(repr(self))}</pre>"

    @classmethod
    def build(
        cls,
        layers: Sequence[Layer],
        samples: Iterable[Sample],
        meta: dict[str, Any] | None = None,
    ) -> Trace:
        """A trace from samples, as a recorder or a test types them."""
        writer = TraceWriter(meta=meta)
        for sample in samples:
            writer.write(dataclasses.replace(sample, layers=layers))
        trace = writer.snapshot()
        trace.layers = trace.layers or list(layers)
        return trace

    @classmethod
    def load(cls, folder: str | os.PathLike[str], columns: Sequence[str] | None = None, steps: Any = None) -> Trace:
        """The trace of a run folder (or of the ``trace`` folder in it).

        Of COLUMNS those in ``columns`` are read, the others are null; of the sampled steps ``steps``; None: all.

        Raises:
            TraceError: There is no trace, or a file of it cannot be read.
        """
        with _damage_told(Path(folder)):
            return cls.joined(cls.parts(folder, columns, steps))

    @classmethod
    def parts(
        cls, folder: str | os.PathLike[str], columns: Sequence[str] | None = None, steps: Any = None
    ) -> Iterator[Trace]:
        """What ``load`` reads, file by file, one at least: to reduce what does not fit, or is not wanted, at once.

        A part's table lacks the columns that were not asked for.
        """
        here = _trace_in(Path(folder))
        with _damage_told(here):
            # listed before the layer table is read: a run still going on only adds to it
            files, told = (sorted(here.glob(f"{kind}-*.parquet")) for kind in ("part", "steps"))
            every = tables.joined(STEPS, [tables.read(path, ("step",)) for path in told])
            gaps = [
                Missing(**line) for path in here.glob("missing.parquet") for line in pq.read_table(path).to_pylist()
            ]
            meta = dict(json.loads((here / "meta.json").read_text()))
            schema, lacking = meta.pop("schema", None), meta.pop("rows", 0)
            layers = [_layer(line) for line in meta.pop("layers")] if schema == SCHEMA else []
        if schema != SCHEMA:
            raise TraceError(f"{here}: schema {schema}; this version reads schema {SCHEMA}")
        nothing = cls(ROWS.empty_table(), every, layers, gaps, meta)
        if not files:
            yield nothing
        for path in files:
            with _damage_told(here):
                part = dataclasses.replace(nothing, table=tables.read(path, KEYS, columns))
            lacking -= part.table.num_rows
            yield part if steps is None else part.only(steps)
        if lacking > 0:
            raise TraceError(f"{here}: damaged: a part-NNNNN.parquet is gone or was cut short")

    @classmethod
    def joined(cls, parts: Iterable[Trace]) -> Trace:
        """Parts of one trace as a whole one."""
        first, *others = parts
        return dataclasses.replace(first, table=tables.joined(ROWS, [first.table, *(part.table for part in others)]))

    def only(self, steps: Any) -> Trace:
        """The same of these sampled steps."""
        kept = pa.compute.is_in(self.table["step"], pa.array(steps, pa.int64()))
        return dataclasses.replace(self, table=self.table.filter(kept))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the trace folder ``folder/trace``; returns it.

        Raises:
            TraceError: There is one already: two runs must not be mixed.
        """
        here = _new_folder(folder)
        tables.write(self.table, here / "part-00000.parquet")
        tables.write(self.steps_table, here / "steps-00000.parquet")
        _write_missing(self.missing, here)
        _write_meta(self.meta, self.layers, here)
        return here

    def to_arrow(self) -> pa.Table:
        """The rows, as a pyarrow table."""
        return self.table

    def to_pandas(self) -> Any:
        """The rows, as a pandas data frame (pandas is optional)."""
        return self.table.to_pandas()

    @property
    def sampled_steps(self) -> np.ndarray:
        """(S,) the steps measured, ascending."""
        told = self.table["step"].to_numpy()
        return self.once("steps", lambda: np.unique(told[np.diff(told, prepend=-1) != 0]))

    @property
    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and losses, (T,) each, of every step that told its loss."""
        steps = self.steps_table.filter(pa.compute.is_valid(self.steps_table["loss"]))
        return steps["step"].to_numpy(), steps["loss"].to_numpy()

    @property
    def skipped(self) -> np.ndarray:
        """(S,) bool: the sampled steps that a gradient scaler skipped."""
        told = self.steps_table.filter(pa.compute.is_valid(self.steps_table["skipped"]))["step"].to_numpy()
        return np.isin(self.sampled_steps, told)

    def told(self, name: str) -> np.ndarray:
        """(S,) a number of the steps table, as its learning rate, at each sampled step; nan where it is not known."""
        known = self.once("told", lambda: {s: i for i, s in enumerate(self.steps_table["step"].to_pylist())})
        column = self.steps_table[name].cast(pa.float64()).to_numpy()
        return np.array([column[known[s]] if s in known else np.nan for s in self.sampled_steps.tolist()], float)

    def value(self, column: str, row: int, at: int) -> float | None:
        """Of layer ``row``, the ``at``-th sampled step, the first backward; None where it is missing."""
        values, there = self.column(column)
        return float(values[at, row]) if there[at, row] else None

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column as (S, L) float64 and whether it was measured, (S, L) bool; S sampled steps, L lines of the table.

        Of several forward passes in one step the first is taken.  Where not measured the value is nan.
        """
        return self.once(("column", name), lambda: self._column(name))

    def edges(self, at: int) -> dict[tuple[int, int], float]:
        """(reader, parent) -> |v| / |g|: what that edge of the graph carries of the reader's own cotangent.

        Of the ``at``-th sampled step and its first backward, where measured: the edges of rows that read a place which
        others read too.  Where the parent's output went through a function first, v is meant behind it.
        """
        return self._by_parent("edge_gain", at)

    def gaps(self, at: int) -> dict[tuple[int, int], float]:
        """(reader, parent) -> |v| / |g_x|: what a gap passes on of the cotangent that the reader sends into it.

        Of the ``at``-th sampled step and its first backward, where measured.  A gap is what functions compute between
        two layers, named by ``Layer.gap``; one that only moves numbers about (view, transpose) passes on all, and is
        not measured.
        """
        return self._by_parent("gap_gain", at)

    def _by_parent(self, column: str, at: int) -> dict[tuple[int, int], float]:
        (steps, lines), rows = self.once("places", self._places)
        here = np.flatnonzero(steps == at)
        told = self.table[column].combine_chunks().take(rows.take(pa.array(here))).to_pylist()
        return {
            (int(line), parent): gain
            for line, gains in zip(lines[here], told, strict=True)
            for parent, gain in zip(self.layers[line].parents, gains or (), strict=False)
            if gain is not None
        }

    def _column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        (steps, lines), rows = self.once("places", self._places)
        shape = height, width = len(self.sampled_steps), len(self.layers)
        column = self.table[name].combine_chunks()
        if len(rows) < len(column):
            column = column.take(rows)
        told, known = (x.to_numpy(zero_copy_only=False) for x in (column, column.is_valid()))
        if len(lines) == height * width and self.once("in order", lambda: (np.diff(steps * width + lines) == 1).all()):
            return told.reshape(shape), known.reshape(shape)
        values, there = np.full(shape, np.nan), np.zeros(shape, bool)
        values[steps, lines], there[steps, lines] = told, known
        return values, there

    def _places(self) -> tuple[tuple[np.ndarray, np.ndarray], pa.Array]:
        """Where each first-pass row of the table belongs in an (S, L) array, and its number."""
        first = np.flatnonzero(self.table["backward"].to_numpy() == 0)
        steps = np.searchsorted(self.sampled_steps, self.table["step"].to_numpy()[first])
        names = self.table["layer"].combine_chunks().dictionary_encode()
        code = {name: i for i, name in enumerate(names.dictionary.to_pylist())}
        calls = self.table["call"].to_numpy()[first]
        index = np.zeros((max(len(code), 1), 1 + max((layer.call for layer in self.layers), default=0)), int)
        for i, layer in enumerate(self.layers):
            if layer.name in code:
                index[code[layer.name], layer.call] = i
        return (steps, index[names.indices.to_numpy()[first], calls]), pa.array(first)

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """``compute()``, remembered under ``key``: a trace does not change."""
        kept = self.__dict__.setdefault("_once", {})
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    def weight_layers(self) -> list[int]:
        """Indices of the weight layers in execution order: layer 1, ..., layer L."""
        return [i for i, layer in enumerate(self.layers) if layer.is_weight_layer]


ROWS = pa.schema(
    [("step", pa.int64()), ("backward", pa.int32()), ("layer", pa.string()), ("call", pa.int32())]
    + [(name, pa.float64()) for name in COLUMNS]
    + [(name, pa.list_(pa.float64())) for name in ("edge_gain", "gap_gain")]
)
_NUMBERS = ("loss", "learning_rate", "loss_scale")
STEPS = pa.schema(
    [
        ("step", pa.int64()),
        *((name, pa.float64()) for name in (*_NUMBERS, *TARGET)),
        ("skipped", pa.bool_()),  # true or null
    ]
)
_TOLD = {"layer": pa.string(), "call": pa.int32(), "column": pa.string()}
_MISSING = pa.schema({**_TOLD, "from_step": pa.int64(), "to_step": pa.int64(), "reason": pa.string()})


class TraceWriter:
    """The sink that keeps a trace: in ``folder/trace`` as it grows, or in memory.

    With a folder, memory stays flat: a part is written every ``part_samples`` samples or ``part_seconds`` seconds.

    Raises:
        TraceError: ``folder/trace`` exists: two runs must not be mixed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        meta: dict[str, Any] | None = None,
        part_samples: int = 64,
        part_seconds: float = 15.0,
    ) -> None:
        self.meta = dict(meta or {})
        self.layers: list[Layer] = []
        self.part_samples, self.part_seconds = part_samples, part_seconds
        self._rows: list[dict[str, Any]] = []
        self._steps: dict[int, dict[str, Any]] = {}
        self._kept: tuple[list[pa.Table], list[pa.Table]] = ([], [])
        self._missing: dict[tuple[str, int, str, str], list[tuple[int, int]]] = {}
        self._samples, self._parts, self._written = 0, 0, time.monotonic()
        self._last_sampled: int | None = None
        self._told: list[Missing] = []  # with the parts that were appended
        self._total = 0  # rows written
        self.folder = None
        pa.array([])  # at its first list pyarrow imports pandas, if it is there: now, not in the middle of a training
        if folder is not None:
            self.folder = _new_folder(folder)
            _write_meta(self.meta, self.layers, self.folder)

    def write(self, sample: Sample) -> None:
        """Take one sample; write a part if enough has come together."""
        grown = len(sample.layers) != len(self.layers) or any(
            new is not old for new, old in zip(sample.layers, self.layers, strict=True)
        )
        if grown:
            self.layers = list(sample.layers)
            if self.folder:
                _write_meta(self.meta, self.layers, self.folder)
        for backward, index, values in sample.rows:
            layer = self.layers[index]
            keys = {"step": sample.step, "backward": backward, "layer": layer.name, "call": layer.call}
            self._rows.append(keys | values)
        for step, loss in sample.losses:
            self._steps.setdefault(step, {"step": step})["loss"] = loss
        told = {"learning_rate": sample.learning_rate, "loss_scale": sample.loss_scale, **(sample.target or {})}
        if any(x is not None for x in told.values()):
            self._steps.setdefault(sample.step, {"step": sample.step}).update(told)
        for step in sample.skipped:
            self._steps.setdefault(step, {"step": step})["skipped"] = True
        for index, column, reason in sample.missing:
            layer = self.layers[index]
            spans = self._missing.setdefault((layer.name, layer.call, column, reason), [])
            if spans and spans[-1][1] in (self._last_sampled, sample.step):  # goes on, or another pass says the same
                spans[-1] = (spans[-1][0], sample.step)
            else:
                spans.append((sample.step, sample.step))
        self._last_sampled = sample.step
        self._samples += 1
        if self._samples >= self.part_samples or time.monotonic() - self._written > self.part_seconds:
            self._part()

    def close(self) -> None:
        """Write the last part, the reasons for what is missing, the layer table."""
        self._part()
        if self.folder:
            _write_meta(self.meta | {"rows": self._total}, self.layers, self.folder)

    def snapshot(self) -> Trace:
        """All that was taken so far."""
        rows, steps = self._pending()
        stored = Trace.load(self.folder) if self.folder else None
        parts, kept_steps = ([stored.table], [stored.steps_table]) if stored else self._kept
        table, steps_table = tables.joined(ROWS, [*parts, rows]), tables.joined(STEPS, [*kept_steps, steps])
        return Trace(table, steps_table, list(self.layers), self._spans(), dict(self.meta))

    def _pending(self) -> tuple[pa.Table, pa.Table]:
        return (
            pa.Table.from_pylist(self._rows, schema=ROWS),
            pa.Table.from_pylist([self._steps[step] for step in sorted(self._steps)], schema=STEPS),
        )

    def append(self, part: Trace) -> None:
        """Many samples as one part, with all that is missing so far: from whoever measures many runs at once."""
        if self.folder and self.layers != part.layers:
            _write_meta(self.meta, part.layers, self.folder)
        self.layers, self._told = part.layers, part.missing
        self._keep(part.table, part.steps_table)

    def _part(self) -> None:
        self._keep(*self._pending())

    def _keep(self, rows: pa.Table, steps: pa.Table) -> None:
        if self.folder:
            self._total += rows.num_rows
            if rows.num_rows:
                tables.write(rows, self.folder / f"part-{self._parts:05d}.parquet")
            if steps.num_rows:
                tables.write(steps, self.folder / f"steps-{self._parts:05d}.parquet")
            _write_missing(self._spans(), self.folder)
        else:
            self._kept[0].append(rows)
            self._kept[1].append(steps)
        self._rows, self._steps, self._samples = [], {}, 0
        self._parts, self._written = self._parts + 1, time.monotonic()

    def _spans(self) -> list[Missing]:
        found = [
            Missing(name, call, column, first, last, reason)
            for (name, call, column, reason), spans in self._missing.items()
            for first, last in spans
        ]
        return [*self._told, *found]


def write_json(path: Path, content: Any) -> None:
    """JSON with non-finite numbers as the strings NaN, Infinity, -Infinity (JSON has none); written aside, renamed."""
    text = json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False)
    tables.replace(path, lambda aside: aside.write_text(text + "\n"))


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: dataclasses as objects, non-finite numbers as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return "NaN" if np.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _trace_in(run: Path) -> Path:
    """The trace folder of a run folder, or itself."""
    if not says_yes(run.is_dir):
        raise TraceError(f"{run}: {'a file, not a run folder' if says_yes(run.exists) else 'no such folder'}")
    here = run / "trace" if (run / "trace").is_dir() else run
    if not (here / "meta.json").is_file():
        inside = next(chain(run.glob("*/trace/meta.json"), run.glob("*/*/trace/meta.json")), None)
        if inside:
            raise TraceError(f"{run}: a folder of runs, not a run; take one of them, as {inside.parent.parent}")
        raise TraceError(f"{run}: no trace here; a run folder holds trace/meta.json")
    return here


@contextmanager
def _damage_told(here: Path) -> Iterator[None]:
    """A file that cannot be read is a TraceError."""
    try:
        yield
    except TraceError:
        raise
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{here}: damaged: {str(error).splitlines()[0]}") from error


def _layer(line: dict[str, Any]) -> Layer:
    told: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in line.items()}
    return Layer(**{**told, "gap": tuple(map(tuple, told.get("gap", ())))})


def _new_folder(folder: str | os.PathLike[str]) -> Path:
    here = Path(folder) / "trace"
    try:
        here.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError) as error:
        there = "already holds a run" if isinstance(error, FileExistsError) else "is no folder"
        raise TraceError(f"{folder}: {there}; choose another folder or remove this one") from None
    return here


def _write_missing(missing: Sequence[Missing], folder: Path) -> None:
    if missing:
        table = pa.Table.from_pylist([dataclasses.asdict(m) for m in missing], schema=_MISSING)
        tables.write(table, folder / "missing.parquet")


def _write_meta(meta: dict[str, Any], layers: Sequence[Layer], folder: Path) -> None:
    write_json(folder / "meta.json", {"schema": SCHEMA, **meta, "layers": list(layers)})
