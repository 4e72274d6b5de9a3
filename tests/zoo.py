"""The whole zoo, one line per architecture; writes docs/compatibility.md:  python tests/zoo.py [NAME ...].

With names, of architectures or of families, only those are examined and nothing is written.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
from zoo_hub import TIMM, TRANSFORMERS
from zoo_suite import Entry, Verdict, examine
from zoo_torch import TORCH, TORCHVISION

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
FAMILIES: dict[str, dict[str, Entry]] = {
    "torch": TORCH,
    "torchvision": TORCHVISION,
    "timm": TIMM,
    "transformers": TRANSFORMERS,
}
HEAD = """# What has been watched

Written by `make zoo`; do not edit. One training step of each architecture, in training mode, weights drawn at random,
small inputs, on one thread of a CPU, with {versions}.
Three things are asked of each:

- **bit for bit**: outputs, loss, gradients, parameters, buffers, hooks and the random numbers of torch, Python and
  NumPy are the same bits with the watcher and without it.
- **nothing missed**: hooks of the test's own count the calls of every module that has parameters of its own or none
  inside. Each is a row of the trace, in the order of execution, or its module is listed with its reason; so is every
  module that is never called. A row to which no gradient comes says why, truly.
- **cotangents**: the norm in every row equals that of `torch.autograd.grad` at the module's outputs, in a run of its
  own without the watcher, to 1e-10 (models computed in float32: 1e-5); where autograd has none, the row has none. So
  does the norm at an activation that is a function call, at a sum of no module in which ways meet (a row of its own),
  and that of every weight gradient.

`tests/zoo_twins.py` holds watchers with a fault each that these checks must catch.
"""
COLUMNS = (
    "model",
    "calls",
    "in the trace",
    "listed",
    "cotangents",
    "sums",
    "none comes",
    "weight gradients",
    "bit for bit",
    "remarks",
    "reasons",
)
NOT_INSTALLED = "not installed"


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def judged(family: str, entry: Entry) -> Verdict | str:
    """The verdict, or in words why there is none."""
    if installed(family) is None:
        return NOT_INSTALLED
    try:
        return examine(entry)
    except Exception as error:  # the model's own or the watcher's: on the page either way
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def is_sound(verdict: Verdict | str) -> bool:
    return isinstance(verdict, Verdict) and not verdict.faults


def told(verdict: Verdict | str) -> str:
    """In a line of the terminal."""
    if isinstance(verdict, str):
        return verdict
    return "; ".join(verdict.faults[:5]) or f"{verdict.calls} calls, {verdict.cotangents} cotangents"


def cells(name: str, entry: Entry, verdict: Verdict | str) -> list[str]:
    """A line of the page."""
    if isinstance(verdict, str):
        return [name, *[""] * 8, verdict, ""]
    numbers = (verdict.calls, verdict.rows, verdict.listed, verdict.cotangents, verdict.sums, verdict.without_gradient)
    precision = "" if entry.dtype is torch.float64 else "float32"
    faults = [f"**{fault}**" for fault in verdict.faults[:3]]
    remarks = "; ".join(text for text in (entry.remark, precision, *faults) if text)
    unchanged = "yes" if not verdict.changed else "**no**"
    return [name, *map(str, numbers), str(verdict.weights), unchanged, remarks, "; ".join(verdict.reasons)]


def page(verdicts: Mapping[str, Mapping[str, Verdict | str]]) -> str:
    """The page, whole."""
    versions = ", ".join(f"{package} {installed(package)}" for package in verdicts if installed(package))
    every = [v for of_family in verdicts.values() for v in of_family.values()]
    total, sums = (sum(getattr(v, name) for v in every if isinstance(v, Verdict)) for name in ("cotangents", "sums"))
    lines = [HEAD.format(versions=versions)]
    compared = f"{total} cotangents compared, and those of {sums} sums"
    lines += [f"**{sum(map(is_sound, every))} of {len(every)}** architectures; {compared}.\n"]
    for family, of_family in verdicts.items():
        found = [v for v in of_family.values() if isinstance(v, Verdict)]
        sound, compared = sum(map(is_sound, of_family.values())), sum(v.cotangents for v in found)
        lines += [
            f"## {family}: {sound} of {len(of_family)}\n",
            f"{sum(v.calls for v in found)} calls, {compared} cotangents compared.\n",
            f"| {' | '.join(COLUMNS)} |",
            f"|{'---|' * len(COLUMNS)}",
            *(f"| {' | '.join(cells(name, FAMILIES[family][name], v))} |" for name, v in of_family.items()),
            "",
        ]
    return "\n".join(lines)


def main(names: list[str]) -> int:
    """0 if every architecture was examined and is sound."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    torch.set_num_threads(1)
    unknown = [n for n in names if n not in FAMILIES and not any(n in entries for entries in FAMILIES.values())]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; known: {', '.join(FAMILIES)} and the names on {PAGE.name}")  # noqa: T201
        return 2
    verdicts: dict[str, dict[str, Verdict | str]] = {}
    for family, entries in FAMILIES.items():
        for name, entry in entries.items():
            if not names or {name, family} & set(names):
                start = time.perf_counter()
                verdict = verdicts.setdefault(family, {})[name] = judged(family, entry)
                told = (
                    [verdict]
                    if isinstance(verdict, str)
                    else verdict.faults[:5] or [f"{verdict.cotangents} cotangents"]
                )
                print(f"{family:13} {name:40} {time.perf_counter() - start:5.1f} s  {'; '.join(told)}", flush=True)  # noqa: T201
    every = [verdict for of_family in verdicts.values() for verdict in of_family.values()]
    print(f"{sum(map(is_sound, every))} of {len(every)}")  # noqa: T201
    if not names:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(verdicts))
    return 0 if all(map(is_sound, every)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
