"""Runs where they are trained: one, or a stack, from their Configs to what a sweep's tables need.  Knows no Hydra.

Imports torch only where it trains: who deals runs out to other processes needs none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bpdiag.config import Config, UsageError, flat
from bpdiag.engines import Failure, Tell
from bpdiag.results import Outcome

if TYPE_CHECKING:
    from bpdiag.remedy import Cure
    from bpdiag.training import Result


@dataclass(frozen=True)
class Member:
    """A job of a sweep: its number there, what is asked, where it is written."""

    number: int
    config: Config
    folder: str


@dataclass(frozen=True)
class Task:
    """What a process is given at a time: a stack, or a run that none can take."""

    members: tuple[Member, ...]
    together: bool

    def without(self, numbers: Container[int]) -> Task:
        """The same with fewer members."""
        return Task(tuple(member for member in self.members if member.number not in numbers), self.together)

    def halves(self) -> list[Task]:
        """The same members in two; one member in one."""
        middle = (len(self.members) + 1) // 2
        return [Task(part, self.together) for part in (self.members[:middle], self.members[middle:]) if part]


@dataclass(frozen=True)
class Finished:
    """A member is over: what it came to or why it failed, and how long it took."""

    number: int
    outcome: Outcome | Failure
    seconds: float


def refused(configs: Sequence[Config]) -> tuple[int, str] | None:
    """The first that cannot be used, and why."""
    from bpdiag import training

    for number, config in enumerate(configs):
        try:
            training.check(config)
        except UsageError as error:
            return number, str(error)
    return None


def groups(configs: Sequence[Config]) -> list[Hashable | None]:
    """Of each: runs of equal group can be one stack; None: alone."""
    from bpdiag import stacking

    return [stacking.group(config) for config in configs]


def looks(configs: Sequence[Config]) -> list[tuple[float | None, float]]:
    """Decades of the first layer before training, of each: predicted, and measured."""
    from bpdiag import stacking

    return [(one.predicted, one.measured) for one in stacking.look(configs)]


def train(task: Task, tell: Tell) -> None:
    """Train them; tell each as it is ``Finished``.  What one raises is its own affair."""
    import torch

    from bpdiag import stacking, training

    torch.set_num_threads(1)
    begun = time.perf_counter()

    def told(at: int, came: Result | BaseException) -> None:
        if isinstance(came, KeyboardInterrupt) or getattr(came, "metrics", {}).get("stopped") == "interrupted":
            return  # kept, and not finished
        try:
            outcome = Failure.of(came) if isinstance(came, BaseException) else outcome_of(came, cured(came))
        except Exception as error:  # of the cure or the summary: this member's own, told with its traceback
            outcome = Failure.of(error)
        tell(Finished(task.members[at].number, outcome, time.perf_counter() - begun))

    folders = [Path(member.folder) for member in task.members]
    configs = [member.config for member in task.members]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    if task.together:
        stacking.train_stack(configs, folders, told=told)
        return
    for at, (config, folder) in enumerate(zip(configs, folders, strict=True)):
        try:
            came: Result | Exception = training.train(config, folder)
        except Exception as error:  # this member's own, told with its traceback
            came = error
        told(at, came)


def cured(result: Result, progress: Callable[[float, float, str], None] | None = None) -> Cure | None:
    """Remedies for a run with findings, tried for no longer than it took, and kept; None where none are asked for."""
    if not result.findings or not result.config.remedy.steps:
        return None
    from bpdiag.remedy import cure_run, keep

    told = result.config, result.trace, result.findings, result.metrics
    cure = cure_run(*told, no_dearer=True, progress=progress)
    assert result.folder is not None
    keep(cure, result.folder)
    return cure


def outcome_of(result: Result, cure: Cure | None) -> Outcome:
    """What a sweep's tables need of it.

    Raises:
        KeyboardInterrupt: It came while remedies were tried; what there is has been kept.
    """
    if cure is not None and cure.interrupted:
        raise KeyboardInterrupt
    return Outcome.of(result.trace, result.findings, result.metrics, flat(result.config))
