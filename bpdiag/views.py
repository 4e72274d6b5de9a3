"""A run folder -> what the pictures need, as JSON: the tab in TensorBoard and the page are drawn from the same.

``overview`` reads summary.json and no trace, so that a thousand runs are told at once; ``detail`` lays one trace out:

    series[name]    C sampled steps x L weight layers, layer 1 (input side) first; log10 where ``SERIES`` says so
    peaks[name]     the same of what a map draws, where C < S: of each span the number farthest from 1 (of a share
                    or an update the largest), so that nothing that happened between two columns is skipped
    series.around   C x E: what each of the E ways around layers (``around``) carries, log10

S sampled steps are drawn in C columns; a column's ``series`` are those of one step of its span, the one in which the
gradient of the first layer that has one was farthest from the output's, so that the factors of a step still multiply.
A block is {"scale", "data"}: little-endian int16 in base64, value = integer * scale, and four integers that are no
numbers (``CODES``).  Strings from outside (names, settings) are data and nothing else.  Needs no torch.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bpdiag import bridge, diagnosis
from bpdiag.config import dotted
from bpdiag.trace import Trace, plain, write_json

SCHEMA = "bpdiag-view/1"
COLUMNS = 240  # steps drawn side by side
POINTS = 480  # of the loss curve
CODES = {"missing": -32768, "NaN": -32767, "-Infinity": -32766, "Infinity": 32767}
FULL = 32_000  # the integer of a block's largest number
STILL_RUNNING = 120.0  # seconds since a trace without a summary last grew
MOST_GAPS = 2_000
MOST_WAYS = 200
KEPT = "view.json"  # beside a long trace
# name: (column of the trace, log10 of it, whose row)
SERIES: dict[str, tuple[str, bool, str]] = {
    "decades": ("decades", False, "own"),
    "gain": ("backward_gain", True, "own"),
    "weight_factor": ("weight_factor", True, "own"),
    "slope_factor": ("slope_factor", True, "own"),
    "saturated": ("a_saturated_fraction", False, "activation"),
    "dead": ("a_dead_fraction", False, "activation"),
    "update_ratio": ("update_ratio", True, "own"),
    "z_rms": ("z_rms", True, "own"),
    "forward_gain": ("forward_gain", True, "own"),
    "g_W_norm": ("g_W_norm", True, "own"),
    "g_z_norm": ("g_z_norm", True, "own"),
}
# what is read of the steps drawn: also the ledger's
DRAWN = [column for column, _, _ in SERIES.values()]
DRAWN += ["W_rms", "slope_rms", "g_a_norm", "z_norm", "a_norm", "x_norm", "edge_gain"]
Block = tuple[np.ndarray, np.ndarray]  # (S, L) numbers and whether they are there
Blocks = dict[str, Block]
OWNERS = ("weights", "slopes", "alignment", "other")  # of the ledger: decades of the step above a layer
# what a map draws, and which of a span's numbers
MAPPED = {
    **dict.fromkeys(("decades", "gain", "weight_factor", "slope_factor", "z_rms"), "farthest"),
    **dict.fromkeys(("saturated", "dead", "update_ratio"), "largest"),
}


def find(folder: Path) -> list[Path]:
    """The run folders in ``folder``, itself among them, in natural order: a run holds trace/meta.json.

    Nothing inside a run is looked at, and no link is followed.
    """
    return sorted(_runs_in(str(folder)), key=_natural)


def _runs_in(folder: str) -> Iterator[Path]:
    try:
        inside = list(os.scandir(folder))
    except OSError:  # a folder that vanishes or may not be read while we look
        return
    if any(entry.name == "trace" for entry in inside) and os.path.isfile(os.path.join(folder, "trace", "meta.json")):  # noqa: PTH113, PTH118
        yield Path(folder)
        return
    for entry in inside:
        if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
            yield from _runs_in(entry.path)


def _natural(run: Path) -> list[str]:
    """A key that puts depth=5 before depth=10."""
    return [part.zfill(9) if part.isdigit() else part for part in re.split(r"(\d+)", str(run))]


def stamp(run: Path) -> float:
    """When anything of the run was last written: of an unchanged one nothing is read again."""
    files = ("trace", "trace/meta.json", "summary.json", "findings.json", "metrics.json")
    return max((_modified(run / name) for name in files), default=0.0)


def has_ended(run: Path) -> bool:
    """Whether it was judged, which is the last that a run does."""
    return (run / "summary.json").is_file()


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def overview(run: Path, name: str) -> dict[str, Any]:
    """One run among many: verdict, sentence, first and last profile, settings.  ``name`` is what it is called."""
    summary, metrics, meta = (_read(run / f) for f in ("summary.json", "metrics.json", "trace/meta.json"))
    age = time.time() - stamp(run)
    word = "running" if age < STILL_RUNNING else "unfinished"
    return plain(
        {
            "id": name,
            "stamp": stamp(run),
            "verdict": summary.get("verdict", word),
            "sentence": summary.get("sentence", ""),
            "planned": summary.get("planned_steps") or meta.get("planned_steps"),
            "first": _moment(summary.get("first")),
            "last": _moment(summary.get("last")),
            "expected": _rounded((meta.get("predicted") or {}).get("decades") or []),
            "accuracy": metrics.get("test_accuracy"),
            "loss": metrics.get("train_loss"),
            "steps": metrics.get("steps"),
            "config": dotted({k: v for k, v in (meta.get("config") or {}).items() if k != "expect"}),
            "model": meta.get("model", ""),
        }
    )


def _moment(told: Any) -> dict[str, Any] | None:
    return {"step": told["step"], "decades": _rounded(told["decades"])} if told else None


def _rounded(values: list[Any]) -> list[Any]:
    return [round(x, 2) if isinstance(x, int | float) and math.isfinite(x) else x for x in values]


def detail(run: Path, name: str, columns: int = COLUMNS) -> dict[str, Any]:
    """One run for the five views, in at most ``columns`` columns.

    Raises:
        TraceError: Its trace cannot be read.
    """
    told, summary = (_read(run / f"{what}.json") for what in ("findings", "summary"))
    if not (told and summary):
        told, summary = _judged(Trace.load(run))
    taken = _kept(run, columns) or drawn(run, columns)
    return {
        **overview(run, name),
        **{key: value for key, value in taken.items() if key not in ("files", "columns")},
        **plain(
            {
                "verdict": summary["verdict"],
                "sentence": summary["sentence"],
                "findings": told["findings"],
                "remedies": told.get("remedies", []),
                "notes": told.get("notes", []),
                "provenance": _provenance(run, _read(run / "trace" / "meta.json")),
            }
        ),
    }


def drawn(run: Path, columns: int = COLUMNS) -> dict[str, Any]:
    """What ``detail`` takes from the trace.

    Raises:
        TraceError: It cannot be read.
    """
    files = _files(run)
    trace, peaks, spans, sampled = _thinned(run, columns)
    lines = trace.weight_layers()
    series = {key: _series(trace, lines, *SERIES[key]) for key in SERIES} | _ledger(trace, lines)
    series["entering"] = _entering(trace, lines)
    ways = _ways_around(trace, lines)
    series["around"] = _carried(trace, ways)
    return plain(
        {
            "schema": SCHEMA,
            "files": files,
            "columns": columns,
            "planned": diagnosis.profile(trace).planned,
            "layers": [_layer(trace, i, lines) for i in lines],
            "around": [way.rows for way in ways],
            "steps": trace.sampled_steps.tolist(),
            "sampled": sampled,
            "spans": spans,
            "curve": _curve(*trace.losses),
            "guessing": _guessing(trace, lines),
            "series": {key: packed(*block) for key, block in series.items()},
            "peaks": {key: packed(*block) for key, block in peaks.items()},
            "theory": _theory(trace, len(lines)),
            "gaps": _gaps(trace, lines),
        }
    )


def keep(run: Path, sampled: int) -> None:
    """Of a long run what is drawn of its trace, beside the trace: read in an instant when it is opened.

    Where it cannot be written nothing is lost: the trace is read instead.
    """
    if sampled > COLUMNS:
        with suppress(OSError):
            write_json(run / "trace" / KEPT, drawn(run))


def _kept(run: Path, columns: int) -> dict[str, Any] | None:
    """What was kept, while the trace is still the one it was made of."""
    told = _read(run / "trace" / KEPT)
    same = (told.get("schema"), told.get("columns"), told.get("files")) == (SCHEMA, columns, _files(run))
    return told if same else None


def _files(run: Path) -> list[list[Any]]:
    """The trace's files and their sizes."""
    there = [path for path in (run / "trace").glob("*") if path.suffix == ".parquet" or path.name == "meta.json"]
    return sorted([path.name, path.stat().st_size] for path in there)


def _thinned(run: Path, columns: int) -> tuple[Trace, Blocks, list[list[int]], int]:
    """The steps that are drawn; the peaks and the spans of all where some are left out; of how many.

    A file is read, reduced to what is drawn, and let go.
    """
    steps, (decades,) = _reduced(Trace.parts(run, ["decades"]), ["decades"])
    starts = _starts(len(steps), columns)
    chosen = _chosen(decades, starts)
    if len(chosen) == len(steps):
        return Trace.load(run, DRAWN), {}, [], len(steps)
    kept: list[Trace] = []

    def read() -> Iterator[Trace]:
        for part in Trace.parts(run, DRAWN):
            kept.append(part.only(steps[chosen]))
            yield part

    _, whole = _reduced(read(), MAPPED)
    peaks = {key: _peak(*block, starts, MAPPED[key]) for key, block in zip(MAPPED, whole, strict=True)}
    return Trace.joined(kept), peaks, _told_spans(starts, steps), len(steps)


def _reduced(parts: Iterable[Trace], keys: Collection[str]) -> tuple[np.ndarray, list[Block]]:
    """The sampled steps of all parts, and these series of theirs."""
    told = [(one.sampled_steps, [_series(one, one.weight_layers(), *SERIES[key]) for key in keys]) for one in parts]
    steps = np.concatenate([own for own, _ in told])
    each = zip(*(blocks for _, blocks in told), strict=True)
    return steps, [(np.concatenate([v for v, _ in of_key]), np.concatenate([t for _, t in of_key])) for of_key in each]


def _judged(trace: Trace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run that has not ended would write: findings with notes, and the summary."""
    found = diagnosis.diagnose(trace) if len(trace.sampled_steps) else []
    return {"findings": found, "notes": diagnosis.notes(trace)}, diagnosis.summarize(trace, found)


def _series(trace: Trace, lines: list[int], column: str, log: bool, whose: str) -> Block:
    """(S, L) numbers of the weight layers and whether they were measured."""
    values, there = trace.column(column)
    if whose == "activation":  # on its own row where it is a module: the first on the way up that tells it
        known = np.any(there, axis=0).tolist()
        told = [next((j for j in (i, *trace.layers[i].via) if known[j]), i) for i in lines]
    else:
        told = lines
    values, there = values[:, told], there[:, told]
    with np.errstate(all="ignore"):
        return (np.log10(values) if log else values), there


def _ledger(trace: Trace, lines: list[int]) -> Blocks:
    """Who takes what of the step above each weight layer: decades, by owner."""
    p = diagnosis.profile(trace)
    at = [lines.index(i) for i in p.lines]
    out = {}
    for owner in OWNERS:
        values = np.full((len(p.steps), len(lines)), np.nan)
        values[:, at] = p.ledger[owner]
        out[f"takes_{owner}"] = values, ~np.isnan(values)
    return out


def _entering(trace: Trace, lines: list[int]) -> Block:
    """log10 ‖a‖ of what each weight layer read."""
    told = [bridge.entered(trace, i) for i in lines] or [(np.zeros(0), np.zeros(0, bool))]
    values, there = (np.stack(side, 1) for side in zip(*told, strict=True))
    with np.errstate(all="ignore"):
        return np.log10(values), there


@dataclass(frozen=True)
class Way:
    """A way around weight layers, as a residual block's skip: from where it forks to where it meets them again."""

    rows: tuple[int, int]  # between which weight layers: above the first (-1: below all), up to and with the second
    edge: tuple[int, int]  # its first edge above the fork: what reads there, the fork


def _ways_around(trace: Trace, lines: list[int]) -> list[Way]:
    """Of each place where ways meet all but the longest, where they miss a weight layer."""
    readers = Counter(parent for layer in trace.layers for parent in layer.parents)
    found = []
    for meeting, layer in enumerate(trace.layers):
        ways = []
        for parent in layer.parents if len(layer.parents) > 1 else ():
            reader, at, passed = meeting, parent, 0
            while readers[at] == 1 and len(trace.layers[at].parents) == 1:
                passed += trace.layers[at].is_weight_layer
                reader, at = at, trace.layers[at].parents[0]
            if readers[at] > 1:
                ways.append((passed, at, reader))
        for passed, fork, reader in sorted(ways)[:-1]:
            low, high = (bisect_right(lines, place) - 1 for place in (fork, meeting))
            if high - low > passed:
                found.append(Way((low, high), (reader, fork)))
    return found[:MOST_WAYS]


def _carried(trace: Trace, ways: list[Way]) -> Block:
    """(S, E) log10 of what each way carries of the cotangent that arrives where the ways meet."""
    told = [trace.edges(at) if ways else {} for at in range(len(trace.sampled_steps))]
    values = np.array([[gains.get(way.edge, np.nan) for way in ways] for gains in told], float)
    values = values.reshape(len(told), len(ways))
    with np.errstate(all="ignore"):
        return np.log10(values), ~np.isnan(values)


def _starts(sampled: int, columns: int) -> np.ndarray:
    """(C,) where each column's span of sampled steps begins."""
    count = min(sampled, columns)
    return np.arange(count) * sampled // max(count, 1)


def _spans(starts: np.ndarray, sampled: int) -> list[tuple[int, int]]:
    """(from, to) of each column's span, the end left out."""
    return list(zip(starts.tolist(), [*starts[1:].tolist(), sampled], strict=True))


def _told_spans(starts: np.ndarray, steps: np.ndarray) -> list[list[int]]:
    """[first step, last step, how many] of each span."""
    return [[int(steps[a]), int(steps[b - 1]), b - a] for a, b in _spans(starts, len(steps))]


def _chosen(decades: Block, starts: np.ndarray) -> np.ndarray:
    """(C,) of each span the step in which the lowest layer measured was farthest from the output."""
    values, there = decades
    reached = np.flatnonzero(there.any(0))
    if not len(starts) or not len(reached):
        return starts
    lowest = np.abs(values[:, reached[0]])
    lowest = np.where(np.isfinite(lowest), lowest, -1.0)
    return np.array([a + int(lowest[a:b].argmax()) for a, b in _spans(starts, len(values))])


def _peak(
    values: np.ndarray, there: np.ndarray, starts: np.ndarray, way: str = "farthest"
) -> tuple[np.ndarray, np.ndarray]:
    """(C, L) of each span the number farthest from 0, or the largest: a nan before all, what is missing last.

    Example:
        >>> values = np.array([[1.0, 0.0], [-3.0, np.nan], [2.0, 5.0]])
        >>> _peak(values, np.array([[True, False], [True, True], [True, True]]), np.array([0, 2]))[0].tolist()
        [[-3.0, nan], [2.0, 5.0]]
    """
    size = np.where(np.isnan(values), np.inf, np.abs(values) if way == "farthest" else values)
    size = np.where(there, size, -np.inf)
    at = np.array([a + size[a:b].argmax(0) for a, b in _spans(starts, len(values))])
    return np.take_along_axis(values, at, 0), np.take_along_axis(there, at, 0)


def packed(values: np.ndarray, there: np.ndarray) -> dict[str, Any]:
    """A block of numbers in two bytes each: to 1/32,000 of the largest.

    Example:
        >>> block = packed(np.array([[-16.0, np.inf, 7.0]]), np.array([[True, True, False]]))
        >>> block["scale"], np.frombuffer(base64.b64decode(block["data"]), "<i2").tolist()
        (0.0005, [-32000, 32767, -32768])
    """
    finite = np.isfinite(values) & there
    largest = float(np.abs(values[finite]).max(initial=0)) or 1.0
    scale = largest / FULL
    whole = np.full(values.shape, CODES["NaN"], np.int64)
    whole[finite] = np.rint(values[finite] / scale)
    whole[values == np.inf], whole[values == -np.inf] = CODES["Infinity"], CODES["-Infinity"]
    whole[~there] = CODES["missing"]
    return {"scale": scale, "data": base64.b64encode(whole.astype("<i2").tobytes()).decode()}


def _layer(trace: Trace, i: int, lines: list[int]) -> dict[str, Any]:
    layer = trace.layers[i]
    carriers = [trace.layers[j] for j in (i, *layer.via) if trace.layers[j].activation]
    top = bridge.climb(trace, i)[-1]
    return {
        "key": layer.key,
        "name": layer.title if layer.name else layer.kind,
        "kind": layer.kind,
        "fan_in": layer.fan_in,
        "units": layer.units,
        "activation": carriers[0].activation if carriers else None,
        "next": lines.index(layer.next) if layer.next in lines else None,
        "forks": bridge.is_read_by_weights(trace, top),  # then its chain is no single product
    }


def _curve(steps: np.ndarray, losses: np.ndarray) -> dict[str, Any]:
    """The loss of every step; of long runs the least and the largest of each span."""
    if len(steps) <= POINTS:
        return {"steps": steps.tolist(), "low": [_significant(x) for x in losses], "high": []}
    starts = _starts(len(steps), POINTS // 2)
    with np.errstate(all="ignore"):
        low, high = (f.reduceat(losses, starts) for f in (np.minimum, np.maximum))  # a nan of a span stays one
    return {
        "steps": steps[starts].tolist(),
        "low": [_significant(x) for x in low],
        "high": [_significant(x) for x in high],
    }


def _significant(x: float) -> float:
    return float(f"{x:.4g}")


def _guessing(trace: Trace, lines: list[int]) -> float | None:
    """The loss of guessing: ln K of a cross-entropy over K classes."""
    known = trace.meta.get("loss") == "cross_entropy" and lines and trace.layers[lines[-1]].units
    return round(math.log(trace.layers[lines[-1]].units or 1), 4) if known else None


def _theory(trace: Trace, layers: int) -> dict[str, Any] | None:
    """Decades that infinite width expects at step 0 and what a draw of the weights may be off."""
    told = trace.meta.get("predicted") or {}
    if len(told.get("decades") or []) != layers:
        return None
    band = [told.get("spreads", 2) * x for x in told["decades_band"]]
    return {"decades": _rounded(told["decades"]), "band": _rounded(band), "caveat": told.get("caveat", "")}


def _gaps(trace: Trace, lines: list[int]) -> list[list[Any]]:
    """[layer, column, from step, to step, reason] of what a weight layer lacks."""
    own = {trace.layers[i].key: at for at, i in enumerate(lines)}
    shown = {column for column, _, _ in SERIES.values()}
    told = [(own.get(f"{m.layer}#{m.call}"), m) for m in trace.missing if m.column in shown]
    return [[at, m.column, m.from_step, m.to_step, m.reason] for at, m in told if at is not None][:MOST_GAPS]


def _provenance(run: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Where the numbers come from: versions, optimizer, machine, and the command where a run of ours has kept it."""
    return {
        "folder": str(Path(*run.parts[-2:])),  # no more of the way to it: a page is given away
        "command": _command(run),
        "versions": meta.get("versions", {}),
        "machine": meta.get("machine", ""),
        "optimizer": meta.get("optimizer", {}),
        "every": meta.get("every"),
    }


def _command(run: Path) -> str:
    """What was typed, as Hydra keeps it: one override a line; empty where it was not Hydra that ran."""
    try:
        lines = (run / ".hydra" / "overrides.yaml").read_text().splitlines()
    except OSError:
        return ""
    return " ".join(["bpdiag", *(line.removeprefix("- ") for line in lines if line.startswith("- "))])
