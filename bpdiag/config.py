"""Every option of a run: its name, type, default, unit and range.  The schema of conf/.

Imports nothing of ours and nothing foreign: Hydra, the training loop and the tests read the same dataclasses.
Names that stand for code (an activation, an optimizer, a data set) are resolved by the table of the file
that owns them; here stands only what can be said without torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any


class UsageError(ValueError):
    """Something the caller gave cannot be used; the message says what came, what is known, what to do."""


def says_yes(question: Callable[[], bool]) -> bool:
    """A question to the file system; no where it refuses the name (300 characters, a null) or the way to it.

    Example:
        >>> from pathlib import Path
        >>> says_yes(Path("a" * 300).is_dir)
        False
    """
    try:
        return question()
    except (OSError, ValueError):
        return False


def option(default: Any, meaning: str) -> Any:
    """A key with its default and what it means, which ``bpdiag --help`` tells."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass
class ModelConfig:
    """The network."""

    name: str = option(
        "mlp",
        "mlp: layers of equal width; cnn: two convolutions with pools, then layers of equal width; rnn, lstm, gru: "
        "recurrent layers that read a picture step by step",
    )
    depth: int = option(5, "weight layers")
    width: int = option(128, "units per hidden layer, of a cnn per linear one")
    sequence: str = option("rows", "what a recurrent net reads at each time step: rows, or pixels")
    activation: str = option(
        "relu",
        "relu, tanh, sigmoid, gelu, silu, elu, ...: the table bpdiag.rules.ACTIVATIONS; rnn, lstm, gru have their own",
    )
    weight_variance: str = option("he", "sigma_w^2 = Var W fan_in: a number, or he, lecun, glorot, torch, orthogonal")
    bias_variance: str = option("preset", "Var b: a number, or a preset's: 1/(3 fan_in) for torch, else 0")
    residual: str = option("none", "none, or identity: a block adds to what enters it, a = a_below + scale phi(z)")
    branch_scale: str = option("1", "of residual blocks: a number, or 1/sqrt(blocks)")
    normalization: str = option("preset", "of every z: none, layer, batch, or a preset: batch for a cnn, else none")
    backward: str = option("handwritten", "handwritten: our rules; autograd: torch's own")


@dataclass
class DataConfig:
    """What it is trained on."""

    name: str = option("mnist", "mnist; through torchvision: fashion_mnist, kmnist, emnist-digits, cifar10")
    root: str = option("embedded", "embedded: MNIST in the package, others in ~/.cache/bpdiag; or torchvision's folder")
    batch_size: int = option(64, "samples per step")
    split_seed: int = option(0, "which 5,000 training samples are held out for validation")


@dataclass
class OptimizerConfig:
    """How a gradient becomes a step."""

    name: str = option("sgd", "sgd, adam or adamw")
    lr: float = option(0.01, "learning rate")
    momentum: float = option(0.9, "of sgd")
    nesterov: bool = option(False, "of sgd: the step looks ahead along the momentum")
    weight_decay: float = option(0.0, "added to the gradient, times the weight; of adamw taken from the weight itself")
    eps: float = option(1e-8, "of adam: a gradient far below it moves nothing")
    warmup: int = option(0, "steps over which the rate rises in a line, from lr/warmup to lr; 0: none")
    clip: float = option(0.0, "a gradient longer than this, over all parameters, is shortened to it; 0: none")


@dataclass
class TrainingConfig:
    """How long and where."""

    epochs: int = option(1, "passes over the 55,000 training digits")
    steps: int = option(0, "stop after so many; 0: as many as the epochs have")
    device: str = option("cpu", "as torch spells it")
    dtype: str = option("float32", "float32 or float64")
    threads: int = option(1, "a second thread buys a small net nothing and costs dearly on a busy machine")


@dataclass
class WatchConfig:
    """How often every layer is measured."""

    every: int = option(10, "steps between two measurements; 1: every step")
    histograms: bool = option(False, "of every layer's output, weights and gradients, in TensorBoard")
    pictures: bool = option(
        True, "test pictures with predictions and the confusion matrix, in TensorBoard; of a sweep where asked for"
    )


@dataclass
class RemedyConfig:
    """What is tried on copies where a run ends with findings."""

    steps: int = option(200, "of each remedy tried, 50 or more; 0: none is tried, as in a sweep that does not ask")
    seconds: float = option(60.0, "for trying remedies, at most; at the end of a run no longer than the run took")


@dataclass
class Expectation:
    """What an experiment should show, checked against its results when it has run."""

    what: str = ""  # a column of results.csv
    where: str = ""  # KEY=VALUE of the jobs it is about, spaces between; empty: all
    over: str = ""  # mean or spread (standard deviation) over those jobs; empty: every one of them
    equals: str = ""  # a number, or a word
    within: float = 0.0  # of a number: the relative distance allowed
    source: str = ""  # of the number


@dataclass
class Config:
    """One run, whole."""

    seed: int = option(0, "of the initialization and of the order of the data")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    remedy: RemedyConfig = field(default_factory=RemedyConfig)
    expect: list[Expectation] = field(default_factory=list)  # of an experiment; no run reads it


def planned_steps(config: Config, samples: int) -> int:
    """Steps of a run over so many samples: those of the epochs, or fewer where ``training.steps`` says so.

    Example:
        >>> planned_steps(Config(), 55_000)
        860
    """
    planned = config.training.epochs * math.ceil(samples / config.data.batch_size)
    return min(planned, config.training.steps or planned)


# key: (smallest, largest); both ends allowed
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "model.depth": (1, 10_000),
    "model.width": (1, 1_000_000),
    "data.batch_size": (1, math.inf),
    "data.split_seed": (0, 2**63 - 1),
    "optimizer.lr": (0, 1e6),
    "optimizer.momentum": (0, 1),
    "optimizer.weight_decay": (0, 1e6),
    "optimizer.eps": (0, 1e6),
    "optimizer.warmup": (0, 10**12),
    "optimizer.clip": (0, 1e6),
    "training.epochs": (1, 1_000_000),
    "training.steps": (0, 10**12),
    "training.threads": (1, 1024),
    "watch.every": (1, 10**12),
    "remedy.steps": (0, 10**12),
    "remedy.seconds": (0, 10**9),
}


MANY = 12  # names that are listed although one is near


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an error message: what is known and, if one is near, what was probably meant.

    Example:
        >>> nearest("thanh", ["relu", "tanh"])
        "known: relu, tanh; did you mean 'tanh'?"
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:  # model.depht is near model.depth; so is a bare depht
        leaves = {n.rpartition(".")[2]: n for n in reversed(names)}
        close = [leaves[n] for n in difflib.get_close_matches(name.rpartition(".")[2], leaves, n=1, cutoff=0.6)]
    if close and len(names) > MANY:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}" + (f"; did you mean '{close[0]}'?" if close else "")


def dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one of dotted keys; lists are left out.

    Example:
        >>> dotted({"seed": 0, "model": {"depth": 5}})
        {'seed': 0, 'model.depth': 5}
    """
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= dotted(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            out[prefix + key] = value
    return out


def meanings(config: Any, prefix: str = "") -> dict[str, str]:
    """Dotted key -> what it means.

    Example:
        >>> meanings(Config())["optimizer.lr"]
        'learning rate'
    """
    out: dict[str, str] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        own = {} if isinstance(value, list) else {prefix + f.name: f.metadata.get("meaning", "")}
        out |= meanings(value, f"{prefix}{f.name}.") if is_dataclass(value) else own
    return out


def choose(key: str, value: str, table: Iterable[str]) -> str:
    """``value`` if the table has it, else a UsageError naming the nearest.

    Example:
        >>> choose("model.activation", "thanh", ["relu", "tanh"])
        Traceback (most recent call last):
        bpdiag.config.UsageError: model.activation=thanh: unknown; known: relu, tanh; did you mean 'tanh'?
    """
    names = list(table)
    if value in names:
        return value
    raise UsageError(f"{key}={value}: unknown; {nearest(str(value), names)}")


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value.

    Example:
        >>> flat(Config())["model.depth"]
        5
    """
    out: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, list):
            continue
        out |= flat(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value}
    return out


def check_ranges(config: Config) -> None:
    """Every number within RANGES, or a UsageError that names the key, the value and the range.

    Example:
        >>> check_ranges(Config(model=ModelConfig(depth=0)))
        Traceback (most recent call last):
        bpdiag.config.UsageError: model.depth=0: must be from 1 to 10000
    """
    values = flat(config)
    for key, (low, high) in RANGES.items():
        value = values[key]
        if not low <= value <= high:  # nan is in no range
            span = f"{low:g} or more" if high >= 2**62 else f"from {low:.10g} to {high:.10g}"
            raise UsageError(f"{key}={value}: must be {span}")
