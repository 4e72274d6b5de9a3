"""Sub-commands that show stored runs: report, plot, diff.  What they need is imported when they are called."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from bpdiag.config import UsageError, says_yes


class Parser(argparse.ArgumentParser):
    """One line for what cannot be understood, not a page of usage; --json and --quiet, of which the last counts.

    ``as_json``: what comes as JSON.  What was chosen is the argument ``tells``: text, json or quiet.
    """

    def __init__(self, *, as_json: str = "the same as JSON", **options: Any) -> None:
        super().__init__(**options)
        for name, meaning in (("json", as_json), ("quiet", "nothing but errors")):
            self.add_argument(f"--{name}", dest="tells", action="store_const", const=name, help=meaning)
        self.set_defaults(tells="text")

    def error(self, message: str) -> NoReturn:
        """Refuse the line."""
        raise UsageError(f"{self.prog.removeprefix('bpdiag ')}: {message}; see {self.prog} --help")


def tell(how: str, as_data: Callable[[], Any], as_text: Callable[[], Any]) -> None:
    """Say what came of it: as JSON, in words, or not at all."""
    if how == "json":
        from bpdiag.trace import plain

        print(json.dumps(plain(as_data()), indent=1, ensure_ascii=False))
    elif how == "text":
        as_text()


def runs_in(folder: Path) -> list[Path]:
    """The run folder given, or the run folders in it, in natural order."""
    from bpdiag.views import find

    if says_yes(folder.is_dir) and not (folder / "trace").is_dir() and not (folder / "meta.json").is_file():
        return find(folder) or [folder]
    return [folder]


def report(arguments: list[str]) -> int:
    """``bpdiag report RUN ... -o FILE``: one page that opens offline."""
    where = "where it was written and of what, as JSON"
    parser = Parser(prog="bpdiag report", description="One page of runs that opens offline.", as_json=where)
    parser.add_argument("run", nargs="+", help="a run folder, or a folder of run folders")
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE", help="default: report.html")
    told = parser.parse_args(arguments)

    from bpdiag.report import write_html

    runs = [run for given in told.run for run in runs_in(Path(given))]
    path = write_html(runs, told.output)
    words = f"{path}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {path.stat().st_size / 1000:.0f} kB"
    tell(told.tells, lambda: {"page": str(path), "runs": list(map(str, runs))}, lambda: print(words))
    return 0


def plot(arguments: list[str]) -> int:
    """``bpdiag plot RUN ... -o FILE``: the profile, or the chain of one layer, as a picture."""
    parser = Parser(
        prog="bpdiag plot",
        description="The gradient profile as SVG, PNG or PDF; with --chain the product that one layer's gradient is.",
        as_json="where it was written and of what, as JSON",
    )
    parser.add_argument("run", nargs="*", help="a run folder; of several the profiles lie over each other")
    parser.add_argument("-o", "--output", metavar="FILE", help="default: profile.svg, chain.svg")
    parser.add_argument("--step", type=int, metavar="N", help="a sampled step; else the last")
    parser.add_argument("--chain", action="store_true", help="the chain of one layer of the run; of none the lesson's")
    parser.add_argument("--layer", metavar="NAME", help="with --chain: the layer whose dC/dW is drawn; else the lowest")
    told = parser.parse_args(arguments)
    if told.layer is not None and not told.chain:
        raise UsageError("--layer is of a chain: bpdiag plot RUN --chain --layer NAME")
    if not told.run and not told.chain:
        raise UsageError("plot: give a run folder, or --chain for the lesson's chain; see bpdiag plot --help")

    from bpdiag import figure
    from bpdiag.trace import Trace

    runs = [run for given in told.run for run in runs_in(Path(given))]
    if told.chain:
        if len(runs) > 1:
            raise UsageError("plot --chain: one run at a time")
        trace = Trace.load(runs[0]) if runs else None
        path = figure.write_chain(trace, told.output or "chain.svg", told.layer, told.step)
    else:
        names = {run.name if len({r.name for r in runs}) == len(runs) else str(run): run for run in runs}
        traces = {name: Trace.load(run) for name, run in names.items()}
        path = figure.write(traces, told.output or "profile.svg", told.step)
    tell(told.tells, lambda: {"picture": str(path), "runs": list(map(str, runs))}, lambda: print(path))
    return 0


def diff(arguments: list[str]) -> int:
    """``bpdiag diff RUN RUN``: what differs between two runs, and where their numbers part."""
    parser = Parser(prog="bpdiag diff", description="What differs between two runs.")
    parser.add_argument("run", nargs=2, help="a run folder")
    told = parser.parse_args(arguments)

    from bpdiag.difference import compare
    from bpdiag.trace import Trace

    difference = compare(*(Trace.load(run) for run in told.run))
    tell(told.tells, lambda: difference, lambda: print(difference))
    return 0
