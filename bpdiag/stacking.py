"""Runs that can be one stack, and their training together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from bpdiag.config import Config
from bpdiag.training import Result, train


def group(config: Config) -> Hashable | None:
    """Runs of equal group can be one stack; None: this run must train alone."""
    if config.model.name != "mlp":
        return None
    return config.model.depth, config.model.width, config.data.batch_size, config.training.steps


def train_stack(
    configs: Sequence[Config], folders: Sequence[Path], *, told: Callable[[int, Result | BaseException], None]
) -> None:
    """Train each, and tell of each as it is finished; a member's failure is its own."""
    for number, (config, folder) in enumerate(zip(configs, folders, strict=True)):
        try:
            result = train(config, folder)
        except Exception as error:
            told(number, error)
        else:
            told(number, result)
