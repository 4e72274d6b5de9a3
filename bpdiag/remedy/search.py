"""Which of many changes mends a training: one step for all, more for the better, three seeds for the best.

Successive halving.  After its first step a change is dropped at which the harm is found still.  The others train for
S/16 steps, the better quarter of them for S/4.  Who has halved the loss by then is trained for all S, the gentlest of
the best first, on one seed after the other; but before that for S/4 at twice its rate, and dropped if it has not halved
the loss there too: what works only just inside the edge of stability works on some seeds and not on others.  Where no
single change passes, those that let the gradient through are raced again, each with a change of the pace.

Source:
    Jamieson & Talwalkar 2016 (successive halving); LeCun et al. 1998, section 5 (on a parabola the best rate is half of
    the largest that is stable); the thresholds are ours, each with its reason below.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bpdiag.remedy.candidate import Candidate, is_pace, pairs
from bpdiag.remedy.trial import Outcome, OutOfTimeError, Training, measure

# A loss halved at equal steps: of guessing among ten classes (2.30) that is 1.15, at which MNIST nets of any kind are
# right on about two digits of three: no longer a matter of seed or batch.
HALVED = 0.5
# A tenth lower: the mean over the last tenth of the steps, batches of 64, strays by 2 to 3 % of itself.
LOWER = 0.9
# Share of right answers within which a promise counts as kept: seeds further apart than that are no promise.
APART = 0.05
FASTER = 2.0  # times its rate, at which a remedy must learn too
SAME_LOSS = 1.25  # a loss within a quarter of the best is as good, and the gentler change is taken
LEAST_STEPS = 50  # in fewer not even a healthy net halves its loss
FIRST_SHARE, SECOND_SHARE = 16, 4  # of S: steps of the first and of the second round
FEWEST_STEPS = 10  # of the first round
KEPT = 4  # one of so many goes on
FINALISTS = 3  # of a race, at least
PAIRED = 3  # changes of what flows that are paired
MOST_PAIRS = 9  # in a race: of three changes each with two rates and an optimizer

Start = Callable[[Candidate | None, int], Training]  # (change, seed); None: as it is
Progress = Callable[[float, float, str], None]  # (seconds passed, seconds allowed, what is tried)


@dataclass(frozen=True)
class Remedy:
    """A change that was tried, and what came of it, at equal steps: of several seeds the worst of each number."""

    name: str
    change: str  # overrides in a line, or Python to paste
    overrides: list[str]  # empty for a model of yours
    before: dict[str, float]  # decades, loss, accuracy
    after: dict[str, float]
    seeds: list[int]
    steps: int
    verdict: str  # works, helps, does_not
    recommended: bool = False


@dataclass
class Cure:
    """What was tried for a training that does not learn, the recommended remedy first, if one was seen to work."""

    remedies: list[Remedy] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: int = 0  # of a whole trial
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def recommended(self) -> Remedy | None:
        """The one to take; None where nothing was seen to work on all its seeds."""
        return next((remedy for remedy in self.remedies if remedy.recommended), None)

    def to_dict(self) -> dict[str, Any]:
        """As findings.json has it: an accuracy that was not measured, as of a trial that was cut short, is null."""
        rows = [asdict(remedy) for remedy in self.remedies]
        for numbers in (row[when] for row in rows for when in ("before", "after")):
            numbers["accuracy"] = None if math.isnan(numbers["accuracy"]) else numbers["accuracy"]
        return {"remedies": rows, "remedy_notes": self.notes}

    def __str__(self) -> str:
        from bpdiag import terminal

        out = terminal.console()
        with out.capture() as told:
            terminal.cure(self, out)
        return told.get()


def reference(before: Outcome, after: Outcome, guess: float) -> float:
    """The loss that a remedy is held against: the training's as it is, at equal steps, and no more than guessing costs.

    Where the training as it is has none that is finite, what its first step lost, else what the remedy's own did.
    """
    known = [x for x in (before.loss, guess) if math.isfinite(x)]
    known = known or [x for x in (before.first_loss, after.first_loss) if math.isfinite(x)]
    return min(known, default=math.nan)


def mends(before: Outcome, after: Outcome, guess: float) -> bool:
    """At equal steps the loss is half of what it was or less, and none of the harm that was found is found again."""
    halved = after.loss <= HALVED * reference(before, after, guess)
    return halved and not set(after.harms) & {*before.harms, "non_finite"}


def agree(outcomes: Sequence[Outcome]) -> bool:
    """The seeds reach the same: accuracies within 0.05; without any, losses within a factor 2."""
    right = [o.accuracy for o in outcomes]
    if all(map(math.isfinite, right)):
        return max(right) - min(right) <= APART
    return max(o.loss for o in outcomes) <= 2 * min(o.loss for o in outcomes)


def judge(before: Outcome, outcomes: Sequence[Outcome], guess: float, seeds: int) -> str:
    """One of:

    * works: on all the seeds it ``mends`` and they ``agree``;
    * helps: on every seed tried the loss is lower by a tenth or more at equal steps;
    * does_not: anything else.
    """
    if len(outcomes) == seeds and all(mends(before, o, guess) for o in outcomes) and agree(outcomes):
        return "works"
    return "helps" if all(o.loss <= LOWER * reference(before, o, guess) for o in outcomes) else "does_not"


def rounds(steps: int) -> list[int]:
    """Steps of each round.

    Example:
        >>> rounds(200), rounds(50)
        ([1, 12, 50, 200], [1, 10, 25, 50])
    """
    second = max(steps // SECOND_SHARE, min(steps // 2, LEAST_STEPS))  # sooner than that few can be seen to learn
    return sorted({1, max(steps // FIRST_SHARE, FEWEST_STEPS), second, steps})


def soonest(steps: int) -> int:
    """Steps after which who learns must be seen to: S/4, and as many as learning takes at least.

    Example:
        >>> soonest(200), soonest(100), soonest(400)
        (50, 50, 100)
    """
    return max(steps // SECOND_SHARE, LEAST_STEPS)


@dataclass(frozen=True)
class Terms:
    """Under which remedies are tried."""

    steps: int  # of a whole trial
    seeds: Sequence[int]
    seconds: float  # for all
    planned: int  # steps of the training, over which harm is judged
    guess: float = math.nan  # the loss of guessing, where it is known
    work: float = math.inf  # seconds of the processor for all
    resume: bool = True  # trials stay in memory between the rounds; else each begins anew


class Search:
    """The trials of one training: what came of each, by candidate."""

    def __init__(
        self,
        start: Start,
        candidates: Sequence[Candidate],
        terms: Terms,
        progress: Progress | None = None,
        before: Callable[[int], Outcome] | None = None,
    ) -> None:
        """``before``: what the training as it is came to after so many steps, where that is known; else it is tried."""
        self.start, self.candidates, self.terms, self.progress = start, list(candidates), terms, progress
        self.steps, self.seeds, self.seconds, self.guess = terms.steps, list(terms.seeds), terms.seconds, terms.guess
        self.running: dict[str, Training] = {}  # that may go on where they stopped
        self.begun, self.worked = time.perf_counter(), time.process_time()
        self.paces: list[float] = []  # seconds a step, of each trial so far
        self.asides: list[float] = []  # seconds a trial takes beside its steps
        self.lengths = sorted({*rounds(self.steps), soonest(self.steps)})
        self.before = {n: before(n) for n in self.lengths} if before else {}
        self.came: dict[str, list[Outcome]] = {}  # name -> of the most steps, by seed
        self.tried: dict[str, Candidate] = {}
        self.notes: list[str] = []
        self.edge: set[str] = set()  # names of those that do not learn at twice their rate
        self.left_out = False  # some, for want of time
        self.winner: Candidate | None = None
        self.interrupted = False

    def run(self) -> Cure:
        """Search while there is time; an interrupt ends it, and what there is is kept."""
        try:
            self._search()
        except OutOfTimeError:
            allowed = min(self.seconds, self.terms.work)
            why = "" if allowed == self.seconds else ", as the run took; bpdiag diagnose RUN --cure allows more"
            self.notes.append(f"no time left: {allowed:.2g} s were there for trying remedies{why}")
        except KeyboardInterrupt:
            self.notes.append("interrupted: this is what had been tried")
            self.interrupted = True
        return self._told()

    def first_of_all(self) -> Candidate | None:
        """The first candidate, then the first pair, that works: each for all steps.  Takes as long as it takes."""
        for n in self.lengths:
            self.before[n] = self._try(None, self.seeds[0], n)
        flow, pace = self._parted()
        for arm in (*self.candidates, *pairs(flow, pace)):
            self._first(arm, rounds(self.steps)[-2])
            if self._confirm(arm):
                return arm
        return None

    def left(self) -> float:
        """Seconds, of the clock or of the processor, whichever are fewer."""
        worked = self.worked + self.terms.work - time.process_time()
        return min(self.begun + self.seconds - time.perf_counter(), worked)

    def passed(self) -> float:
        """Seconds of the clock."""
        return time.perf_counter() - self.begun

    def _cost(self, steps: int) -> float:
        """Seconds that a trial of so many steps takes."""
        return statistics.median(self.asides) + steps * statistics.median(self.paces) if self.paces else 0.0

    def _search(self) -> None:
        """Single changes; where none passes, those on their way still, and pairs: first what is at the edge, slower."""
        for n in self.lengths:
            if n not in self.before:
                self.before[n] = self._try(None, self.seeds[0], n)
                self._see_whether_it_is_worth_it()
        singles = self._race(self._alive(self.candidates))
        sure = [a for a in singles if self._share(a) <= HALVED]
        if self._first_that_passes(sure):
            return
        unsure = [a for a in singles if a not in sure]
        flow = sorted(self._parted()[0], key=lambda c: (c not in singles, *self._flows(c)))
        edge = [c for c in flow if c.name in self.edge]
        for some in filter(None, (edge, [c for c in flow if c not in edge])):
            if self._first_that_passes(unsure + self._race(self._pairs(some[:PAIRED]))):
                return
            unsure = []
        if self.left_out:
            raise OutOfTimeError

    def _pairs(self, flow: Sequence[Candidate]) -> list[Candidate]:
        """Each with what its pace lacks, each one's likeliest before the second of any."""
        pace = self._parted()[1]
        turns = itertools.zip_longest(*(pairs([one], self._fitting(one, pace)) for one in flow))
        return [p for turn in turns for p in turn if p is not None][:MOST_PAIRS]

    def _fitting(self, arm: Candidate, pace: Sequence[Candidate]) -> list[Candidate]:
        """Slower where its loss rose, was not finite or is at the edge, faster where it fell, all where it stood.

        An optimizer with a rate of its own first: it needs no guess of the direction.
        """
        share = self._share(arm)
        away = 1 if arm.name in self.edge or not share <= 1 / LOWER else -1 if share < LOWER else 0
        fitting = [p for p in pace if not away or p.direction != away]
        return sorted(fitting, key=lambda p: p.level != "optimizer")

    def _see_whether_it_is_worth_it(self) -> None:
        """Raise OutOfTimeError where the time allowed is less than one remedy needs."""
        needed = (1 + len(self.seeds)) * self._cost(self.steps)
        if needed > self.left():
            self.notes.append(f"{1 + len(self.seeds)} trainings of {self.steps} steps would take about {needed:.3g} s")
            raise OutOfTimeError

    def _parted(self) -> tuple[list[Candidate], list[Candidate]]:
        """Changes of what flows, changes of the pace."""
        return [c for c in self.candidates if not is_pace(c)], [c for c in self.candidates if is_pace(c)]

    def _alive(self, arms: Sequence[Candidate]) -> list[Candidate]:
        """Those at whose first step the harm is gone; a few of the nearest at least."""
        for arm in arms:
            if is_pace(arm):  # the first step's gradient is the same
                self.tried[arm.name], self.came[arm.name] = arm, [self.before[1]]
            else:
                self._first(arm, 1)
        harms = set(self.before[1].harms)
        healthy = [a for a in arms if not harms & set(self.came[a.name][0].harms)]
        others = sorted((a for a in arms if a not in healthy), key=self._flows)
        return healthy + others[: max(FINALISTS - len(healthy), 0)]

    def _race(self, arms: Sequence[Candidate]) -> list[Candidate]:
        """Those on course after S/4 steps."""
        first, second = rounds(self.steps)[1], rounds(self.steps)[-2]
        to_come = len(self.seeds) * self._cost(self.steps) + self._cost(soonest(self.steps))  # of a winner
        spare = self.left() - to_come - FINALISTS * self._cost(second)
        room = max(int(spare / max(self._cost(first), 1e-9)), 0)
        self.left_out |= room < len(arms)
        arms = list(arms)[:room]
        for arm in arms:
            self._first(arm, first)
        arms = sorted(arms, key=self._rank)[: max(math.ceil(len(arms) / KEPT), FINALISTS)]
        self._keep(arms)
        for arm in arms:
            self._first(arm, second)
        on_course = [a for a in arms if self._share(a) <= LOWER]
        self._keep(on_course)
        return on_course

    def _first_that_passes(self, arms: Sequence[Candidate]) -> bool:
        """Whether one of them was seen to work, the best tried first."""
        left = list(arms)
        while left:
            arm = self._likeliest(left)
            left.remove(arm)
            if self._confirm(arm):
                self.winner = arm
                return True
        return False

    def _confirm(self, arm: Candidate) -> bool:
        """Train it at twice its rate until it must be seen to learn, then for all steps, seed after seed."""
        some, enough = soonest(self.steps), HALVED if self._share(arm) <= HALVED else LOWER
        fast = self._try(arm, self.seeds[0], some, FASTER)
        if not fast.loss <= enough * reference(self.before[some], fast, self.guess):
            self.edge.add(arm.name)
            self.notes.append(f"{arm.name}: at twice its rate it learns no more, so near is the edge of stability")
            return False
        before = self.before[self.steps]
        for seed in self.seeds:
            came = self._try(arm, seed, self.steps)
            self.came[arm.name] = [came] if seed == self.seeds[0] else [*self.came[arm.name], came]
            if not mends(before, came, self.guess):
                return False
        return judge(before, self.came[arm.name], self.guess, len(self.seeds)) == "works"

    def _likeliest(self, arms: Sequence[Candidate]) -> Candidate:
        """The gentlest of those as good as the best, if that has halved the loss; else a single change that will.

        Else the best.
        """
        lost = {a.name: self.came[a.name][0].loss for a in arms}
        best = min(arms, key=lambda a: lost[a.name])
        if self._share(best) <= HALVED:
            equal = [a for a in arms if lost[a.name] <= SAME_LOSS * lost[best.name]]
            return min(equal, key=lambda a: (a.weight, lost[a.name]))
        single = [a for a in arms if a in self.candidates and self._is_going_to_halve(a)]
        return min(single or arms, key=lambda a: lost[a.name])

    def _is_going_to_halve(self, arm: Candidate) -> bool:
        """Its loss after all steps is half of what it is held against, if in each S/4 it falls by the same share."""
        came = self.came[arm.name][0]
        expected = came.loss * self._share(arm) ** (self.steps / came.steps - 1)
        return expected <= HALVED * reference(self.before[self.steps], came, self.guess)

    def _keep(self, arms: Sequence[Candidate]) -> None:
        """Let go of all other trainings."""
        keys = {f"{self.seeds[0]} {arm.name}" for arm in arms}
        self.running = {key: training for key, training in self.running.items() if key in keys}

    def _first(self, arm: Candidate, steps: int) -> None:
        self.came[arm.name] = [self._try(arm, self.seeds[0], steps)]

    def _try(self, arm: Candidate | None, seed: int, steps: int, faster: float = 1.0) -> Outcome:
        if self.progress:
            name = arm.name if arm else "as it is"
            self.progress(self.passed(), min(self.seconds, self.terms.work), name)
        came = self._outcome(arm, seed, steps, faster)
        if came.step_seconds:
            self.paces.append(came.step_seconds)
            self.asides.append(max(came.seconds - came.made * came.step_seconds, 0.0))
        if arm is not None:
            self.tried[arm.name] = arm
            if came.error and (told := f"{arm.name} could not be tried: {came.error}") not in self.notes:
                self.notes.append(told)
        return came

    def _outcome(self, arm: Candidate | None, seed: int, steps: int, faster: float = 1.0) -> Outcome:
        """A trial, going on where it stopped; one that a change makes impossible comes to nothing, and says why."""
        key = f"{seed} {arm.name if arm else ''}" if faster == 1 else ""
        begun = time.process_time()
        try:
            training = self.running.pop(key, None) or self.start(arm, seed)
            if faster != 1:
                for group in training.optimizer.param_groups:
                    group["lr"] *= faster
            came = measure(training, steps, self.terms.planned, self.left, whole=steps == self.steps)
        except OutOfTimeError:
            raise
        except Exception as error:  # whatever a changed model of somebody else's may raise
            if arm is None:
                raise
            return Outcome(steps, error=f"{type(error).__name__}: {error}".splitlines()[0])
        if self.terms.resume and key and steps < self.steps:
            self.running[key] = training
        return replace(came, seconds=time.process_time() - begun)

    def _share(self, arm: Candidate) -> float:
        """Of the loss that it is held against, at equal steps, on the first seed."""
        came = self.came[arm.name][0]
        return came.loss / reference(self.before[came.steps], came, self.guess)

    def _rank(self, arm: Candidate) -> tuple[bool, float, int]:
        """Finite first, then by loss, then by gentleness."""
        came = self.came[arm.name][0]
        return not math.isfinite(came.loss), came.loss if math.isfinite(came.loss) else 0.0, arm.weight

    def _flows(self, arm: Candidate) -> tuple[float, int]:
        """How far the gradient at its first layer is from that at the output, in decades."""
        decades = abs(self.came[arm.name][0].decades)
        return (decades if math.isfinite(decades) else math.inf), arm.weight

    def _told(self) -> Cure:
        rows = [self._row(name) for name in self.came]
        order = {"works": 0, "helps": 1, "does_not": 2}
        rows.sort(key=lambda r: (not r.recommended, order[r.verdict], -r.steps, _or_inf(r.after["loss"])))
        return Cure(rows, self.notes, self.steps, round(self.passed(), 3), self.interrupted)

    def _row(self, name: str) -> Remedy:
        arm, outcomes = self.tried[name], self.came[name]
        before = self.before[outcomes[0].steps]
        return Remedy(
            name=name,
            change=arm.change,
            overrides=arm.overrides,
            before=numbers([before]),
            after=numbers(outcomes),
            seeds=self.seeds[: len(outcomes)],
            steps=outcomes[0].steps,
            verdict=judge(before, outcomes, self.guess, len(self.seeds)),
            recommended=arm is self.winner,
        )


def numbers(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The worst of each number: what one may rely on.

    Example:
        >>> numbers([Outcome(9, loss=0.5, decades=-1.0, accuracy=0.75), Outcome(9, 0.25, decades=0.5, accuracy=0.5)])
        {'decades': -1.0, 'loss': 0.5, 'accuracy': 0.5}
    """
    lost = [o.loss for o in outcomes]
    return {
        "decades": max((o.decades for o in outcomes), key=lambda d: math.inf if math.isnan(d) else abs(d)),
        "loss": max(lost) if all(map(math.isfinite, lost)) else math.nan,
        "accuracy": min(o.accuracy for o in outcomes),
    }


def _or_inf(x: float) -> float:
    return x if math.isfinite(x) else math.inf
