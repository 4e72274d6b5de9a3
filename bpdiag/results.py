"""What the jobs of a sweep came to: one row each, in results.parquet and results.csv, written anew as each job ends."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bpdiag import diagnosis
from bpdiag.config import Config, Expectation, UsageError, choose, flat
from bpdiag.diagnosis import Finding
from bpdiag.diagnosis.finding import percent
from bpdiag.tables import replace
from bpdiag.trace import Trace

FLOWS = ("vanishing", "exploding")
VERDICTS = ("lives", "weakened", "dies", "dies later", "blows up", "not finite")


@dataclass(frozen=True)
class Outcome:
    """What a sweep's tables need of one run: little, so that a thousand are little."""

    test_accuracy: float
    train_loss: float
    gain_per_layer: float  # of the hidden layers at the first step
    decades_first_layer: float  # at the last step
    verdict: str  # one of VERDICTS
    told: str  # the verdict in half a line
    kind: str  # of the first finding; empty without one
    cause: str
    findings: int
    steps: int
    seconds: float
    config: dict[str, Any] = field(default_factory=dict)  # dotted key -> value

    @classmethod
    def of(
        cls, trace: Trace, findings: Sequence[Finding], metrics: dict[str, Any], config: dict[str, Any] | None = None
    ) -> Outcome:
        """The outcome of a trace that was judged."""
        summary = diagnosis.summarize(trace, findings)
        return cls(
            test_accuracy=metrics["test_accuracy"],
            train_loss=metrics["train_loss"],
            gain_per_layer=summary["first"]["gain_per_layer"],
            decades_first_layer=summary["decades_first_layer"],
            verdict=summary["verdict"],
            told=half_a_line(summary["verdict"], findings),
            kind=findings[0].kind if findings else "",
            cause=findings[0].cause if findings else "",
            findings=len(findings),
            steps=metrics["steps"],
            seconds=metrics["seconds"],
            config=dict(config or {}),
        )


def half_a_line(word: str, findings: Sequence[Finding]) -> str:
    """A verdict in half a line: lives, or the kind, the cause and its share."""
    if not findings:
        return word
    finding = findings[0]
    share = finding.evidence.get(f"share_{finding.cause}", math.nan)
    cause = f" by {finding.cause}" + (f" {percent(share)}" if share == share else "") if finding.kind in FLOWS else ""
    return f"{finding.kind}{cause}" + (" (passed)" if word == "weakened" else "")


@dataclass(frozen=True)
class Row:
    """One job: what was asked of it, where it lies, what it came to or why it failed."""

    overrides: dict[str, str]
    folder: str
    outcome: Outcome | None
    error: str = ""

    def flat(self) -> dict[str, Any]:
        """Column -> value: the run's whole configuration (of a failed job its overrides), then its outcome."""
        told = dataclasses.asdict(self.outcome) if self.outcome else {}
        config = told.pop("config", {}) or self.overrides
        told.pop("told", None)
        status = "done" if self.outcome else "failed"
        return {**config, "run": self.folder, "status": status, "error": self.error, **told}


@dataclass(frozen=True)
class Checked:
    """An expectation beside what was measured."""

    expectation: Expectation
    values: list[Any]  # of the jobs it is about, or the one over them all
    holds: bool | None  # None: no job was of that kind, or too few

    def __str__(self) -> str:
        e = self.expectation
        of = f"{e.over} of " if e.over else ""
        asked = f"{of}{e.what} {e.equals}" + (f" ± {percent(e.within)}" if e.within else "")
        keys = [pair.partition("=") for pair in e.where.split()]
        short = " ".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in keys)
        about = f" where {short}" if short else ""
        return f"{asked}{about}: measured {self.measured}" + (f" ({e.source})" if e.source else "")

    @property
    def measured(self) -> str:
        """The values in a few words: a range of numbers, the words there were."""
        if not self.values:
            return "nothing, no job was of that kind"
        if self.holds is None:
            return f"no {self.expectation.over}: it needs {LEAST[self.expectation.over]}, all finite"
        if all(isinstance(v, int | float) for v in self.values):
            low, high = min(self.values), max(self.values)
            return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        return ", ".join(sorted({str(v) or "none" for v in self.values}))


OVER: dict[str, Callable[[Sequence[float]], float]] = {"mean": statistics.fmean, "spread": statistics.stdev}
LEAST = {"mean": "a number", "spread": "two numbers or more"}


def require(expectations: Sequence[Expectation]) -> None:
    """Every expectation is about a column there will be, over all jobs in a known way: asked before the first job.

    Raises:
        UsageError: One is not; the message names the nearest.
    """
    columns = [*flat(Config()), *(f.name for f in dataclasses.fields(Outcome) if f.name not in ("told", "config"))]
    for expectation in expectations:
        choose("expect.what", expectation.what, columns)
        if expectation.over:
            choose("expect.over", expectation.over, OVER)
        for pair in expectation.where.split():
            choose("expect.where", pair.partition("=")[0], columns)
        numeric = expectation.over or expectation.within or expectation.what in _numeric()
        if numeric and not _is_number(expectation.equals):
            raise UsageError(f"expect.equals={expectation.equals!r}: {expectation.what} is a number")
        if expectation.what == "verdict":
            choose("expect.equals", expectation.equals, VERDICTS)


def _numeric() -> list[str]:
    """Columns that hold numbers."""
    kept = [f.name for f in dataclasses.fields(Outcome) if str(f.type) in ("float", "int")]
    return [*kept, *(key for key, value in flat(Config()).items() if type(value) in (int, float))]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _over(way: str, values: Sequence[Any]) -> float:
    """The mean or the spread; nan for too few, or where one is no finite number."""
    numbers = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return OVER[way](numbers) if len(numbers) == len(values) >= 1 + (way == "spread") else math.nan


def check(expectations: Sequence[Expectation], rows: Sequence[Row]) -> list[Checked]:
    """Each expectation against the finished jobs it is about; it holds if it holds for every one of them."""
    told = []
    for expectation in expectations:
        pairs = dict(pair.split("=", 1) for pair in expectation.where.split())
        flats = [row.flat() for row in rows if row.outcome is not None]
        values = [f.get(expectation.what) for f in flats if all(str(f.get(k)) == v for k, v in pairs.items())]
        open_still = not values
        if values and expectation.over:
            number = _over(expectation.over, values)
            values, open_still = [number], math.isnan(number)
        holds = None if open_still else all(_meets(value, expectation) for value in values)
        told.append(Checked(expectation, values, holds))
    return told


def _meets(value: Any, expectation: Expectation) -> bool:
    if not isinstance(value, int | float):
        return str(value) == expectation.equals
    wanted = float(expectation.equals)
    return math.isfinite(value) and abs(value - wanted) <= expectation.within * abs(wanted) + 1e-12


def write(rows: Sequence[Row], folder: Path) -> None:
    """results.parquet and results.csv in ``folder``, each written aside and renamed; nan and infinity stay numbers."""
    flat = [row.flat() for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    table = pa.table({name: _column([row.get(name) for row in flat]) for name in columns})

    def as_csv(aside: Path) -> None:
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(flat)

    replace(folder / "results.parquet", lambda aside: pq.write_table(table, aside))
    replace(folder / "results.csv", as_csv)


def _column(values: list[Any]) -> pa.Array:
    """Values of one type as they are; of several (a failed job's are text) as text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and kinds != {int}:
        return pa.array([None if value is None else float(value) for value in values])
    return pa.array(values if len(kinds) <= 1 else [None if value is None else str(value) for value in values])
