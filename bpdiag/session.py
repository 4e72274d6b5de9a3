"""watch(model, optimizer): the public face of measuring.  Recorder + sinks, opened and closed together; a report."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

import bpdiag
from bpdiag import hooks, terminal
from bpdiag.config import UsageError
from bpdiag.runlog import RunLog
from bpdiag.trace import Trace


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    every: int = 1,
    planned_steps: int | None = None,
    log: str | os.PathLike[str] | None = None,
    histograms: bool = False,
    scaler: torch.amp.GradScaler | None = None,
    max_overhead: float | None = None,
) -> Watch:
    """Measure every layer of ``model`` on steps 0, N, 2N, ... of the block.

    A step ends when the optimizer has stepped, of several when all have, in whatever order and however often each does;
    one that has not stepped in the last 8 steps of another is not waited for, and until that is known those 8 and the
    next are recorded as one step and counted as 9.  Without an optimizer it ends at ``watch.step()``, with a gradient
    scaler at its ``update``, also where it skipped the step.  A loss that is told (``watch.loss``) before its
    backward tells its scale too, which is divided out of the cotangents and kept as ``loss_scale``.  Watching
    changes no result by a bit, and leaving the block, also by an exception, leaves the model as it was.

    Args:
        model: any module.  What torch.compile made of it, or of parts of it, runs eagerly on the steps measured, and
            equal to the compiled one within rounding.
        optimizer: one, several, or none.
        every: N; on the other steps no module has a hook.
        planned_steps: the length of the training, by which harm is judged; 1,000 where it is not given.
        log: a folder for the trace, TensorBoard's event file and, on leaving, findings.json and summary.json.
            Of several processes each needs its own.
        histograms: also of every layer's output, weights and their gradients, for TensorBoard; of the finite numbers,
            the others are counted.
        scaler: the gradient scaler that steps the optimizers, so that skipped steps are known.
        max_overhead: pick N by itself, the least with which watching lengthens a step by no more than this share, on
            average and as measured while it runs: 0.02 is 2 %.  The first steps are for measuring and cost more.

    Raises:
        UsageError: ``every`` or ``planned_steps`` is below 1, ``max_overhead`` is no share or given beside ``every`` or
            in one of several processes, or an optimizer or a scaler is none.
        TraceError: ``log`` already holds a run.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with watch(model, optimizer) as watching:
        ...     loss = watching.loss(model(torch.ones(3, 4)).square().mean())
        ...     loss.backward()
        ...     optimizer.step()
        >>> [layer.key for layer in watching.trace.layers]
        ['0#0', '1#0', '2#0']
    """
    optimizers = [] if optimizer is None else [optimizer] if not isinstance(optimizer, Sequence) else list(optimizer)
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise UsageError(f"optimizer: a torch.optim.Optimizer, several, or None; got {type(one).__name__}")
    if len({id(one) for one in optimizers}) < len(optimizers):
        raise UsageError("optimizer: one of them is given twice; each counts its own steps")
    if log is not None and not isinstance(log, str | os.PathLike):
        raise UsageError(f"log: a folder's path or None; got {type(log).__name__}")
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: a torch.nn.Module; got {type(model).__name__}")
    for name, value in (("every", every), ("planned_steps", planned_steps)):
        whole = hasattr(type(value), "__index__") and not isinstance(value, bool)  # numpy's integers too
        if value is not None and not (whole and value >= 1):
            raise UsageError(f"{name}={value!r}: must be a whole number, 1 or more")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise UsageError(f"scaler: a torch.amp.GradScaler or None; got {type(scaler).__name__}")
    if max_overhead is not None:
        _check_limit(max_overhead, every)
    return Watch(model, optimizers, hooks.Pace(every, max_overhead), planned_steps, log, histograms, scaler)


def _check_limit(max_overhead: float, every: int) -> None:
    real = isinstance(max_overhead, int | float) and not isinstance(max_overhead, bool)
    if not (real and 0 < max_overhead <= 1):
        raise UsageError(f"max_overhead={max_overhead!r}: a share of a step's time, above 0 and at most 1; 0.02 is 2 %")
    if every != 1:
        raise UsageError(f"max_overhead={max_overhead!r} picks every by itself; leave out every={every}")
    if _processes().get("processes", 1) > 1:
        raise UsageError("max_overhead: several processes must sample the same steps; give them every instead")


def _processes() -> dict[str, int]:
    """Which process of how many this is, where there are several."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {"rank": torch.distributed.get_rank(), "processes": torch.distributed.get_world_size()} if there else {}


class Watch:
    """What ``watch`` returns: a context manager that measures while its block runs."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        pace: hooks.Pace,
        planned_steps: int | None,
        log: str | os.PathLike[str] | None,
        histograms: bool = False,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.folder, self._histograms, self._scaler = log, histograms and log is not None, scaler
        self._open: Callable[[], None] = lambda: self._begin(model, optimizers, pace, planned_steps)
        self._recorder: hooks.Recorder | None = None

    def _begin(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], pace: hooks.Pace, planned_steps: int | None
    ) -> None:
        meta = {
            "every": pace.every,
            **({} if pace.max_overhead is None else {"max_overhead": pace.max_overhead}),
            "planned_steps": planned_steps,
            "optimizer": hooks.describe(optimizers),
            "model": type(model).__name__,
            **_processes(),
            "scaler": self._scaler is not None,
            "provenance": {
                "steps": "sampled: 0, N, 2N, ... with N = every; with max_overhead first those that N was found by, "
                "and every is the last N; the loss of every step that told it",
                "cotangents": "of the loss told before its backward: its scale (loss_scale of a step) is divided out; "
                "where that is null the scale is unknown and they are as the backward delivers them",
                "weight_gradients": "g_W_norm as the optimizer meets them, averaged where a wrapper averages over "
                "processes; g_W_raw_norm as the backward of this process left them; of a sharded weight the whole's",
                "passes": "several forward passes in a step are kept apart as backward 0, 1, ...",
            },
            "versions": {
                "bpdiag": bpdiag.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        }
        self._kept = RunLog(self.folder, meta)
        self._recorder = hooks.Recorder(model, optimizers, self._kept.sinks, pace, self._histograms, self._scaler)
        self._recorder.start()

    def __enter__(self) -> Watch:
        if self._recorder is not None:
            raise UsageError("this watch has been used; call bpdiag.watch again")
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        recorder = self._running()
        try:
            recorder.stop()
            self._kept.steps = recorder.step
            self._kept.close(unseen=recorder.unseen(), every=recorder.pace.every, steps=recorder.step)
        finally:
            self._kept.release()

    def loss(self, loss: Tensor) -> Tensor:
        """Note the step's loss, of every step, and return it; read by the host with the next sample."""
        if not isinstance(loss, Tensor | float | int):
            raise UsageError(f"watch.loss takes the loss, a tensor or a number; got {type(loss).__name__}")
        self._running().add_loss(loss)
        if isinstance(loss, Tensor) and loss.grad_fn is not None:
            meta = self._kept.traces.meta
            if "loss" not in meta:
                meta["loss"] = hooks.kind_of_loss(loss)
            meta["loss_path"] = self._running().loss_path
        return loss

    def step(self) -> None:
        """End the step: for loops without an optimizer."""
        self._running().end_step()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers of your own for the dashboard: an accuracy, a learning rate."""
        self._running()
        self._kept.scalars(values, step)

    def image(self, tag: str, png: bytes) -> None:
        """A picture of your own for the dashboard, a PNG."""
        self._kept.steps = self.steps
        self._kept.image(tag, png)

    def note(self, **facts: Any) -> None:
        """Facts for the trace's meta.json: what built the model, say."""
        self._running()
        self._kept.traces.meta.update(facts)

    def report(self) -> None:
        """Print what a run of ours ends with: the last measured step layer by layer, the verdict, the notes."""
        self._running()
        terminal.report(self.trace, self._kept.findings(), self.folder, terminal.console())

    @property
    def last_loss(self) -> float:
        """The loss of the last sampled step that has ended; nan before the first.  Costs no further host read."""
        return self._running().last_loss

    @property
    def last_decades(self) -> float:
        """log10 of the share of the output's gradient that reached the lowest layer, in the last sample; nan: none."""
        told = self._running().last_sample
        weighty = [values for _, index, values in told.rows if told.layers[index].is_weight_layer] if told else []
        return float(next((values["decades"] for values in weighty if "decades" in values), math.nan))

    @property
    def steps(self) -> int:
        """How many steps have ended."""
        return self._running().step

    @property
    def trace(self) -> Trace:
        """All that was measured so far: inside the block a snapshot."""
        self._kept.traces.meta["every"] = self._running().pace.every
        return self._kept.trace

    def _running(self) -> hooks.Recorder:
        if self._recorder is None:
            raise UsageError("not begun: use it as `with bpdiag.watch(model, optimizer) as watch:`")
        return self._recorder
