"""cure(make_model, data, loss, make_optimizer): remedies tried for a training of anybody's, which is left untouched."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bpdiag
from bpdiag.config import UsageError
from bpdiag.diagnosis import Finding, diagnose
from bpdiag.remedy import snippets
from bpdiag.remedy.candidate import PLACES, Candidate
from bpdiag.remedy.search import LEAST_STEPS, Cure, Progress, Search, Terms
from bpdiag.remedy.trial import LAST, Outcome, Randomness, Tell, Training, reached, seeded
from bpdiag.session import watch
from bpdiag.training import flushed_denormals
from bpdiag.trial import of_model_and_batch

SEEDS = (0, 1, 2)
ASSUMED_STEPS = 1_000  # over which harm is judged, as of a run whose length is not told
LARGE = 10_000_000  # parameters: of larger models no trial waits in memory for its next round
PROBED = 4  # steps, to see how long one takes
# Whole trials that a search takes the time of: the training as it is, three seeds, and what is dropped on the way.
WHOLE = 8
SAMPLES = 10  # of the training as it is, where no findings are given
Loss = Callable[..., Tensor]


def cure(
    make_model: Callable[[], nn.Module] | nn.Module,
    data: Iterable[Any],
    loss: Loss,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    findings: Sequence[Finding] | None = None,
    *,
    steps: int = 200,
    seconds: float = 60.0,
    progress: Progress | None = None,
) -> Cure:
    """Try what may mend a training, on copies: before and after, and the lines of Python that made the difference.

    Every trial begins from the same seed, in the same order of the data.  Nothing of the caller's is changed: neither a
    model that is given (copies are trained), nor the data, nor the state of torch's, numpy's and Python's random
    numbers.  An interrupt (Ctrl-C) ends the search and returns what it has.

    Args:
        make_model: makes the model, or the model itself.
        data: batches; a list or a loader is read anew for each trial, an iterator as far as ``steps`` batches, which
            are kept.
        loss: (model, batch) -> the scalar to fall; or one of torch's, or any of (output, targets), where a batch is a
            pair of inputs and targets.
        make_optimizer: model -> its optimizer.
        findings: what ``diagnose`` said of the training; None: it is watched for ``steps`` first.
        steps: of a whole trial, 50 or more; fewer are made, and that is said, where the time is short.
        seconds: for all of them.
        progress: called before every trial with (seconds passed, seconds allowed, what is tried).

    Raises:
        UsageError: What was given cannot be trained or copied.

    Example:
        >>> make = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch = torch.eye(4), torch.tensor([0, 1, 0, 1])
        >>> loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> cure(make, [batch], loss, lambda model: torch.optim.SGD(model.parameters(), 0.5)).notes
        ['nothing was found that needs a remedy']
    """
    if steps < LEAST_STEPS:
        raise UsageError(f"steps={steps}: too few to see a remedy work; {LEAST_STEPS} or more")
    if not seconds > 0:
        raise UsageError(f"seconds={seconds}: no time to try anything; more than 0")
    end = time.perf_counter() + seconds
    with seeded(SEEDS[0]), flushed_denormals():
        subject = Subject(make_model, data, loss, make_optimizer, steps)
        steps = subject.affordable(steps, seconds)
        found, before = subject.watched(steps, end) if findings is None else (list(findings), None)
        subject.clears = not any(f.kind == "stale_gradient" for f in found)
        if not found:
            return Cure(notes=[*subject.notes, "nothing was found that needs a remedy"])
        tried = subject.candidates(found)
        if not tried:
            kinds = ", ".join(dict.fromkeys(f.kind for f in found))
            return Cure(notes=[*subject.notes, f"no change of the training mends {kinds}: nothing was tried"])
        terms = Terms(steps, SEEDS, max(end - time.perf_counter(), 0.0), ASSUMED_STEPS, resume=subject.size < LARGE)
        told = Search(subject.start, tried, terms, progress, before).run()
        told.notes = [*subject.notes, *told.notes]
        return told


class Subject:
    """A training of the caller's, begun anew as often as asked."""

    def __init__(self, make_model: Any, data: Iterable[Any], loss: Loss, make_optimizer: Any, steps: int) -> None:
        self.notes: list[str] = []
        self.clears = True  # gradients before every backward
        self.make_optimizer = make_optimizer
        self.make = self._maker(make_model)
        self.data = self._replayable(data, steps)
        self.loss = of_model_and_batch(loss, self._model(SEEDS[0]), self.first)
        self.size = sum(p.numel() for p in self._model(SEEDS[0]).parameters())

    def _maker(self, given: Any) -> Callable[[], nn.Module]:
        """What makes the model, equal from equal seeds; never the caller's own model."""
        if isinstance(given, nn.Module):
            self.notes.append("the model was given, not how it is made: seeds differ in the order of the data alone")
            return partial(_copy, given)
        if not callable(given):
            raise UsageError(f"make_model: a function that makes a model, or a model; got {type(given).__name__}")
        one, other = (self._made(given) for _ in range(2))
        if one is other:
            self.notes.append("make_model gives the same model each time: copies of it are tried, as it is now")
            return partial(_copy, one)
        if not _equal(one, other):
            self.notes.append(
                "make_model gives other weights from the same seed (of torch, numpy and Python): "
                "copies of its first model are tried"
            )
            return partial(_copy, one)
        return partial(self._made, given, None)

    @staticmethod
    def _made(make: Callable[[], Any], seed: int | None = SEEDS[0]) -> nn.Module:
        if seed is not None:
            with seeded(seed):
                return Subject._made(make, None)
        made = make()
        if not isinstance(made, nn.Module):
            raise UsageError(f"make_model gives a {type(made).__name__}; it must give a torch.nn.Module")
        return made

    def _replayable(self, data: Any, steps: int) -> Any:
        """What can be read again and again."""
        if isinstance(data, Tensor) or (isinstance(data, tuple) and any(isinstance(x, Tensor) for x in data)):
            raise UsageError("data: it must be batches to go through, this is one batch; write [batch]")
        try:
            batches = iter(data)
        except TypeError:
            raise UsageError(f"data: it must be batches to go through; got {type(data).__name__}") from None
        if batches is data:
            data = list(itertools.islice(batches, steps))
            self.notes.append(f"the data cannot be read twice: their first {len(data)} batches were kept and are used")
        with seeded(SEEDS[0]):
            self.first = next(iter(data), None)
        if self.first is None:
            raise UsageError("data: there is no batch in it")
        return data

    def _batches(self) -> Iterator[Any]:
        """Without end."""
        while True:
            yield from self.data

    def _model(self, seed: int) -> nn.Module:
        with seeded(seed):
            return self.make()

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = self.make_optimizer(model)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UsageError(f"make_optimizer gives a {type(optimizer).__name__}; it must give a torch optimizer")
        theirs = {id(p) for p in model.parameters()}
        if not any(p.requires_grad for p in model.parameters()):
            raise UsageError(
                f"the model has nothing to train: of its {len(theirs)} parameters none asks for a gradient"
            )
        if not any(id(p) in theirs for group in optimizer.param_groups for p in group["params"]):
            raise UsageError("make_optimizer: its optimizer holds no parameter of the model that it is given")
        return optimizer

    def watched(self, steps: int, end: float) -> tuple[list[Finding], Callable[[int], Outcome]]:
        """What is wrong with the training as it is, and what it comes to after so many steps.

        Raises:
            UsageError: The time was over first.
        """
        training = self.start(None, SEEDS[0])
        every = math.ceil(steps / SAMPLES)
        with watch(training.model, training.optimizer, every=every, planned_steps=ASSUMED_STEPS) as watching:
            for n in range(steps):
                if time.perf_counter() > end:
                    raise UsageError(f"no time left: {n} steps of the training as it is took all; give more seconds")
                training.step(watching.loss)
        findings = diagnose(watching.trace)
        return findings, partial(reached, watching.trace, findings, {steps: training.accuracy()})

    def candidates(self, findings: Sequence[Finding]) -> list[Candidate]:
        """What may be tried."""
        model, output = self._model(SEEDS[0]), []
        seen = model.register_forward_hook(lambda model, given, told: output.append(told))
        self.loss(model, self.first)
        seen.remove()
        last = output[-1] if output else None
        return snippets.candidates(model, self._optimizer(model), self.first, last, findings)

    def affordable(self, steps: int, seconds: float) -> int:
        """``steps``, or so many fewer that a search of ``seconds`` has time for them; that is noted."""
        training, ends = self.start(None, SEEDS[0]), []
        for _ in range(PROBED):
            training.step(lambda loss: loss)
            ends.append(time.perf_counter())
        pace = statistics.median(b - a for a, b in itertools.pairwise(ends))
        fewer = min(steps, max(int(seconds / (WHOLE * pace)), LEAST_STEPS))
        if fewer < steps:
            self.notes.append(
                f"{fewer} steps a trial, not {steps}: one takes {pace:.2g} s, and {seconds:g} s are there"
            )
        return fewer

    def start(self, candidate: Candidate | None, seed: int) -> Training:
        """A copy from ``seed``, changed: the candidate's lines run where they are to be pasted."""
        code = {
            place: compile(text, f"<{place}>", "exec") for place, text in (candidate.code if candidate else {}).items()
        }
        names: dict[str, Any] = {"bpdiag": bpdiag, "torch": torch, "loss": self.loss, "batch": self.first}

        def at(place: str) -> None:
            if place in code:
                exec(code[place], names)

        names["model"] = self._model(seed)
        with seeded(seed):
            at(PLACES[0])
        names["optimizer"] = self._optimizer(names["model"])
        at("optimizer")
        right = _Right(names["model"])
        own, batches = Randomness(seed), self._batches()

        def step(tell: Tell) -> None:
            with own.going_on():
                names["batch"] = next(batches)
                at("batch")
                lost = self.loss(names["model"], names["batch"])
                if not isinstance(lost, Tensor) or lost.numel() != 1 or not lost.requires_grad:
                    raise UsageError("loss(model, batch): it must give one number that has a gradient")
                lost = tell(lost)
                if self.clears:
                    names["optimizer"].zero_grad()
                at("backward")
                lost.backward()
                at("gradient")
                names["optimizer"].step()
                at("step")
                right.count(names["batch"])

        return Training(names["model"], names["optimizer"], step, right.share)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a part of it may raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"the model cannot be copied ({reason}); give a make_model that makes it anew") from error


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """The same weights and buffers, to the bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(a.cpu().nan_to_num(), b.cpu().nan_to_num())
        for a, b in ((first[key], second[key]) for key in first)
        if isinstance(a, Tensor)
    )


class _Right:
    """The share of right answers in the batches trained on, where model and data are of a kind that has answers."""

    def __init__(self, model: nn.Module) -> None:
        self.output: Any = None
        self.shares: list[float] = []
        model.register_forward_hook(self._see)

    def _see(self, model: nn.Module, args: Any, output: Any) -> None:
        self.output = output

    def count(self, batch: Any) -> None:
        """(..., K) numbers for K classes, and one whole number among the batch's tensors for each of them."""
        out, self.output = self.output, None
        inside = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else ()
        if not (isinstance(out, Tensor) and out.is_floating_point() and out.dim() > 1 and out.shape[-1] > 1):
            return
        for y in inside:
            if (
                isinstance(y, Tensor)
                and y.dtype in (torch.int64, torch.int32, torch.uint8)
                and y.shape == out.shape[:-1]
            ):
                self.shares.append(float((out.detach().argmax(-1) == y).double().mean()))
                return

    def share(self) -> float:
        """Mean of the last tenth; nan where there was nothing to count."""
        last = self.shares[-max(len(self.shares) // LAST, 1) :]
        return sum(last) / len(last) if last else math.nan
