"""What stands between a model's output and its loss, read from autograd's graph: a judge sees what was done there."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import Tensor

MOST_NODES = 64  # between the output and the loss


def loss_path(loss: Tensor, outputs: Collection[tuple[Any, int]]) -> list[dict[str, Any]]:
    """The operations from the model's output up to ``loss``, each after those that it reads.

    Args:
        loss: before its backward.
        outputs: the model's output tensors, each the node that made it and which of its outputs it is.

    Returns:
        ``{"op": "LogSoftmax", "shape": [64, 10], "dim": 1}``: autograd's name of it without Backward, the shape of what
        it gave out, the dimension it worked along, counted from the front, where it has one.  First the outputs that
        are read, as ``{"op": "Output", "shape": [64, 10]}``.  Empty where the loss was not computed from these outputs,
        or over more than 64 operations.

    Example:
        >>> import torch
        >>> out = torch.ones(3, 2, requires_grad=True) * 1
        >>> [step["op"] for step in loss_path(out.softmax(1).log().mean(), [(out.grad_fn, 0)])]
        ['Output', 'Softmax', 'Log', 'Mean']
    """
    ends, order, seen = set(outputs), [], set()
    reached: dict[tuple[Any, int], None] = {}
    stack = [(loss.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen and not hasattr(node, "variable"):
            seen.add(node)
            if len(seen) > MOST_NODES:
                return []
            reached |= dict.fromkeys(edge for edge in node.next_functions if edge in ends)
            below = [edge for edge in node.next_functions if edge not in ends]
            stack += [(node, True), *((edge[0], False) for edge in reversed(below))]
    begins = [{"op": "Output", "shape": _shape(node, number)} for node, number in reached]
    return [*begins, *map(_step, order)] if reached else []


def kind_of_loss(loss: Tensor) -> str:
    """cross_entropy where autograd's graph shows one within a few nodes of the loss, else unknown."""
    stack, seen = [loss.grad_fn], 0
    while stack and seen < 32:
        node, seen = stack.pop(0), seen + 1
        if node is not None:
            if any(word in node.name() for word in ("NllLoss", "CrossEntropy")):
                return "cross_entropy"
            stack += [below for below, _ in node.next_functions]
    return "unknown"


def _shape(node: Any, number: int = 0) -> list[int]:
    return [int(n) for n in node._input_metadata[number].shape]


def _step(node: Any) -> dict[str, Any]:
    shape = _shape(node)
    told: dict[str, Any] = {"op": re.sub(r"Backward\d*$", "", node.name()), "shape": shape}
    dim = getattr(node, "_saved_dim", None)
    if isinstance(dim, int):
        told["dim"] = dim if dim < 2**63 else dim - 2**64 + len(shape)  # autograd keeps -1 as an unsigned number
    return told
