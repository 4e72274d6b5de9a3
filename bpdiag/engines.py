"""Where the work of a sweep is done: in processes of this machine, on a Ray cluster, through a queue of submitit's.

An engine is given tasks and yields what is told of each as it comes.  It knows neither Hydra nor torch nor what a task
is: ``work(task, tell)`` is any function that another process can import.  A process that is killed loses its own task
only, and says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from bpdiag.config import UsageError, choose

METHOD = "forkserver" if sys.platform == "linux" else "spawn"  # macOS's own libraries do not survive a fork
FAREWELL = 30.0  # seconds that an interrupted process has for keeping what there is
POLL = 0.5  # seconds between two looks at a queue

Tell = Callable[[Any], None]
Work = Callable[[Any, Tell], None]


@dataclass(frozen=True)
class Failure:
    """An exception, in words that travel between processes."""

    error: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Its type and message on one line, and where it came from."""
        return cls(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


@dataclass(frozen=True)
class Told:
    """What a task said of itself."""

    what: Any


@dataclass(frozen=True)
class Ended:
    """A task is over: ``failure`` says what it raised, ``lost`` how the process that did it was killed."""

    failure: Failure | None = None
    lost: str = ""


Event = tuple[Any, Told | Ended]


class Engine(Protocol):
    """Tasks may be submitted while events are read; ``events`` ends when every task has."""

    processes: int  # among which work should be divided

    def submit(self, task: Any) -> None:
        """Do it after those submitted before."""

    def events(self) -> Iterator[Event]:
        """What comes of each task, as it comes."""

    def interrupt(self) -> None:
        """Forget what has not begun, and let what has begun keep what there is."""

    def close(self) -> None:
        """Nothing is left running."""


# ---- this machine -----------------------------------------------------------------------------------------


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Local:
    """At most so many processes, each with a task at a time.

    On Linux they are forked of one server that has imported ``preload``: what takes seconds is done once, while the
    caller does something else, and its memory is shared.
    """

    def __init__(self, work: Work, processes: int, preload: Sequence[str] = ()) -> None:
        self.work, self.processes = work, processes
        self._context: Any = multiprocessing.get_context(METHOD)
        self._waiting: deque[Any] = deque()
        self._idle: list[tuple[Connection, Any]] = []
        self._busy: dict[Connection, tuple[Any, Any]] = {}  # the task and its process
        if METHOD == "forkserver":
            from multiprocessing import forkserver

            self._context.set_forkserver_preload(list(preload))
            with _apart():
                forkserver.ensure_running()

    def submit(self, task: Any) -> None:
        """Do it after those submitted before."""
        self._waiting.append((self.work, task))

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The value of a function in one of the processes.

        Raises:
            RuntimeError: It raised, or its process was killed.
        """
        self._waiting.appendleft((_answer, (function, arguments)))
        answer = None
        for _, event in self.events():
            if isinstance(event, Told):
                answer = event.what
            elif event.failure or event.lost:
                raise RuntimeError(event.failure.trace if event.failure else f"the process {event.lost}")
        return answer

    def events(self) -> Iterator[Event]:
        """What comes of each task, as it comes."""
        while self._waiting or self._busy:
            self._deal()
            for end in connection.wait(list(self._busy)):
                assert isinstance(end, Connection)
                task, process = self._busy[end]
                try:
                    event = end.recv()
                except (EOFError, OSError, pickle.UnpicklingError):
                    del self._busy[end]
                    end.close()
                    process.join()
                    event = Ended(lost=_how(process.exitcode))
                else:
                    if isinstance(event, Ended):
                        del self._busy[end]
                        self._idle.append((end, process))
                yield task, event

    def _deal(self) -> None:
        while self._waiting and len(self._busy) < self.processes:
            end, process = self._idle.pop() if self._idle else self._begun()
            work, task = self._waiting.popleft()
            try:
                end.send((work, task))
            except OSError:  # killed while it had nothing to do
                self._waiting.appendleft((work, task))
                continue
            self._busy[end] = (task, process)

    def _begun(self) -> tuple[Connection, Any]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        with _apart():
            process.start()
        theirs.close()
        return ours, process

    def interrupt(self) -> None:
        """Forget what has not begun, and let what has begun keep what there is."""
        self._waiting.clear()
        for _, process in self._busy.values():
            process.terminate()
        latest = time.monotonic() + FAREWELL
        for _, process in self._busy.values():
            process.join(max(0.0, latest - time.monotonic()))

    def close(self) -> None:
        """Nothing is left running."""
        for end, process in [*self._idle, *((end, process) for end, (_, process) in self._busy.items())]:
            end.close()
            process.kill()  # one that has nothing to do has nothing to lose, and torch takes long to take its leave
            process.join()
        self._idle.clear()
        self._busy.clear()


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """What is started inside hears no Ctrl-C of the terminal (its parent passes one on, once), nor runs our script."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    heard = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if heard else None
    try:
        yield
    finally:
        if heard:
            signal.signal(signal.SIGINT, before)
        sys.modules["__main__"] = main


def _serve(end: Connection) -> None:
    """A process's life: a task at a time, until there are no more or the parent is gone."""
    interrupted = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt  # as if Ctrl-C had been pressed here

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while not interrupted:  # also where the work made something else of it
            work, task = end.recv()
            end.send(_done(work, task, lambda what: end.send(Told(what))))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _done(work: Work, task: Any, tell: Tell) -> Ended:
    try:
        work(task, tell)
    except Exception as error:  # whatever it is, it is told with its traceback, and the engine goes on
        return Ended(Failure.of(error))
    return Ended()


def _answer(task: Any, tell: Tell) -> None:
    function, arguments = task
    tell(function(*arguments))


def _how(exitcode: int | None) -> str:
    """How a process ended that should not have.

    Example:
        >>> _how(-9), _how(3)
        ('was killed by SIGKILL (out of memory?)', 'ended with exit code 3')
    """
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with exit code {exitcode}"


# ---- many machines ----------------------------------------------------------------------------------------


def gathered(work: Work, task: Any) -> list[Told | Ended]:
    """All that a task says, and its end: for engines that bring it home when it is over."""
    said: list[Told | Ended] = []
    said.append(_done(work, task, lambda what: said.append(Told(what))))
    return said


class Ray:
    """Tasks of one core each, on a Ray cluster: the one of RAY_ADDRESS, or one begun here."""

    def __init__(self, work: Work, processes: int | None, options: dict[str, Any]) -> None:
        import ray

        self._ray, self._own = ray, not ray.is_initialized()
        if self._own:
            quiet = {"log_to_driver": False, "logging_level": "ERROR"}
            here = {} if "RAY_ADDRESS" in os.environ or "address" in options else {"num_cpus": processes or cores()}
            ray.init(**{**quiet, **here, **options})
        self.processes = processes or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # ours to try again, as only we know what a lost task has left in its folders
        self._remote = ray.remote(num_cpus=1, max_retries=0)(gathered)
        self._work, self._tasks = work, dict[Any, Any]()

    def submit(self, task: Any) -> None:
        """Do it after those submitted before."""
        self._tasks[self._remote.remote(self._work, task)] = task

    def events(self) -> Iterator[Event]:
        """What comes of each task, when it is over."""
        while self._tasks:
            (done, *_), _ = self._ray.wait(list(self._tasks), num_returns=1)
            task = self._tasks.pop(done)
            try:
                said = self._ray.get(done)
            except self._ray.exceptions.RayTaskError as error:  # it could not even be begun there
                said = [Ended(Failure.of(error))]
            except self._ray.exceptions.RayError as error:  # the worker, its node or its memory is gone
                said = [Ended(lost=f"was lost ({type(error).__name__})")]
            for event in said:
                yield task, event

    def interrupt(self) -> None:
        """Forget what has not begun, and let what has begun keep what there is."""
        for reference in self._tasks:
            self._ray.cancel(reference)
        if self._tasks:
            self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=FAREWELL)

    def close(self) -> None:
        """Nothing is left running."""
        if self._own:
            self._ray.shutdown()


class Submitit:
    """Tasks as jobs of a queue: SLURM's where there is one, else processes of this machine."""

    def __init__(self, work: Work, processes: int | None, options: dict[str, Any], folder: Path) -> None:
        import submitit

        given = dict(options)
        self._executor = submitit.AutoExecutor(folder=folder, cluster=given.pop("cluster", None))
        self._executor.update_parameters(**{"timeout_min": 24 * 60, "cpus_per_task": 1, **given})
        self._errors = submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError
        here = self._executor.cluster == "local"
        self.processes = processes or (cores() if here else 1)  # a queue takes stacks as large as they may be
        self._most = self.processes if here else sys.maxsize  # here a job begins when it is submitted
        self._work, self._waiting, self._jobs = work, deque[Any](), list[tuple[Any, Any]]()

    def submit(self, task: Any) -> None:
        """Do it after those submitted before."""
        self._waiting.append(task)

    def events(self) -> Iterator[Event]:
        """What comes of each task, when it is over."""
        while self._waiting or self._jobs:
            begun = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._most - len(self._jobs)))]
            if begun:
                with self._executor.batch():
                    jobs = [self._executor.submit(gathered, self._work, task) for task in begun]
                self._jobs += zip(jobs, begun, strict=True)
            over = [(job, task) for job, task in self._jobs if job.done()]
            self._jobs = [pair for pair in self._jobs if pair not in over]
            for job, task in over:
                try:
                    said = job.result()
                except self._errors as error:
                    said = [Ended(lost=f"was lost ({type(error).__name__}; its words are in {job.paths.stderr})")]
                for event in said:
                    yield task, event
            if not over:
                time.sleep(POLL)

    def interrupt(self) -> None:
        """Forget what has not begun, and let what has begun keep what there is."""
        self._waiting.clear()
        self.close()

    def close(self) -> None:
        """Nothing is left running."""
        for job, _ in self._jobs:
            job.cancel()


ENGINES = ("local", "ray", "submitit")
EXTRAS = {"ray": "ray", "submitit": "slurm"}  # what to install for an engine


def require(engine: str) -> None:
    """The engine is known and what it needs is installed.

    Raises:
        UsageError: It is not.
    """
    choose("hydra.launcher.engine", engine, ENGINES)
    if engine in EXTRAS and importlib.util.find_spec(engine) is None:
        raise UsageError(
            f"hydra.launcher.engine={engine}: {engine} is not installed; pip install 'bpdiag[{EXTRAS[engine]}]'"
        )
