"""assert_healthy(model, batch, loss): a few steps on a copy, judged, for people's own tests."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from bpdiag.config import UsageError
from bpdiag.diagnosis import diagnose
from bpdiag.session import watch

GENEROUS = 100_000  # steps: a rate with which no layer moves in so many is too small, whatever was planned


def assert_healthy(
    model: nn.Module,
    batch: Any,
    loss: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 20,
) -> None:
    """Train a copy of ``model`` on one batch for a few steps; fail with what is wrong with it, in words.

    The model, its optimizer, the batch and the random state are left as they are.  Warnings do not fail.

    Args:
        model: any module that can be watched and copied.
        batch: ``(inputs, targets)``, or whatever ``loss`` takes.
        loss: one of torch's (``F.cross_entropy``, ``nn.MSELoss()``) or any ``loss(output, targets)``, given
            ``model(inputs)`` and the targets; or ``loss(model, batch)``, which calls the model itself.
        optimizer: the one that the model is going to be trained with; SGD at 0.01 with momentum 0.9 where none is
            given.
        steps: how many; harm is judged over 1,000 steps like these, a learning rate too small over 100,000.

    Raises:
        AssertionError: A finding of severity harm; the message is the finding.
        UsageError: ``steps`` is below 1, the model or the batch cannot be copied, the model cannot be watched or has
            nothing to train, or ``loss`` takes neither of the two, or gives no number with a gradient.  What the model
            or a loss that calls it raises comes as it is.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(32, 8), torch.randint(3, (32,))
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3), nn.Softmax(1))
        >>> assert_healthy(model, (x, y), nn.functional.cross_entropy)
        Traceback (most recent call last):
            ...
        AssertionError: The loss does not fit the output: a softmax stands before cross-entropy, ...
        >>> assert_healthy(model[:3], (x, y), nn.functional.cross_entropy)
    """
    if steps < 1:
        raise UsageError(f"steps={steps!r}: must be a whole number, 1 or more")
    if not any(p.requires_grad for p in model.parameters()):
        count = len(list(model.parameters()))
        why = f"all {count} parameters are frozen (requires_grad is False)" if count else "it has no parameters"
        raise UsageError(f"model: {type(model).__name__} has nothing to train: {why}")
    memo: dict[int, Any] = {}  # shared: the optimizer holds the model's parameters
    model, optimizer = _copied((model, optimizer), f"model: {type(model).__name__}", memo)
    batch = _copied(batch, "batch: it", memo)
    trained = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    with torch.random.fork_rng():
        loss = of_model_and_batch(loss, *copy.deepcopy((model, batch)))
        with watch(model, trained) as watching:
            for _ in range(steps):
                trained.zero_grad()
                told = loss(model, batch)
                if not isinstance(told, Tensor) or told.numel() != 1 or not told.requires_grad:
                    raise UsageError(f"loss: it must give one number that has a gradient; got {_in_words(told)}")
                watching.loss(told).backward()
                trained.step()
    trace = watching.trace
    harms = [finding for finding in diagnose(trace) if finding.severity == "harm"]
    if not harms:
        longer = dataclasses.replace(trace, meta={**trace.meta, "planned_steps": GENEROUS})
        harms = [finding for finding in diagnose(longer) if finding.kind == "update_too_small"]
    if harms:
        raise AssertionError("\n".join(map(str, harms)))


def of_model_and_batch(loss: Callable[..., Tensor], model: nn.Module, batch: Any) -> Callable[[Any, Any], Tensor]:
    """``loss`` as a function of model and batch, whichever it takes: these, or output and targets.

    Found out by trying, on this model and batch.

    Raises:
        UsageError: It takes neither.  What is raised by the model, or by a loss that has called it, comes as it is.
    """

    def of_output_and_targets(model: nn.Module, batch: Any) -> Tensor:
        return loss(model(batch[0]), batch[1])

    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return loss
    if isinstance(loss, nn.Module) or getattr(loss, "__module__", "") == "torch.nn.functional":
        return of_output_and_targets
    parts, called = set(model.modules()), False

    def see(module: nn.Module, args: Any) -> None:
        nonlocal called
        called |= module in parts

    with torch.random.fork_rng():
        watching = register_module_forward_pre_hook(see)
        try:
            told = loss(model, batch)
        except Exception as error:  # whatever one raises that is given a model for an output
            if called:
                raise
            first = error
        else:
            return loss if called or isinstance(told, Tensor) else of_output_and_targets
        finally:
            watching.remove()
        output = model(batch[0])
        try:
            loss(output, batch[1])
        except Exception as error:
            ways = f"as loss(model, batch) {_in_words(first)}, as loss(output, targets) {_in_words(error)}"
            raise UsageError(f"loss: it fails either way: {ways}") from error
    return of_output_and_targets


def _copied(value: Any, what: str, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"{what} cannot be copied: {str(error).splitlines()[0]}") from error


def _in_words(told: Any) -> str:
    """What a loss gave, or raised."""
    if isinstance(told, Exception):
        return f"{type(told).__name__}: {str(told).strip().splitlines()[0] if str(told).strip() else 'without a word'}"
    if isinstance(told, Tensor):
        return f"a tensor of shape {tuple(told.shape)} {'with' if told.requires_grad else 'without'} a gradient"
    return f"a {type(told).__name__}"
