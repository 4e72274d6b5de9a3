"""What a run says in words: the layer table with bars in decades, the findings, a sweep's lines and its table.

Blue shrinks, orange grows, nothing is said by colour alone; colour is off when the output is no terminal or NO_COLOR
is set.
"""

from __future__ import annotations

import io
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bpdiag import diagnosis
from bpdiag.diagnosis import Finding, Profile
from bpdiag.diagnosis.finding import percent, power, real
from bpdiag.results import Checked, Outcome, Row
from bpdiag.trace import Trace

GLYPHS = {
    "lives": "●",
    "weakened": "◐",
    "dies": "▼",
    "dies later": "▽",
    "blows up": "▲",
    "not finite": "✕",
    "not measured": "–",
}
STYLES = {
    "lives": "default",
    "weakened": "blue",
    "dies": "bold blue",
    "dies later": "bold blue",
    "blows up": "bold yellow",
    "not finite": "bold magenta",
    "not measured": "dim",
}
HELD = {True: ("✓ as expected", "default"), False: ("✗ not so", "bold yellow"), None: ("– open", "dim")}
BAR = 24  # cells of the widest bar
DUST = 1e-9  # a variance below is 0 to all purposes
LARGE = 1e4  # numbers from here on are told by their decades


class _Trimmed(io.TextIOBase):
    """Standard output or error without the blanks that pad a table's lines: who reads a file or a pipe has no use."""

    def __init__(self, stderr: bool) -> None:
        self._stream = sys.stderr if stderr else sys.stdout

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream behind."""
        return self._stream.encoding

    def write(self, text: str) -> int:
        return self._stream.write(re.sub(r" +(?=\n)", "", text))

    def flush(self) -> None:
        self._stream.flush()


class _Console(Console):
    """Rich's, which lets a sweep go on when the reader of its lines has seen enough (``| head``)."""

    def on_broken_pipe(self) -> None:
        """Say nothing more; rich's own would end the program."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console(stderr: bool = False) -> Console:
    """Standard output (or error); 112 columns where it is no terminal and says no width."""
    out = _Console(stderr=stderr, highlight=False)
    if out.is_terminal:
        return out
    width = None if os.environ.get("COLUMNS") else 112
    return _Console(file=cast(IO[str], _Trimmed(stderr)), stderr=stderr, highlight=False, width=width)


# heading: (narrowest terminal that shows it, column, whose row)
COLUMNS = {
    "gain": (0, "backward_gain", "own"),
    "weights": (68, "weight_factor", "own"),
    "slopes": (68, "slope_factor", "own"),
    "saturated": (84, "a_saturated_fraction", "activation"),
    "dead": (84, "a_dead_fraction", "activation"),
    "update": (50, "update_ratio", "own"),
}


def layer_table(p: Profile, at: int, width: int = 112, band: Sequence[float] | None = None) -> Table:
    """One line per weight layer, output on top: what arrives, the gain of its step, who takes it, how it moves.

    ``band``: where the step is expected and not measured, the decades that each layer may be off.  A narrow terminal
    gets a shorter bar and fewer columns, never half a number.
    """
    shown = {heading: told for heading, told in COLUMNS.items() if width >= told[0]}
    if band is not None:
        shown.pop("dead", None)  # of several batches of a real run
    bar = BAR if width >= 96 else BAR // 2
    title = f"step {p.steps[at]}" + (", expected" if band is not None else "") + f"  (| is 1/T, T = {p.planned} steps)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    table.add_column("layer", no_wrap=True)
    table.add_column("decades", justify="right", no_wrap=True)
    banded = band is not None and width >= 50
    if banded:
        table.add_column("±", justify="right", no_wrap=True)
    table.add_column("of the output's gradient" if bar == BAR else "", no_wrap=True)
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    decades = p.decades[at]
    limit = -math.log10(p.planned)
    finite = decades[np.isfinite(decades)]
    deepest = max(abs(limit) * 1.2, float(np.abs(finite).max(initial=0)), 1.0)
    for row in reversed(range(len(p.lines))):
        line = p.lines[row]
        layer = p.trace.layers[line]
        told = []
        for heading, (_, column, whose) in shown.items():
            value = _at(p.trace, column, at, [line, *layer.via] if whose == "activation" else [line])
            share = whose == "activation"
            told.append(percent(value) if share else _scientific(value) if heading == "update" else _number(value, 3))
        off = [_number(band[row], 1)] if band is not None and banded else []
        nothing = math.isnan(decades[row]) and p.trace.value("g_z_norm", line, at) == 0  # of nothing: 0 / 0
        drawn = _bar(-math.inf if nothing else decades[row], deepest, limit, bar)
        name = escape(_end_of(layer.title, width))
        table.add_row(name, _number(decades[row], 1), *off, drawn, *told)
    return table


def _end_of(name: str, width: int) -> str:
    """A name short enough for its table; its end tells more, from a dot on where one is near.

    Example:
        >>> _end_of("transformer.h.3.attn.c_attn", 112), _end_of("0123456789abcdef", 60)
        ('…h.3.attn.c_attn', '…56789abcdef')
    """
    room = max(12, width // 5)
    if len(name) <= room:
        return name
    end = name[1 - room :]
    dot = end.find(".") + 1
    return f"…{end[dot:] if dot <= room // 2 else end}"


def _at(trace: Trace, column: str, at: int, lines: Sequence[int]) -> float:
    values = (trace.value(column, i, at) for i in lines)
    return next((value for value in values if value is not None), math.nan)


def _bar(decades: float, deepest: float, limit: float, width: int) -> Text:
    """A bar as long as what is lost (█, blue) or gained (▒, orange), and the limit 1/T on its scale."""
    if math.isnan(decades):
        return Text("not measured", style="dim")
    if math.isinf(decades):
        return Text("exactly 0" if decades < 0 else "infinite", style="bold magenta")
    scale = width / deepest
    cells = round(abs(decades) * scale)
    mark = round(abs(limit) * scale)
    text = list(("█" if decades < 0 else "▒") * cells + " " * (max(width, cells) + 1 - cells))
    if cells <= mark < len(text):
        text[mark] = "|"
    return Text("".join(text), style="blue" if decades < 0 else "yellow")


def _number(x: float, digits: int) -> str:
    if math.isnan(x):
        return "–"
    if math.isinf(x):
        return "−inf" if x < 0 else "inf"
    return real(x + 0.0, digits) if 10**-digits <= abs(x) < LARGE or x == 0 or digits < 2 else _scientific(x)


def _scientific(x: float) -> str:
    return "–" if math.isnan(x) else "0" if x == 0 else f"{x:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def findings_text(findings: Sequence[Finding], summary: dict[str, Any]) -> Group:
    """The findings in words, each with its cause and remedy; or what the summary says of a healthy net."""
    if not findings:
        return Group(Text(f"{GLYPHS[summary['verdict']]} {summary['sentence']}"))
    told: list[Any] = []
    for finding in findings:
        word, where = diagnosis.verdict([finding]), _span(finding.layers)
        told.append(Text(f"{GLYPHS[word]} {finding.sentence}", style=STYLES[word]))
        body = Text(f"{finding.kind} by {finding.cause}", style="bold")
        body.append(f" ({finding.severity}), from step {finding.onset_step}", style="not bold")
        body.append(f", {where}." if where else ".", style="not bold")
        lines = [finding.why, f"Remedy: {finding.remedy}.", f"Expected: {finding.expected}."]
        told += [Padding(part, (0, 0, 0, 2)) for part in (body, *(Text(line) for line in lines if line))]
    return Group(*told)


def _span(layers: Sequence[str]) -> str:
    names = [name.removesuffix("#0") for name in layers]
    if len(names) > 3:
        return f"{len(names)} layers from {names[0]} to {names[-1]}"
    return ", ".join(names)


def report(trace: Trace, findings: Sequence[Finding], folder: str | os.PathLike[str] | None, out: Console) -> None:
    """A run's last words: the sentence, the layer table, the findings, where it lies."""
    p = diagnosis.profile(trace)
    summary = diagnosis.summarize(trace, findings)
    shown = np.flatnonzero(p.finite)
    if len(p.lines) and shown.size:
        out.print(layer_table(p, int(shown[-1]), out.width))
        first, last = summary["first"], summary["last"]
        theory = diagnosis.expected_gain(trace) if first["step"] == 0 else None
        told = f" (theory {diagnosis.with_band(*theory)})" if theory else ""
        out.print(
            f"gain per hidden layer: {_number(first['gain_per_layer'], 3)} at step {first['step']}{told}, "
            f"{_number(last['gain_per_layer'], 3)} at step {last['step']}"
        )
    out.print()
    out.print(findings_text(findings, summary))
    for note in diagnosis.notes(trace):
        out.print(Padding(Text(f"note: {note}", style="dim"), (0, 0, 0, 2)))
    if folder is not None:
        out.print()
        where_to_look(folder, out)


def forecast(trace: Trace, findings: Sequence[Finding], out: Console) -> None:
    """What theory expects of a run not begun: the sentence, the layer table, how deep it may be, what would mend it."""
    p, told = diagnosis.profile(trace), trace.meta["predicted"]
    out.print(findings_text(findings, diagnosis.summarize(trace, findings)))
    out.print()
    out.print(layer_table(p, 0, out.width, [told["spreads"] * x for x in told["decades_band"]]))
    if theory := diagnosis.expected_gain(trace):
        out.print(
            f"gain per hidden layer: {diagnosis.with_band(*theory)} (the draw of the weights, "
            f"{told['spreads']} standard deviations at most, and 1 %)"
        )
    out.print()
    for line in _bounds(told, p):
        out.print(Text(line), soft_wrap=True)  # a command is copied whole
    if told["caveat"]:
        out.print(f"  note: {told['caveat']}", style="dim")


def _bounds(told: dict[str, Any], p: Profile) -> Iterator[str]:
    """How deep such a net may be, and the critical variances with what they change."""
    most = f"{told['deepest']:,} layers" + (" or more" if told["deepest"] == told["looked_for"] else "")
    yield f"how deep   {most}: so far its first layer receives between 1/T and T times what the output sends"
    scales = told["scales"]
    if scales and math.isfinite(scales["trainable"]):
        yield (
            f"           what tells two pictures apart fades by e every {scales['xi_c']:.1f} layers (xi_c): it can be "
            f"learned through about {scales['trainable']:.0f}"
        )
    if there := told["critical"]:
        w, b = (f"{there[key]:.7g}" if there[key] > DUST else "0" for key in ("weight_variance", "bias_variance"))
        mends = there["verdict"] == "lives" != told["verdict"]
        command = f": bpdiag model.weight_variance={w} model.bias_variance={b}" if mends else ""
        yield f"critical   sigma_w^2 = {w}, sigma_b^2 = {b}{command}"
        gains = [_number(x["gain_per_layer"], 3) for x in (told, there)]
        decades = [_number(x["decades"][0], 1) for x in (told, there)]
        yield (
            f"           gain {gains[0]} -> {gains[1]}, decades of {p.title(0)} {decades[0]} -> {decades[1]}: "
            f"{GLYPHS[there['verdict']]} {there['verdict']}"
        )


def where_to_look(folder: str | os.PathLike[str], out: Console) -> None:
    """The folder and the command that shows it, each on a line of its own, to be copied whole."""
    out.print(Text(f"run folder   {folder}"), soft_wrap=True)
    out.print(Text(f"look closer  tensorboard --logdir {shlex.quote(str(folder))}"), soft_wrap=True)


def brief(run: Path, trace: Trace, findings: Sequence[Finding], out: Console) -> None:
    """One run among several: its name and its findings."""
    out.print(Text(str(run), style="bold"))
    out.print(Padding(findings_text(findings, diagnosis.summarize(trace, findings)), (0, 0, 1, 0)))


MOST_LOOKS = 24  # lines of the look before training


class Grid:
    """A sweep as it goes: one line per job, then one table; seeds of one cell become a mean and a spread."""

    def __init__(self, keys: Sequence[str], jobs: int, folder: Path) -> None:
        self.keys, self.jobs, self.folder = list(keys), jobs, folder
        self.told = 0
        self.out, self.err = console(), console(stderr=True)

    def begin(self) -> None:
        """Say what is coming."""
        names = ", ".join(_short(key) for key in self.keys)
        over = f" over {names}" if names else ""
        self.out.print(f"{self.jobs} job{'s' * (self.jobs != 1)}{over} -> {escape(str(self.folder))}")

    def look(self, rows: Sequence[tuple[str, float | None, float]]) -> None:
        """Before training: job, decades of the first layer as predicted (None: no theory covers it) and as measured."""
        shown = sorted(rows, key=lambda row: -abs(row[2]) if math.isfinite(row[2]) else -math.inf)[:MOST_LOOKS]
        of = f", the {len(shown)} furthest from 0 of {len(rows)}" if len(shown) < len(rows) else ""
        self.out.print(f"a look before training: decades of the first layer{of}", style="italic")
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("job", no_wrap=True)
        for heading in ("predicted", "measured"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, predicted, measured in shown if of else rows:
            expected = "–" if predicted is None else _number(predicted, 1)
            table.add_row(escape(name), expected, _number(measured, 1))
        self.out.print(table)
        self.out.print()

    def lost(self, jobs: int, how: str) -> None:
        """A process was killed while it trained so many jobs, which are tried again."""
        again = "its job is tried again" if jobs == 1 else f"its {jobs} jobs are tried again in halves"
        self.err.print(Text(f"a process {how}; {again}", style="bold yellow"), soft_wrap=True)

    def job(self, row: Row, seconds: float) -> None:
        """A job ended, or failed: said at once."""
        self.told += 1
        count = f"{self.told:>{len(str(self.jobs))}}/{self.jobs}  "
        if row.outcome is None:
            self.err.print(Text(f"{count}{self.name(row)}  FAILED: {row.error}", style="bold red"), soft_wrap=True)
            return
        verdict = row.outcome.verdict
        line = Text(f"{count}{self.name(row):<18}  accuracy {100 * row.outcome.test_accuracy:5.1f} %  ")
        line.append(f"{GLYPHS[verdict]} {row.outcome.told}", style=STYLES[verdict])
        line.append(f"  {seconds:.1f} s", style="dim")
        self.out.print(line)

    def end(
        self, rows: Sequence[Row], seconds: float, checked: Sequence[Checked] = (), page: Path | None = None
    ) -> None:
        """The table of what ended, in the order of the jobs, what was expected, the failures again, where to look."""
        failed = [row for row in rows if row.outcome is None]
        if len(failed) < len(rows):
            self.out.print()
            self.out.print(self._table(rows))
        if checked and rows:
            self.out.print("\nexpected")
        for one in checked if rows else ():
            mark, style = HELD[one.holds]
            self.out.print(Text(f"  {mark}: {one}", style=style))
        for row in failed:
            told = f"failed: {self.name(row)}: {row.error}\n        see {row.folder}/error.log"
            self.err.print(Text(told, style="red"), soft_wrap=True)
        self.out.print(f"\n{len(rows)} of {self.jobs} jobs in {seconds:.0f} s, {len(failed)} failed")
        where_to_look(self.folder, self.out)
        if page is not None:
            self.out.print(Text(f"open it      {page}"), soft_wrap=True)

    def name(self, row: Row) -> str:
        """A job's own values, of the keys that differ."""
        return " ".join(row.overrides.get(key, "") for key in self.keys)

    def _table(self, rows: Sequence[Row]) -> Table:
        keys = [key for key in self.keys if key != "seed"]
        cells: dict[tuple[str, ...], list[Outcome]] = {}
        for row in rows:
            if row.outcome is not None:
                cells.setdefault(tuple(row.overrides.get(key, "") for key in keys), []).append(row.outcome)
        seeds = max(map(len, cells.values()))
        wide = self.out.width >= 100
        lines: list[list[str | Text]] = []
        for cell, outcomes in cells.items():
            verdict, words = _verdict(outcomes)
            lines.append(
                [
                    *cell,
                    *([str(len(outcomes))] if seeds > 1 else []),
                    _spread([100 * o.test_accuracy for o in outcomes], 1, " %"),
                    _spread([o.gain_per_layer for o in outcomes], 3),
                    _spread([o.decades_first_layer for o in outcomes], 1),
                    Text(
                        f"{GLYPHS[verdict]} {words if wide else words.replace('vanishing by ', '')}",
                        style=STYLES[verdict],
                    ),
                ]
            )
        numbers = ("accuracy", "gain at start", "decades at end") if wide else ("accuracy", "gain", "D_1")
        headings = [*map(_short, keys), *(["seeds"] if seeds > 1 else []), *numbers, "verdict"]
        table = Table(box=None, pad_edge=False, header_style="dim")
        for i, heading in enumerate(headings):  # cells are kept whole but the verdict's; on a narrow screen a heading
            left = heading == "verdict" or (i < len(keys) and not heading.endswith(("depth", "width")))
            last = heading == "verdict"
            least = max(len(str(line[i])) for line in lines) if not last else None
            least = max(least, len(heading)) if least and wide else least
            table.add_column(
                heading, justify="left" if left else "right", no_wrap=not last or not wide, min_width=least
            )
        for line in lines:
            table.add_row(*(escape(told) if isinstance(told, str) else told for told in line))
        return table


def _verdict(outcomes: Sequence[Outcome]) -> tuple[str, str]:
    """The most frequent verdict and what is told of it; of several kinds all, with how many jobs had each."""
    kinds: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault((outcome.kind, outcome.cause), []).append(outcome)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    first = ordered[0][0]  # shares differ a little by seed
    if len(ordered) == 1:
        return first.verdict, first.told
    return first.verdict, ", ".join(f"{len(alike)} of {len(outcomes)} {alike[0].told}" for alike in ordered)


def _short(key: str) -> str:
    group, _, leaf = key.rpartition(".")
    return group.rpartition(".")[2] if leaf == "name" else leaf


def _spread(values: Sequence[float], digits: int, unit: str = "") -> str:
    """A value; of several the mean and, after ±, their standard deviation."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return _number(values[0], digits)
    mean = sum(finite) / len(finite)
    if len(values) == 1:
        return real(mean, digits) + unit
    spread = math.sqrt(sum((v - mean) ** 2 for v in finite) / max(len(finite) - 1, 1))
    short = f" ({len(values) - len(finite)} not finite)" if len(finite) < len(values) else ""
    return f"{real(mean, digits)} ± {spread:.{digits}f}{unit}{short}"


@contextmanager
def progress(out: Console) -> Iterator[Callable[[int, int, float, float, float], None]]:
    """While a run trains: a bar, its loss, how many are right, what reaches the first layer, the time to go.

    Nothing where the output is no terminal; a narrow one gets fewer of them, never half a number.
    """
    words = "[progress.description]{task.description}"
    bar = [BarColumn(20)] if out.width >= 90 else []
    columns: tuple[str | ProgressColumn, ...] = (
        words,
        *bar,
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        "to go",
    )
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as shown:
        task = shown.add_task("training", total=None)

        def tell(step: int, planned: int, loss: float, right: float, decades: float) -> None:
            arrives = "–" if math.isnan(decades) else power(decades)
            told = f"loss {loss:.3f}  right {percent(right)}"
            told += f"  first layer gets {arrives}" if out.width >= 70 else ""
            shown.update(task, total=planned, completed=step, description=told)

        yield tell


def metrics(told: dict[str, Any], out: Console) -> None:
    """One line of what the run reached."""
    stopped = f"; {told['stopped']}" if told["stopped"] else ""
    out.print(
        f"test accuracy {100 * told['test_accuracy']:.2f} %, training loss {told['train_loss']:.4g} "
        f"after {told['steps']} steps in {told['seconds']:.1f} s{stopped}"
    )


MOST_REMEDIES = 12  # lines of their table
REMEDY_VERDICTS = {"works": ("●", "bold"), "helps": ("◐", "default"), "does_not": ("–", "dim")}


def cure(told: Any, out: Console) -> None:
    """What was tried on copies, before and after at equal steps, and the change to make; nothing that did not work.

    ``told``: a ``Cure``; None says nothing.
    """
    if told is None:
        return
    if told.remedies:
        out.print()
        out.print(_remedies(told))
        if (more := len(told.remedies) - MOST_REMEDIES) > 0:
            out.print(f"and {more} more that were no better", style="dim")
    if (best := told.recommended) is not None:
        right = f", {percent(best.after['accuracy'])} right or more" if best.after["accuracy"] >= 0 else ""
        seeds = f"on {len(best.seeds)} seeds, after {best.steps} steps"
        out.print(Text(f"● {best.name} works: {seeds}, a loss of {_number(best.after['loss'], 2)} or less{right}."))
        change = " ".join(map(_quoted, best.overrides)) or best.change
        out.print(Padding(Text(f"add    {change}" if best.overrides else change, style="bold"), (0, 0, 0, 2)))
    elif told.remedies:
        out.print("None was seen to work on every seed, so none is recommended.")
    for note in told.notes:
        out.print(Padding(Text(f"note: {note}", style="dim"), (0, 0, 0, 2)))


def _quoted(override: str) -> str:
    """For a shell."""
    return f'"{override}"' if "'" in override else shlex.quote(override)


def _remedies(told: Any) -> Table:
    """One line for each that was tried, the recommended first."""
    title = f"remedies tried on copies, {len(told.remedies)} in {told.seconds:.0f} s: before → after, at equal steps"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    table.add_column("remedy")
    for heading in ("steps", "seeds", "decades", "loss", "accuracy"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for remedy in told.remedies[:MOST_REMEDIES]:
        glyph, style = REMEDY_VERDICTS[remedy.verdict]
        cells = [
            _from_to(remedy.before[name], remedy.after[name], digits, unit)
            for name, digits, unit in (("decades", 1, ""), ("loss", 2, ""), ("accuracy", 0, " %"))
        ]
        verdict = Text(f"{glyph} {remedy.verdict.replace('_', ' ')}", style=style)
        table.add_row(escape(remedy.name), str(remedy.steps), str(len(remedy.seeds)), *cells, verdict)
    return table


def _from_to(before: float, after: float, digits: int, unit: str) -> str:
    """Before → after; a number that is none is a dash."""
    if math.isnan(before) and math.isnan(after):
        return "–"
    one, other = (_number(100 * x if unit else x, digits) if x == x else "–" for x in (before, after))
    return f"{one} → {other}{unit}"


@contextmanager
def trying(out: Console) -> Iterator[Callable[[float, float, str], None]]:
    """A bar over the seconds allowed while remedies are tried; nothing where the output is no terminal."""
    columns = ("[progress.description]{task.description}", BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("trying remedies", total=None)
        yield lambda passed, allowed, name: bar.update(
            task, total=allowed, completed=passed, description=f"trying {escape(name)}"
        )
