"""Runs of one shape, trained as one stack; each leaves the folder that it would have left alone.

A run's first step is measured by ``watch`` on an ordinary module too: the stack's own numbers take that trace's form.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from bpdiag import data, hooks, prediction, training
from bpdiag.backprop import Meter, Optimizer, Stack
from bpdiag.backprop.conv import Picture
from bpdiag.backprop.record import Record, samples
from bpdiag.config import Config, UsageError, planned_steps
from bpdiag.dashboard.writer import TAGS
from bpdiag.model import CHANNELS, KERNEL, PADDING, POOL, normalization
from bpdiag.rules import ACTIVATIONS
from bpdiag.runlog import RunLog
from bpdiag.session import watch
from bpdiag.trace import STEPS, Trace
from bpdiag.training import Result

PART = 64  # samples of a part of a trace, or what comes together in
SECONDS = 15.0
STACKABLE = ("mlp", "cnn")  # models whose sweep stands in ``backprop``
Told = Callable[[int, Result | BaseException], None]


def group(config: Config) -> Hashable | None:
    """What runs must have in common to be trained as one stack; None: this one is trained alone.

    Members of a stack may differ in seed, activation, how they begin, rate, decay, eps and clipping.

    Example:
        >>> from bpdiag.config import ModelConfig
        >>> group(Config(seed=1)) == group(Config(model=ModelConfig(activation="tanh")))
        True
        >>> group(Config(model=ModelConfig(depth=9))) == group(Config())
        False
        >>> group(Config(model=ModelConfig(activation="prelu"))) is None
        True
    """
    model, optimizer = config.model, config.optimizer
    rule = ACTIVATIONS.get(model.activation)
    stackable = model.name in STACKABLE and model.backward == "handwritten" and not config.watch.histograms
    if rule is None or rule.learnable or not stackable:
        return None
    alike = replace(
        config,
        seed=0,
        model=replace(model, activation="", weight_variance="", bias_variance=""),
        optimizer=replace(
            optimizer,
            lr=0.0,
            weight_decay=float(optimizer.weight_decay > 0),
            eps=0.0,
            clip=float(optimizer.clip > 0),
        ),
        watch=replace(config.watch, pictures=False),
        expect=[],
    )
    return repr(alike)


def bytes_of(config: Config, shape: tuple[int, int, int], classes: int) -> int:
    """Memory of one member: weights, what the optimizer keeps, room for gradients, a batch's activations, cotangents.

    Members beyond what goes through together (``backprop.stack.CHUNK``) share the room, and need less.

    Example:
        >>> from bpdiag.config import ModelConfig
        >>> bytes_of(Config(model=ModelConfig(depth=10, width=64)), (1, 28, 28), 10)
        1627512
    """
    model, batch = config.model, config.data.batch_size
    normalized = normalization(model) != "none"
    numbers, largest, parameters = 0, 0, []
    hidden, read = model.depth - 1, shape
    if model.name == "cnn":
        hidden -= len(CHANNELS)
        for channels, padding in zip(CHANNELS, PADDING, strict=True):
            picture = Picture(read, channels, (KERNEL, KERNEL), (padding, padding), POOL)
            places, patch = math.prod(picture.places), read[0] * KERNEL**2
            parameters.append(channels * (patch + 1))
            # of a layer and its norm, of the pool four tensors; of the first layer the patches that it reads
            numbers += places * (channels * (1 + normalized) + 4 * channels // POOL**2 + (0 if largest else patch))
            largest, read = max(largest, places * channels), (channels, *picture.windows)
    widths = [math.prod(read), *[model.width] * hidden, classes]
    parameters += [n_in * n_out + n_out for n_in, n_out in pairwise(widths)]
    # beside a layer's output: the norm's input and output, the activation's input, what a block adds up to
    kept = 1 + 2 * normalized + (ACTIVATIONS[model.activation].saves == "input") + (model.residual == "identity")
    numbers += kept * sum(widths[1:]) + 4 * max(largest, *widths[1:])
    copies = 3 if config.optimizer.name == "sgd" else 4  # the network itself is kept too
    rooms = max(parameters) + (sum(parameters) if config.optimizer.clip else max(parameters))
    return (8 if config.training.dtype == "float64" else 4) * (copies * sum(parameters) + rooms + batch * numbers)


def available() -> int:
    """Bytes of memory that a process of this machine, or of this container, may still take.

    Example:
        >>> available() > 0
        True
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # Linux: what its caches would give back counts too
        told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(told["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def _check_memory(configs: Sequence[Config], dataset: data.Dataset, where: torch.device) -> None:
    """What is free holds them.

    Raises:
        UsageError: It does not; with the number that fits.
    """
    each = bytes_of(configs[0], dataset.shape, dataset.classes)
    if where.type == "cuda":
        free = torch.cuda.mem_get_info(where)[0]
    elif where.type == "cpu" and hasattr(os, "sysconf"):
        free = available()
    else:
        return
    if each * len(configs) > free:
        needed, there = each * len(configs) / 1e9, free / 1e9
        raise UsageError(
            f"a stack of {len(configs)} networks needs {needed:.1f} GB of memory, {there:.1f} GB are free: "
            f"{max(free // each, 0)} fit"
        )


@dataclass(frozen=True)
class Look:
    """A run before its first step: D_1, decades between the last layer's cotangent and the first's."""

    predicted: float | None  # None: theory does not cover it
    measured: float  # nan: of a run that no stack takes, which is not looked at


def look(configs: Sequence[Config]) -> list[Look]:
    """One forward and backward sweep of each run that a stack takes, on its first batch, beside what theory expects.

    Example:
        >>> from bpdiag.config import ModelConfig
        >>> told = look([Config(model=ModelConfig(activation="sigmoid", weight_variance="torch", depth=10))])[0]
        >>> round(told.predicted, 1), abs(told.measured - told.predicted) < 0.5
        (-7.7, True)
    """
    found = [Look(None, math.nan)] * len(configs)
    together: dict[Hashable, list[int]] = {}
    for i, config in enumerate(configs):
        together.setdefault(group(config), []).append(i)
    for key, members in together.items():
        if key is not None:
            looks = _look([configs[i] for i in members])
            found = [looks[members.index(i)] if i in members else one for i, one in enumerate(found)]
    return found


def _look(configs: Sequence[Config]) -> list[Look]:
    """Of runs of one group."""
    with training.flushed_denormals(), training.threads(configs[0].training.threads):
        begun = [training.begin(config) for config in configs]
        dataset = begun[0].dataset
        seeds, stack = _stacked(configs, begun, Optimizer([0.0] * len(configs)))
        rows = [next(one.rows(config, 1)) for one, config in zip(begun, configs, strict=True)]
        first = [rows[[c.seed for c in configs].index(seed)] for seed in seeds]
        xs, ys = [dataset.train.x[r] for r in first], [dataset.train.y[r] for r in first]
        numbers = stack.look(xs, ys, Meter(len(configs), begun[0].where))
    with np.errstate(all="ignore"):
        measured = np.log10(numbers["g_z", 0] / numbers["g_z", stack.L - 1])
    expected = [_expected(config, dataset) for config in configs]
    return [Look(*both) for both in zip(expected, measured.tolist(), strict=True)]


def _expected(config: Config, dataset: data.Dataset) -> float | None:
    """What theory expects, if it covers this kind of net."""
    if config.model.name not in prediction.COVERED:
        return None
    return float(prediction.expect(config, prediction.source(dataset))["decades"][0])


def _stacked(
    configs: Sequence[Config], begun: Sequence[training.Begun], optimizer: Optimizer
) -> tuple[list[int], Stack]:
    """The stack of these runs, and the seeds whose batches it reads, in the order in which it wants them."""
    seeds = list(dict.fromkeys(config.seed for config in configs))
    rules = [ACTIVATIONS[config.model.activation] for config in configs]
    return seeds, Stack([one.net for one in begun], rules, optimizer, [seeds.index(c.seed) for c in configs])


@dataclass
class _Member:
    """One run of a stack."""

    number: int  # as it was given
    config: Config
    begun: training.Begun
    log: RunLog
    first: Trace  # of its first step
    metrics: dict[str, Any] = field(default_factory=lambda: {"stopped": None, "validation_accuracy_at": {}})


def train_stack(configs: Sequence[Config], folders: Sequence[Path | None], *, told: Told) -> None:
    """Train runs of one ``group`` as one stack.

    Each is told as it ends: its result, or what went wrong with it alone.  What goes wrong with the whole stack is
    raised, when those that have ended have been told.

    Args:
        configs: checked.
        folders: where each run folder is written.
        told: called with the place in ``configs`` and the result.
    """
    with training.flushed_denormals(), training.threads(configs[0].training.threads):
        _Training(configs, folders, told).run()


class _Training:
    """A stack being trained."""

    def __init__(self, configs: Sequence[Config], folders: Sequence[Path | None], told: Told) -> None:
        self.told, self.start, self.work = told, time.perf_counter(), time.process_time()
        self.shared = configs[0]  # for what all have in common
        self.dataset, self.where = training.load_data(self.shared), training.device(self.shared)
        _check_memory(configs, self.dataset, self.where)
        self.planned = planned_steps(self.shared, len(self.dataset.train))
        # neighbors share a batch and an activation
        order = sorted(range(len(configs)), key=lambda i: (configs[i].seed, configs[i].model.activation, i))
        self.members: list[_Member] = []
        firsts: dict[str, Trace] = {}
        for i in order:
            try:
                self.members.append(self._member(i, configs[i], folders[i], firsts))
            except (UsageError, OSError) as error:
                told(i, error)
        self.alive = [True] * len(self.members)
        self.record = Record(len(self.members))
        self.losses: list[Tensor] = []  # (K,) of each step since the last part
        self.done = 0  # steps
        self.away = 0.0, 0.0  # seconds, and of the processor, that members' ends took
        self.written = time.monotonic()

    def _batches(self, config: Config) -> Iterator[Tensor]:
        return training.batches(config, len(self.dataset.train), self.planned, self.where)

    def _member(self, number: int, config: Config, folder: Path | None, firsts: dict[str, Trace]) -> _Member:
        training.check_names(config)
        begun = training.begin(config)
        name = config.model.activation
        if name not in firsts:
            firsts[name] = self._first(config, begun)
        first = firsts[name]
        meta = first.meta | {"optimizer": hooks.describe([begun.optimizer]), **training.facts(config, self.dataset)}
        return _Member(number, config, begun, RunLog(folder, meta), replace(first, meta=meta))

    def _first(self, config: Config, begun: training.Begun) -> Trace:
        """A first step, on an ordinary module, watched."""
        alone = replace(begun, net=copy.deepcopy(begun.net))
        alone.optimizer = training.OPTIMIZERS[config.optimizer.name](alone.net.parameters(), config)
        watching = watch(alone.net, alone.optimizer, every=self.shared.watch.every, planned_steps=max(self.planned, 1))
        with watching:
            for rows in self._batches(config):
                alone.descend(config, watching.loss(alone.loss(rows)))
                break
        return watching.trace

    # ---- steps ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """All steps; then every member's end."""
        if not self.members:
            return
        configs, begun = [m.config for m in self.members], [m.begun for m in self.members]
        self.seeds, self.stack = _stacked(configs, begun, self._optimizer())
        self.meter = Meter(len(self.members), self.where)
        try:
            self._steps()
        except KeyboardInterrupt:
            self._end_all("interrupted")
            raise
        if self._end_all(None):
            raise KeyboardInterrupt

    def _optimizer(self) -> Optimizer:
        of, shared = [m.config.optimizer for m in self.members], self.shared.optimizer
        return Optimizer(
            [o.lr for o in of],
            name=shared.name,
            momentum=shared.momentum,
            nesterov=shared.nesterov,
            decay=[o.weight_decay for o in of] if shared.weight_decay else (),
            eps=[o.eps for o in of],
            clip=[o.clip for o in of] if shared.clip else (),
        )

    def _steps(self) -> None:
        train, warmup = self.dataset.train, self.shared.optimizer.warmup
        batches = [self._batches(replace(self.shared, seed=seed)) for seed in self.seeds]
        for step, several in enumerate(zip(*batches, strict=True)):
            if step < warmup:
                self.stack.set_rate([m.config.optimizer.lr * (step + 1) / warmup for m in self.members])
            xs, ys = [train.x[rows] for rows in several], [train.y[rows] for rows in several]
            sampled = step % self.shared.watch.every == 0
            if step == 0:
                self.stack.look(xs, ys, self.meter)
            self.stack.step(xs, ys, self.meter if sampled else None)
            self.losses.append(self.stack.losses.clone())
            self.done = step + 1
            if sampled:
                self._sample(step, len(ys[0]))
            self._validate()
            if not any(self.alive):
                return

    def _sample(self, step: int, batch: int) -> None:
        numbers = self.meter.read(self.stack.units)
        numbers["rate", 0] = np.array(self.stack.update.host_rate)
        self.record.add(step, batch, numbers, self.meter)
        self.stack.adjust(numbers)
        for k, loss in enumerate(self.losses[-1].tolist()):
            if self.alive[k] and not math.isfinite(loss):
                self._end(k, f"the loss was not finite at step {step}")
        if len(self.record) >= PART or time.monotonic() - self.written > SECONDS:
            self._write_parts()

    def _validate(self) -> None:
        epoch = self.done % -(-len(self.dataset.train) // self.shared.data.batch_size) == 0
        for k, member in enumerate(self.members):
            if self.alive[k] and (epoch or member.config.remedy.steps == self.done):
                self.stack.give_back(k, member.begun.net)
                reached = training.accuracy(member.begun.net, self.dataset.validation)
                member.metrics["validation_accuracy_at"][str(self.done)] = reached
                with self._own_affair(k):
                    member.log.scalars({"accuracy/validation": reached}, self.done)

    @contextmanager
    def _own_affair(self, k: int) -> Iterator[None]:
        """What goes wrong with a member's folder ends this member alone."""
        try:
            yield
        except OSError as error:
            self.alive[k] = False
            self.told(self.members[k].number, error)
            with contextlib.suppress(OSError):
                self.members[k].log.release()

    # ---- what is kept --------------------------------------------------------------------------------

    def _write_parts(self) -> None:
        losses = self._host_losses()
        with _held_interrupts():  # or some would have the part, and take it again as they end
            for k, member in enumerate(self.members):
                if self.alive[k]:
                    with self._own_affair(k):
                        self._write_part(k, member, losses[:, k])
            self.record.clear()
            self.losses, self.written = [], time.monotonic()

    def _host_losses(self) -> np.ndarray:
        return torch.stack(self.losses).cpu().double().numpy() if self.losses else np.empty((0, len(self.members)))

    def _write_part(self, k: int, member: _Member, losses: np.ndarray) -> None:
        scales = [layer.scale for layer in self.stack.layers]
        part = self.record.take(k, member.first, scales)
        rate = dict(zip(part.sampled_steps.tolist(), self.record.rates(k), strict=True))
        steps = range(self.done - len(losses), self.done)
        columns = {
            "step": pa.array(steps, pa.int64()),
            "loss": pa.array(losses),
            "learning_rate": pa.array([rate.get(step) for step in steps], pa.float64()),
            "loss_scale": pa.array([1.0 if step in rate else None for step in steps], pa.float64()),
        }
        nothing = {f.name: pa.nulls(len(losses), f.type) for f in STEPS if f.name not in columns}
        part.steps_table = pa.table({f.name: {**columns, **nothing}[f.name] for f in STEPS}, schema=STEPS)
        member.log.traces.append(part)
        if member.log.board is not None:
            for sample in samples(part, list(TAGS), losses.tolist(), steps.start):
                member.log.board.write(sample)
            for step in range(max(steps.start, max(rate, default=-1) + 1), steps.stop):  # after the last sample
                member.log.board.add_scalars({"loss/train": float(losses[step - steps.start])}, step)

    def _end_all(self, why: str | None) -> bool:
        """The end of all that have not ended; whether it was interrupted, which costs nobody anything."""
        interrupted = False
        for k in range(len(self.members)):
            if self.alive[k]:
                try:
                    self._end(k, why)
                except KeyboardInterrupt:
                    interrupted = True
        return interrupted

    def _end(self, k: int, why: str | None) -> None:
        """A member's last part, what it knows, what is found; what goes wrong with it is told as its own."""
        member, self.alive[k] = self.members[k], False
        begun, work = time.perf_counter(), time.process_time()
        took, worked = begun - self.start - self.away[0], work - self.work - self.away[1]
        came: Result | Exception
        with _held_interrupts():
            try:
                came = self._result(k, member, why)
                share, whole = 1 / len(self.members), self.planned / max(self.done, 1)
                own, own_work = time.perf_counter() - begun, time.process_time() - work
                came.metrics["stack"] = len(self.members)
                came.metrics["seconds"] = round(took * share + own, 3)
                came.metrics["processor_seconds_planned"] = round(worked * share * whole + own_work, 3)
                came.keep(self.dataset)
            except Exception as error:  # a full disk is an OSError or, of torch's, a RuntimeError; the others go on
                came = error
            finally:
                with contextlib.suppress(OSError):
                    member.log.release()
        try:
            self.told(member.number, came)
        finally:  # the others' time has stood still
            self.away = self.away[0] + time.perf_counter() - begun, self.away[1] + time.process_time() - work

    def _result(self, k: int, member: _Member, why: str | None) -> Result:
        log, net, metrics = member.log, member.begun.net, member.metrics
        log.steps = metrics["steps"] = self.done
        metrics["stopped"] = why
        self._write_part(k, member, self._host_losses()[:, k])
        self.stack.give_back(k, net)
        training.examine(log, net, member.config, self.dataset, metrics)
        log.close(steps=metrics["steps"])
        return training.conclude(log.trace, net, member.config, log.folder, metrics)


@contextmanager
def _held_interrupts() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: it is short, and half of it would be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread is interrupted
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
