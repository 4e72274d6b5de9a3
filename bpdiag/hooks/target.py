"""What a loss compares the output with: autograd keeps the target of torch's own losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bpdiag import statistics

MOST_NODES = 32  # below the loss


def target_of(loss: Tensor) -> Tensor | None:
    """The target that one of torch's losses saved, a few nodes below ``loss``; None where there is none.

    Example:
        >>> import torch
        >>> out = torch.zeros(3, 2, requires_grad=True)
        >>> target_of(torch.nn.functional.mse_loss(out, torch.ones(3, 2)) * 2).shape
        torch.Size([3, 2])
    """
    stack: list[Any] = [loss.grad_fn]
    seen = 0
    while stack and seen < MOST_NODES:
        node, seen = stack.pop(0), seen + 1
        if node is None:
            continue
        try:
            target = getattr(node, "_saved_target", None)
        except RuntimeError:  # overwritten since, or given free
            return None
        if isinstance(target, Tensor):
            return target.detach()
        stack += [below for below, _ in node.next_functions]
    return None


def describe_target(loss: Tensor) -> dict[str, Any]:
    """What the target of a step's loss looks like, as numbers on its device; empty where it is not known.

    Of classes: ``target_class``, the most frequent, and ``target_class_share``, its share of the samples.  Of numbers:
    ``target_rms`` and ``target_spread``, their rms and standard deviation; ``target_lowest`` and ``target_highest``.

    Example:
        >>> import torch
        >>> out = torch.zeros(4, 3, requires_grad=True)
        >>> told = describe_target(torch.nn.functional.cross_entropy(out, torch.tensor([2, 2, 0, 2])))
        >>> {name: x.item() for name, x in told.items()}
        {'target_class': 2.0, 'target_class_share': 0.75}
    """
    target = target_of(loss)
    if target is None or not target.numel() or type(target) is not Tensor:
        return {}
    if target.is_floating_point():
        values = target.to(statistics.wide(target.device))
        lowest, highest = values.aminmax()
        return {
            "target_rms": statistics.rms(values),
            "target_spread": values.std(correction=0),
            "target_lowest": lowest,
            "target_highest": highest,
        }
    labels = target.flatten()
    modal = labels.mode().values
    share = statistics.mean(labels == modal)
    return {"target_class": modal.to(share.dtype), "target_class_share": share}
