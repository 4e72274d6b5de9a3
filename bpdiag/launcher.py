"""A multirun's jobs, one after another: a line as each ends, a table at the end.  A job that fails stops no other.

Imports no torch: ``hydra_plugins/bpdiag_sequential.py`` is read by every Hydra application.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpdiag.trace import plain

TELLS: ContextVar[str] = ContextVar("tells", default="text")  # text, json, quiet: what the command line prints
LONGEST_NAME = 200  # bytes; file systems stop at 255


@dataclass
class SequentialConfig:
    """hydra/launcher=sequential."""

    _target_: str = "hydra_plugins.bpdiag_sequential.SequentialLauncher"


class JobsFailedError(RuntimeError):
    """Some jobs of a multirun failed; each has been told."""


def job_folder(overrides: Sequence[str]) -> str:
    """A flat, safe folder name for a job: its overrides, keys without their group.

    Example:
        >>> job_folder(["experiment=vanishing", "model.activation=relu", "model.depth=5", "optimizer.name=adam"])
        'activation=relu,depth=5,optimizer=adam'
        >>> job_folder(["data.root=a/b c"])
        'root=a-b-c'
    """
    parts = []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key == "experiment" or key.startswith("hydra"):
            continue
        group, _, leaf = key.rpartition(".")
        short = group.rpartition(".")[2] if leaf == "name" else leaf
        parts.append(f"{short}={re.sub(r'[^A-Za-z0-9_.+-]+', '-', value)}")
    name = ",".join(parts) or "job"
    if len(name) > LONGEST_NAME:
        digest = hashlib.sha256(",".join(overrides).encode()).hexdigest()[:12]
        name = f"{name[: LONGEST_NAME - 13]}-{digest}"
    return name


def launch(
    context: Any, task: Any, config: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
) -> list[Any]:
    """Run the jobs; returns Hydra's JobReturns.

    Raises:
        JobsFailedError: One or more jobs raised; all others have run.
    """
    from hydra.core.utils import JobStatus, run_job, setup_globals
    from omegaconf import OmegaConf, open_dict

    from bpdiag import report, results, terminal
    from bpdiag.config import Expectation

    setup_globals()
    sweep = Path(str(config.hydra.sweep.dir))
    grid = terminal.Grid(_varying(job_overrides), len(job_overrides), sweep) if TELLS.get() == "text" else None
    rows: list[results.Row] = []
    returns, begun = [], time.perf_counter()
    if grid:
        grid.begin()
    try:
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            job = context.config_loader.load_sweep_config(config, list(overrides))
            with open_dict(job):
                job.hydra.job.id, job.hydra.job.num = str(number), number
            start = time.perf_counter()
            done = run_job(
                task_function=task,
                config=job,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=context,
            )
            returns.append(done)
            folder, error = Path(job.hydra.runtime.output_dir), ""
            if done.status is not JobStatus.COMPLETED:
                error = f"{type(done._return_value).__name__}: {done._return_value}"
                (folder / "error.log").write_text("".join(traceback.format_exception(done._return_value)))
            outcome = done._return_value if not error else None
            rows.append(results.Row(_pairs(overrides), str(folder), outcome, error))
            results.write(rows, sweep)
            if grid:
                grid.job(rows[-1], time.perf_counter() - start)
    finally:
        page = _page(report.write_html, rows, sweep)
        if grid:
            asked: Any = OmegaConf.to_container(config.expect) if "expect" in config else []
            expected = [Expectation(**one) for one in asked]
            grid.end(time.perf_counter() - begun, results.check(expected, rows), page)
        elif TELLS.get() == "json":
            print(json.dumps(plain([row.flat() for row in rows]), indent=1))  # noqa: T201
    failed = sum(row.outcome is None for row in rows)
    if failed:
        raise JobsFailedError(f"{failed} of {len(job_overrides)} jobs failed")
    return returns


def _page(write: Callable[..., Path], rows: Sequence[Any], sweep: Path) -> Path | None:
    """report.html of the jobs that have finished; what goes wrong with it is told and costs no result."""
    try:
        done = [Path(row.folder) for row in rows if row.outcome is not None]
        return write(done, sweep / "report.html") if done else None
    except Exception as error:
        print(f"bpdiag: no report.html: {error}", file=sys.stderr)  # noqa: T201
        return None


def _pairs(overrides: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (o.lstrip("+~").partition("=") for o in overrides)}


def _varying(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Keys whose value differs between jobs, in the order given; all keys of a single job."""
    pairs = [_pairs(job) for job in jobs]
    keys = list(dict.fromkeys(key for job in pairs for key in job if key != "experiment"))
    return [key for key in keys if len({job.get(key) for job in pairs}) > 1] or (keys if len(jobs) == 1 else [])
