"""One training of a copy, measured: its loss, its gradients at both ends of it, what the judge says of them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bpdiag.diagnosis import Finding, diagnose, profile, summarize
from bpdiag.session import watch
from bpdiag.trace import Trace

Tell = Callable[[Tensor], Tensor]
LAST = 10  # the loss of a trial is the mean of its last tenth,
FEWEST = 5  # of so many steps at least


class OutOfTimeError(Exception):
    """The time for trying is over."""


@dataclass
class Training:
    """What one trial trains: made anew from the seed, thrown away afterwards."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Tell], None]  # the next step, its loss told before its backward
    accuracy: Callable[[], float]  # of the model as it is now; nan where none can be measured
    losses: list[float] = field(default_factory=list)  # of the steps so far


@dataclass(frozen=True)
class Outcome:
    """What came of a trial."""

    steps: int  # asked for
    loss: float = math.nan  # mean of the last tenth; nan where one was not finite
    first_loss: float = math.nan
    decades: float = math.nan  # of the first layer, at the last finite sample
    accuracy: float = math.nan  # of a whole trial
    harms: tuple[str, ...] = ()  # kinds of the harm found
    seconds: float = 0.0  # of the processor
    step_seconds: float = 0.0  # of a step that is not watched, the median; 0 where there were too few
    made: int = 0  # of the steps, in this leg
    error: str = ""  # why it could not be tried


def last_loss(losses: Sequence[float]) -> float:
    """Mean of the last tenth, five steps at least; nan where one is not finite, or there is none.

    Example:
        >>> last_loss([9.0, 2.0, 2.0, 1.0, 2.0, 3.0])
        2.0
    """
    last = losses[-max(FEWEST, len(losses) // LAST) :]
    return sum(last) / len(last) if last and math.isfinite(sum(last)) else math.nan


def measure(training: Training, steps: int, planned: int, left: Callable[[], float], whole: bool = True) -> Outcome:
    """Train on until there were ``steps``, watched at the first and the last of them, and judge as over ``planned``.

    Stops where the loss is not finite.

    Raises:
        OutOfTimeError: No seconds are ``left``.
    """
    losses, more = training.losses, steps - len(training.losses)
    ends = [begun := time.process_time()]

    with watch(training.model, training.optimizer, every=max(more - 1, 1), planned_steps=planned) as watching:

        def tell(loss: Tensor) -> Tensor:
            losses.append(float(loss.detach()))
            return watching.loss(loss)

        while len(losses) < steps and all(map(math.isfinite, losses[-1:])):
            if left() < 0:
                raise OutOfTimeError
            training.step(tell)
            ends.append(time.process_time())
    trace = watching.trace
    findings = diagnose(trace) if len(trace.sampled_steps) else []
    return Outcome(
        steps=steps,
        loss=last_loss(losses),
        first_loss=losses[0] if losses else math.nan,
        decades=summarize(trace, findings)["decades_first_layer"],
        accuracy=training.accuracy() if whole else math.nan,
        harms=tuple(f.kind for f in findings if f.severity == "harm"),
        seconds=time.process_time() - begun,
        made=more,
        step_seconds=float(np.median(np.diff(ends))) if len(ends) > FEWEST else 0.0,
    )


def reached(trace: Trace, findings: Sequence[Finding], accuracies: Mapping[int, float], steps: int) -> Outcome:
    """What a training that was watched had come to after so many steps; its accuracy where it was measured then."""
    at, losses = trace.losses
    told = losses[at < steps]
    p = profile(trace)
    seen = np.flatnonzero((p.steps < steps) & p.finite)
    return Outcome(
        steps=steps,
        loss=last_loss(told.tolist()),
        first_loss=float(told[0]) if len(told) else math.nan,
        decades=float(p.decades[seen[-1], 0]) if seen.size and p.lines else math.nan,
        accuracy=accuracies.get(steps, math.nan),
        harms=tuple(f.kind for f in findings if f.severity == "harm"),
    )


class Randomness:
    """A stream of random numbers of torch, numpy and Python that goes on where it stopped."""

    def __init__(self, seed: int) -> None:
        with seeded(seed):
            self.state = _states()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Draws inside are this stream's; outside all is as it was, to the bit."""
        outside = _states()
        _set(self.state)
        try:
            yield
        finally:
            self.state = _states()
            _set(outside)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The random numbers of torch, numpy and Python from ``seed`` inside; as before afterwards, to the bit."""
    outside = _states()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        _set(outside)


def _states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _set(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
    np.random.set_state(states[2])
    random.setstate(states[3])
