"""Sub-commands that show stored runs: report, plot, diff.  What they need is imported when they are called."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NoReturn

from bpdiag.config import UsageError, says_yes


class Parser(argparse.ArgumentParser):
    """One line for what cannot be understood, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Refuse the line."""
        raise UsageError(f"{self.prog.removeprefix('bpdiag ')}: {message}; see {self.prog} --help")


def runs_in(folder: Path) -> list[Path]:
    """The run folder given, or the run folders in it, in natural order."""
    from bpdiag.views import find

    if says_yes(folder.is_dir) and not (folder / "trace").is_dir() and not (folder / "meta.json").is_file():
        return find(folder) or [folder]
    return [folder]


def report(arguments: list[str]) -> int:
    """``bpdiag report RUN ... -o FILE``: one page that opens offline."""
    parser = Parser(prog="bpdiag report", description="One page of runs that opens offline.")
    parser.add_argument("run", nargs="+", help="a run folder, or a folder of run folders")
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE", help="default: report.html")
    parser.add_argument("--json", action="store_true", help="where it was written and of what, as JSON")
    parser.add_argument("--quiet", action="store_true", help="nothing but errors")
    told = parser.parse_args(arguments)

    from bpdiag.report import write_html

    runs = [run for given in told.run for run in runs_in(Path(given))]
    path = write_html(runs, told.output)
    if told.json:
        print(json.dumps({"page": str(path), "runs": [str(run) for run in runs]}, indent=1))
    elif not told.quiet:
        print(f"{path}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {path.stat().st_size / 1000:.0f} kB")
    return 0


def plot(arguments: list[str]) -> int:
    """``bpdiag plot RUN ... -o FILE``: the profile as a picture."""
    parser = Parser(prog="bpdiag plot", description="The gradient profile as SVG, PNG or PDF.")
    parser.add_argument("run", nargs="+", help="a run folder; of several the profiles lie over each other")
    parser.add_argument("-o", "--output", default="profile.svg", metavar="FILE", help="default: profile.svg")
    parser.add_argument("--step", type=int, metavar="N", help="a sampled step; else the last")
    parser.add_argument("--json", action="store_true", help="where it was written and of what, as JSON")
    told = parser.parse_args(arguments)

    from bpdiag import figure
    from bpdiag.trace import Trace

    runs = [run for given in told.run for run in runs_in(Path(given))]
    names = {run.name if len({r.name for r in runs}) == len(runs) else str(run): run for run in runs}
    path = figure.write({name: Trace.load(run) for name, run in names.items()}, told.output, told.step)
    print(json.dumps({"picture": str(path), "runs": [str(run) for run in runs]}, indent=1) if told.json else path)
    return 0


def diff(arguments: list[str]) -> int:
    """``bpdiag diff RUN RUN``: what differs between two runs, and where their numbers part."""
    parser = Parser(prog="bpdiag diff", description="What differs between two runs.")
    parser.add_argument("run", nargs=2, help="a run folder")
    told = parser.parse_args(arguments)

    from bpdiag.difference import compare
    from bpdiag.trace import Trace

    difference = compare(*(Trace.load(run) for run in told.run))
    for key, (one, other) in difference.asked.items():
        print(f"{key}: {one} against {other}")
    if difference.layers:
        print(difference.layers)
    if difference.parting:
        print(f"the numbers part at {difference.parting}")
    else:
        print(f"no number parts in {difference.common_steps} sampled steps")
    return 0
