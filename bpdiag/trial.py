"""assert_healthy(model, batch, loss): a few steps on a copy, judged, for people's own tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bpdiag.config import UsageError
from bpdiag.diagnosis import diagnose
from bpdiag.session import watch


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
        steps: how many; harm is judged over 1,000 steps like these.

    Raises:
        AssertionError: A finding of severity harm; the message is the finding.
        UsageError: ``steps`` is below 1, or the model cannot be copied or watched.

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
    try:
        model, optimizer, batch = copy.deepcopy((model, optimizer, batch))  # together: it holds the model's parameters
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"model: {type(model).__name__} cannot be copied: {str(error).splitlines()[0]}") from error
    trained = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    with torch.random.fork_rng():
        loss = of_model_and_batch(loss, *copy.deepcopy((model, batch)))
        with watch(model, trained) as watching:
            for _ in range(steps):
                trained.zero_grad()
                watching.loss(loss(model, batch)).backward()
                trained.step()
    harms = [finding for finding in diagnose(watching.trace) if finding.severity == "harm"]
    if harms:
        raise AssertionError("\n".join(map(str, harms)))


def of_model_and_batch(loss: Callable[..., Tensor], model: nn.Module, batch: Any) -> Callable[[Any, Any], Tensor]:
    """``loss`` as a function of model and batch, whichever it takes: these, or output and targets.

    Found out by trying, on this model and batch.
    """
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    if not pair:
        return loss
    if not isinstance(loss, nn.Module) and getattr(loss, "__module__", "") != "torch.nn.functional":
        with torch.random.fork_rng():
            try:
                if isinstance(loss(model, batch), Tensor):
                    return loss
            except (TypeError, AttributeError):
                pass
    return lambda model, batch: loss(model(batch[0]), batch[1])
