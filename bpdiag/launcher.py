"""A multirun: its jobs composed, dealt out as stacks, told as they end, summed up.  A job that fails stops no other.

Imports no torch: ``hydra_plugins/bpdiag_stack.py`` is read by every Hydra application, and who deals out stacks needs
none.  The processes that train know no Hydra: what Hydra leaves of a job is made here when the job is over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpdiag import dealing, engines, job
from bpdiag.composing import Composer, configured
from bpdiag.config import Config, Expectation, UsageError, check_ranges
from bpdiag.engines import Engine, Failure, Local, Told
from bpdiag.job import Finished, Member, Task
from bpdiag.results import Outcome, Row
from bpdiag.trace import plain

TELLS: ContextVar[str] = ContextVar("tells", default="text")  # text, json, quiet: what the command line prints
LONGEST_NAME = 200  # bytes; file systems stop at 255
WRITING = 0.1  # of the time that passes may go into writing tables anew as jobs end
_POOL: ContextVar[Local | None] = ContextVar("pool", default=None)


@dataclass
class StackConfig:
    """hydra/launcher=stack."""

    _target_: str = "hydra_plugins.bpdiag_stack.StackLauncher"
    engine: str = "local"  # local, ray, submitit
    processes: str = "cores"  # of this machine: a number, or as many as there are cores; a cluster has its own
    ray: dict[str, Any] = field(default_factory=dict)  # of ray.init; the cluster is that of RAY_ADDRESS, or begun here
    submitit: dict[str, Any] = field(default_factory=dict)  # of its AutoExecutor: cluster, slurm_partition, ...


class JobsFailedError(RuntimeError):
    """Some jobs of a multirun failed; each has been told."""


class JobFailedError(RuntimeError):
    """A job raised this in the process that trained it, or the process was killed."""


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


def register_resolvers() -> None:
    """What ``conf/config.yaml`` names folders with."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
    OmegaConf.register_new_resolver("run_name", lambda experiment, data: experiment or data, replace=True)


def of_a_sweep(config: Config, overrides: Sequence[str]) -> Config:
    """``config`` without what would make a sweep take twice as long, unless it is asked for: remedies, pictures."""
    if not any(word.startswith("remedy.") for word in overrides):
        config.remedy.steps = 0
    if not any(word.startswith("watch.pictures") for word in overrides):
        config.watch.pictures = False
    return config


# ---- the processes ----------------------------------------------------------------------------------------


def check(launcher: Any) -> None:
    """The engine and the number of processes can be used.

    Raises:
        UsageError: One cannot.
    """
    engines.require(launcher.engine)
    _processes(launcher)


def _processes(launcher: Any) -> int | None:
    """As many as asked for; None: as many as there are cores."""
    if launcher.processes == "cores":
        return None
    with contextlib.suppress(ValueError):
        if int(launcher.processes) >= 1:
            return int(launcher.processes)
    raise UsageError(f"hydra.launcher.processes={launcher.processes}: must be 1 or more, or cores")


def pool(launcher: Any) -> Local:
    """The processes of this machine, begun at the first call: then they import torch while the caller does more."""
    there = _POOL.get()
    if there is None:
        there = Local(job.train, _processes(launcher) or engines.cores(), ["bpdiag.preloaded"])
        _POOL.set(there)
    return there


def close_pool() -> None:
    """End the processes of this machine, if there are any."""
    there = _POOL.get()
    if there is not None:
        there.close()
        _POOL.set(None)


def _engine(launcher: Any, sweep: Path) -> Engine:
    if launcher.engine == "ray":
        return engines.Ray(job.train, _processes(launcher), dict(launcher.ray))
    if launcher.engine == "submitit":
        return engines.Submitit(job.train, _processes(launcher), dict(launcher.submitit), sweep / ".submitit")
    return pool(launcher)


# ---- a sweep ----------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One job: as Hydra composed it, where it is written, what it came to."""

    number: int
    overrides: list[str]
    composed: Any
    folder: Path
    used: bool  # the folder held a run before: it is refused there, and nothing of it is taken away
    member: Member | None = None  # what is trained; None where the configuration cannot be used
    outcome: Outcome | Failure | None = None
    returned: Any = None  # Hydra's JobReturn

    def end(self, context: Any, outcome: Outcome | Failure) -> None:
        """Leave what Hydra leaves of a job, ``.hydra`` and its logs, and of one that failed error.log."""
        from hydra.core.utils import run_job

        def task(_: Any) -> Outcome:
            if isinstance(outcome, Failure):
                raise JobFailedError(outcome.error)
            return outcome

        self.outcome = outcome
        self.returned = run_job(
            task_function=task,
            config=self.composed,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=context,
        )
        self.composed = None  # the JobReturn has it; ten thousand more would be a gigabyte
        if isinstance(outcome, Failure):
            (self.folder / "error.log").write_text(outcome.trace or f"{outcome.error}\n")

    def row(self) -> Row:
        """Its line of the tables."""
        told, folder = _pairs(self.overrides), str(self.folder)
        if isinstance(self.outcome, Failure):
            return Row(told, folder, None, self.outcome.error)
        return Row(told, folder, self.outcome)


class Sweep:
    """A multirun of Hydra's; a sweeper that decides as it goes launches more than once."""

    def __init__(self, context: Any, config: Any, options: StackConfig) -> None:
        context.config_loader = Composer(context.config_loader)  # the sweeper's too, which composes all to validate
        self.context, self.config, self.options = context, config, options
        self.folder = Path(str(config.hydra.sweep.dir))
        self.rows: dict[int, Row] = {}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        """Run the jobs; returns Hydra's JobReturns.

        Raises:
            UsageError: The launcher's own options cannot be used.
            JobsFailedError: One or more jobs raised; all others have run.
        """
        from hydra.core.utils import setup_globals

        check(self.options)
        setup_globals()
        own = _POOL.get() is None
        workers = pool(self.options)
        try:
            jobs = [self._job(number, list(o)) for number, o in enumerate(job_overrides, start=initial_job_idx)]
            self._run(jobs, workers)
        finally:
            if own:
                close_pool()
        if failed := sum(isinstance(one.outcome, Failure) for one in jobs):
            raise JobsFailedError(f"{failed} of {len(jobs)} jobs failed")
        return [one.returned for one in jobs]

    def _job(self, number: int, overrides: list[str]) -> Job:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import open_dict

        composed = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(composed):
            composed.hydra.job.id, composed.hydra.job.num = str(number), number
        shown, before = HydraConfig.instance(), HydraConfig.instance().cfg
        shown.set_config(composed)  # the folder's name may ask for ${hydra:...}
        folder = Path(str(composed.hydra.sweep.dir), str(composed.hydra.sweep.subdir)).absolute()
        shown.cfg = before
        return Job(number, overrides, composed, folder, used=(folder / "trace").exists())

    def _run(self, jobs: Sequence[Job], workers: Local) -> None:
        from omegaconf import OmegaConf

        from bpdiag import report, results, terminal

        keys = _varying([one.overrides for one in jobs])
        grid = terminal.Grid(keys, len(jobs), self.folder) if TELLS.get() == "text" else None
        begun, engine, wrote = time.perf_counter(), _engine(self.options, self.folder), _Seldom()
        if grid:
            grid.begin()
        try:
            for one, seconds in self._ended(jobs, workers, engine, grid):
                self.rows[one.number] = row = one.row()
                wrote.now_and_then(lambda: results.write(self._ordered(), self.folder))
                if grid:
                    grid.job(row, seconds)
        except KeyboardInterrupt:
            self._interrupt(jobs, engine)
            raise
        finally:
            if engine is not workers:
                engine.close()
            if self.rows:
                results.write(self._ordered(), self.folder)
            page = _page(report.write_html, self._ordered(), self.folder)
            rows = [self.rows[one.number] for one in jobs if one.number in self.rows]
            if grid:
                asked: Any = OmegaConf.to_container(self.config.expect) if "expect" in self.config else []
                expected = [Expectation(**one) for one in asked]
                grid.end(rows, time.perf_counter() - begun, results.check(expected, rows), page)
            elif TELLS.get() == "json":
                print(json.dumps(plain([row.flat() for row in rows]), indent=1))  # noqa: T201

    def _ordered(self) -> list[Row]:
        return [row for _, row in sorted(self.rows.items())]

    def _ended(self, jobs: Sequence[Job], workers: Local, engine: Engine, grid: Any) -> Iterator[tuple[Job, float]]:
        """Each job when it is over, and the seconds it took."""
        taken: set[Path] = set()
        for one in jobs:
            try:
                if one.folder in taken:
                    raise UsageError(f"{one.folder}: another job is written there; hydra.sweep.subdir tells them apart")
                config = of_a_sweep(configured(one.composed), one.overrides)
                check_ranges(config)  # another sweeper than Hydra's basic one has had nothing checked
            except Exception as error:  # OmegaConf has many; they are this job's own
                one.end(self.context, Failure.of(error))
                yield one, 0.0
            else:
                taken.add(one.folder)
                one.member = Member(one.number, config, str(one.folder))
        members = [one.member for one in jobs if one.member]
        if not members:
            return
        configs = [member.config for member in members]
        costs = [dealing.cost(config) for config in configs]
        stacks = dealing.deal(workers.ask(job.groups, configs), costs, engine.processes)
        if grid:
            looks = {at: look for stack in stacks for at, look in self._looks(stack, configs, workers)}
            named = [grid.name(one.row()) for one in jobs if one.member]
            if any(measured == measured for _, measured in looks.values()):  # nan: not looked at
                grid.look([(name, *looks[at]) for at, name in enumerate(named) if at in looks])
        for stack in stacks:
            engine.submit(Task(tuple(members[at] for at in stack.members), stack.together))
        yield from self._trained({one.number: one for one in jobs}, engine, grid)

    def _looks(
        self, stack: dealing.Stack, configs: Sequence[Config], workers: Local
    ) -> Iterator[tuple[int, tuple[float | None, float]]]:
        """Of each of its members; of none where the look fails, as training will say why."""
        with contextlib.suppress(RuntimeError):
            yield from zip(stack.members, workers.ask(job.looks, [configs[at] for at in stack.members]), strict=True)

    def _trained(self, jobs: dict[int, Job], engine: Engine, grid: Any) -> Iterator[tuple[Job, float]]:
        """Each of the jobs submitted.

        A stack that ended without some of them is tried again in halves, a job alone whose process was killed once.
        """
        losses: Counter[int] = Counter()
        for task, event in engine.events():
            if isinstance(event, Told):
                said: Finished = event.what
                jobs[said.number].end(self.context, said.outcome)
                yield jobs[said.number], said.seconds
                continue
            left = [jobs[member.number] for member in task.members if jobs[member.number].outcome is None]
            losses.update(one.number for one in left if event.lost)
            how = event.lost or (f"could not train them together ({event.failure.error})" if event.failure else "")
            once = len(left) == 1 and bool(event.lost) and losses[left[0].number] == 1
            if how and (len(left) > 1 or once):
                for one in left:
                    _clear(one)
                for half in task.without({m.number for m in task.members} - {one.number for one in left}).halves():
                    engine.submit(half)
                if grid:
                    grid.lost(len(left), how)
                continue
            why = (
                f"ProcessLost: the process that trained it {event.lost}" if event.lost else "its stack ended without it"
            )
            for one in left:
                one.end(self.context, event.failure or Failure(why, ""))
                yield one, 0.0

    def _interrupt(self, jobs: Sequence[Job], engine: Engine) -> None:
        """What is finished has its row; what has begun keeps what there is, and what it was asked."""
        engine.interrupt()
        for _, event in engine.events():
            if isinstance(event, Told) and isinstance(event.what.outcome, Outcome):
                one = next(one for one in jobs if one.number == event.what.number)
                one.end(self.context, event.what.outcome)
                self.rows[one.number] = one.row()
        for one in jobs:
            if one.outcome is None and not one.used and one.folder.exists():
                one.end(self.context, Failure("KeyboardInterrupt: interrupted", ""))


def _clear(one: Job) -> None:
    """Take away what a killed process left of a run, so that it can begin anew."""
    if not one.used:
        shutil.rmtree(one.folder / "trace", ignore_errors=True)
        for events in one.folder.glob("events.out.tfevents.*"):
            events.unlink()


class _Seldom:
    """Does what grows longer with every job so that it never takes more than a tenth of the time."""

    def __init__(self) -> None:
        self.due = 0.0

    def now_and_then(self, act: Callable[[], None]) -> None:
        """Now, if it is time again."""
        begun = time.perf_counter()
        if begun >= self.due:
            act()
            self.due = time.perf_counter() + (time.perf_counter() - begun) / WRITING


def _page(write: Callable[..., Path], rows: Sequence[Any], sweep: Path) -> Path | None:
    """report.html of the jobs that have finished; what goes wrong with it is told and costs no result."""
    try:
        done = [Path(row.folder) for row in rows if row.outcome is not None]
        return write(done, sweep / "report.html") if done else None
    except Exception as error:  # the results stand, and the page can be written again: bpdiag report
        print(f"bpdiag: no report.html: {error}", file=sys.stderr)  # noqa: T201
        return None


def _pairs(overrides: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (o.lstrip("+~").partition("=") for o in overrides)}


def _varying(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Keys whose value differs between jobs, in the order given; all keys of a single job."""
    pairs = [_pairs(job) for job in jobs]
    keys = list(dict.fromkeys(key for job in pairs for key in job if key != "experiment"))
    return [key for key in keys if len({job.get(key) for job in pairs}) > 1] or (keys if len(jobs) == 1 else [])
