"""Remedies for a run of ours: what may be tried, as settings, and one trial of it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bpdiag import meanfield, training
from bpdiag.config import Config, RemedyConfig, UsageError, flat, planned_steps
from bpdiag.diagnosis import Finding
from bpdiag.remedy.candidate import LONGEST, WARM, Candidate, groups
from bpdiag.remedy.search import LEAST_STEPS, Cure, Progress, Search, Terms
from bpdiag.remedy.trial import Tell, Training, reached
from bpdiag.rules import ACTIVATIONS
from bpdiag.trace import Trace, write_json

SEEDS = 3  # of the winner: the run's own and the next two
RATES = {"a tenth of the rate": 0.1, "0.3 of the rate": 0.3, "three times the rate": 3.0, "ten times the rate": 10.0}
ADAM_RATE = 1e-3  # its authors' (Kingma & Ba 2015, algorithm 1)


def candidates(config: Config, findings: Sequence[Finding]) -> list[Candidate]:
    """What may mend such a run, the likely first; nothing where no setting of a run mends what was found.

    Each changes something, goes together with the rest of ``config``, and names all it relies on: a change of the
    weights comes with its biases, whatever the run had.

    Example:
        >>> from bpdiag.config import ModelConfig
        >>> told = dict(severity="harm", layers=(), onset_step=0, evidence={}, confidence=1, remedy="", expected="",
        ...             source="")
        >>> found = [Finding(kind="vanishing", cause="slopes", **told)]
        >>> first = candidates(Config(model=ModelConfig(activation="sigmoid", weight_variance="torch")), found)[0]
        >>> first.name, first.change
        ('relu', 'model.activation=relu model.weight_variance=he')
    """
    asked = groups(findings)
    if not asked:
        return []
    told = flat(config)
    found = [c for group in asked for c in _of(group, config)] + list(_pace(config))
    found = [dataclasses.replace(c, settings=_changed(c.settings, told)) for c in found]
    return [c for c in found if c.settings and _goes_together(config, c)]


def _of(group: str, config: Config) -> Iterator[Candidate]:
    """The candidates of one group."""
    rule = ACTIVATIONS[config.model.activation]
    biases = {"model.bias_variance": "preset"}
    if group == "initialization":
        there = meanfield.critical(rule)
        if there is not None and there.weight_variance == 2 and there.bias_variance == 0:
            yield Candidate("He initialization", group, {"model.weight_variance": "he", **biases})
        elif there is not None:
            w, b = (f"{x:.6g}" for x in (there.weight_variance, there.bias_variance))
            yield Candidate("critical weights", group, {"model.weight_variance": w, "model.bias_variance": b})
        yield Candidate("orthogonal weights", group, {"model.weight_variance": "orthogonal", **biases})
    elif group == "activation":
        for name, weights in (("relu", "he"), ("tanh", "lecun"), ("gelu", "he")):
            if name != config.model.activation:
                settings = {"model.activation": name, "model.weight_variance": weights, **biases}
                yield Candidate(name, group, settings)
    elif group == "normalization":
        for name in ("layer", "batch"):
            yield Candidate(f"{name} normalization", group, {"model.normalization": name})
    elif group in ("residual", "branch"):
        settings = {"model.residual": "identity", "model.branch_scale": "1/sqrt(blocks)"}
        yield Candidate("scaled residual blocks", "residual", settings)
        settings = {"model.residual": "identity", "model.normalization": "layer"}
        yield Candidate("normalized residual blocks", "residual", settings)
    elif group == "decay":
        yield Candidate("no weight decay", "rate", {"optimizer.weight_decay": 0.0})


def _pace(config: Config) -> Iterator[Candidate]:
    """Rates and optimizers."""
    for name, factor in RATES.items():
        settings = {"optimizer.lr": config.optimizer.lr * factor}
        yield Candidate(name, "rate", settings, direction=1 if factor > 1 else -1)
    yield Candidate("Adam", "optimizer", {"optimizer.name": "adam", "optimizer.lr": ADAM_RATE, "optimizer.eps": 1e-8})
    yield Candidate("warm-up", "rate", {"optimizer.warmup": WARM}, direction=-1)
    yield Candidate("clipping", "rate", {"optimizer.clip": LONGEST}, direction=-1)


def _changed(settings: Any, told: dict[str, Any]) -> dict[str, Any]:
    """Those that differ from the run's own."""
    return {key: value for key, value in settings.items() if told[key] != value}


def applied(config: Config, settings: Any) -> Config:
    """``config`` with these settings.

    Example:
        >>> applied(Config(), {"optimizer.lr": 0.5, "seed": 3}).optimizer.lr
        0.5
    """
    for key, value in settings.items():
        part, _, leaf = key.rpartition(".")
        value = dataclasses.replace(getattr(config, part), **{leaf: value}) if part else value
        config = dataclasses.replace(config, **{part or leaf: value})
    return config


def _goes_together(config: Config, candidate: Candidate) -> bool:
    try:
        training.check_names(applied(config, candidate.settings))
    except UsageError:
        return False
    return True


def start(config: Config, candidate: Candidate | None, seed: int) -> Training:
    """A changed copy of the run, from ``seed``, in that seed's order of the data; accuracy is on validation data.

    On torch's own backward, which is quicker and the same to rounding.
    """
    settings = {"seed": seed, "model.backward": "autograd", **(candidate.settings if candidate else {})}
    changed = applied(config, settings)
    begun = training.begin(changed)
    rows = begun.rows(changed, math.inf)

    def step(tell: Tell) -> None:
        begun.descend(changed, tell(begun.loss(next(rows))))

    return Training(begun.net, begun.optimizer, step, lambda: training.accuracy(begun.net, begun.dataset.validation))


def cure_run(
    config: Config,
    trace: Trace,
    findings: Sequence[Finding],
    metrics: Mapping[str, Any],
    no_dearer: bool = False,
    progress: Progress | None = None,
) -> Cure:
    """Try what may mend a run of ours, on copies, ``remedy.steps`` for each and ``remedy.seconds`` for all.

    Args:
        config: of the run.
        trace: what was measured of it.
        findings: what ``diagnose`` said of that.
        metrics: what it reached.
        no_dearer: for no more of the processor's time than the run itself took, or, stopped early, would have taken.
        progress: called before every trial with (seconds passed, seconds allowed, what is tried).
    """
    settings, begun = config.remedy, time.process_time()
    found = candidates(config, findings)
    kinds = ", ".join(dict.fromkeys(f.kind for f in findings))
    if not found:
        return Cure(notes=[f"no setting of a run mends {kinds}: nothing was tried"] if findings else [])
    training.check(config)
    dataset = training.begin(config).dataset
    planned = max(planned_steps(config, len(dataset.train)), 1)
    steps = min(settings.steps, planned)
    if steps < LEAST_STEPS:
        return Cure(notes=[f"no remedy was tried: {steps} steps are too few to see one work, {LEAST_STEPS} are needed"])
    work = metrics.get("processor_seconds_planned", math.inf) if no_dearer else math.inf
    work -= time.process_time() - begun
    seeds = [(config.seed + n) % 2**63 for n in range(SEEDS)]
    with training.flushed_denormals(), training.threads(config.training.threads):
        terms = Terms(steps, seeds, settings.seconds, planned, math.log(dataset.classes), work)
        told = metrics.get("validation_accuracy_at", {})
        was = partial(reached, trace, findings, {int(n): accuracy for n, accuracy in told.items()})
        return Search(partial(start, config), found, terms, progress, was).run()


def cure_stored(
    run: str | os.PathLike[str], trace: Trace, findings: Sequence[Finding], progress: Progress | None = None
) -> Cure:
    """The same for a run folder of ours, for all of its ``remedy.seconds``.

    Raises:
        UsageError: It is not of ours, or its configuration cannot be read.
    """
    told = trace.meta.get("config")
    if told is None:
        raise UsageError(
            f"{run}: watched around a model of yours, which is not stored; in Python: bpdiag.cure(make_model, data, "
            "loss, make_optimizer)"
        )
    try:
        config, metrics = training.restored(told), json.loads((Path(run) / "metrics.json").read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run}: damaged, or of another version: {str(error).splitlines()[0]}") from error
    if not config.remedy.steps:  # it asked for none then; now they are asked for
        config = applied(config, {"remedy.steps": RemedyConfig().steps})
    return cure_run(config, trace, findings, metrics, progress=progress)


def exhaustive(config: Config, singles: Sequence[Candidate]) -> Candidate | None:
    """The first of all candidates, then of all their pairs, that works on every seed; what a search is held against."""
    dataset = training.begin(config).dataset
    planned = max(planned_steps(config, len(dataset.train)), 1)
    seeds = [(config.seed + n) % 2**63 for n in range(SEEDS)]
    terms = Terms(config.remedy.steps, seeds, math.inf, planned, math.log(dataset.classes))
    search = Search(partial(start, config), singles, terms)
    with training.flushed_denormals(), training.threads(config.training.threads):
        return search.first_of_all()


def keep(cure: Cure, folder: str | os.PathLike[str]) -> None:
    """Add the remedies, and what is to be said of them, to the run's findings.json."""
    path = Path(folder) / "findings.json"
    told = json.loads(path.read_text()) if path.is_file() else {"schema": 1, "findings": [], "notes": []}
    write_json(path, {**told, **cure.to_dict()})
