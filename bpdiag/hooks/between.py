"""What lies between two watched calls, by name: operations that no module computes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

from bpdiag.hooks.call import SHAPE_NODES


def names(nodes: Iterable[Any], without_write: bool = False) -> tuple[str, ...]:
    """Each kind of operation once, the lowest first.

    Args:
        nodes: of autograd's graph, from above.
        without_write: leave out that a view was overwritten, as by a reader that works in place.

    Example:
        >>> import torch
        >>> x = torch.ones(2, 2, requires_grad=True).mul(2).view(4).softmax(0)
        >>> view = x.grad_fn.next_functions[0][0]
        >>> names([x.grad_fn, view, view.next_functions[0][0]])
        ('mul', 'view', 'softmax')
    """
    found = reversed([operation(node.name()) for node in nodes])
    return tuple(dict.fromkeys(name for name in found if not (without_write and name == "copy_slices")))


@cache
def operation(node: str) -> str:
    """What a node of autograd's graph is the backward of; all of torch's fused attentions are one.

    Example:
        >>> operation("UnsafeViewBackward0"), operation("ScaledDotProductFlashAttentionForCpuBackward0")
        ('unsafe_view', 'scaled_dot_product_attention')
    """
    name = re.sub(r"Backward\d*$", "", node.rpartition("::")[2])
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    return "scaled_dot_product_attention" if words.startswith("scaled_dot_product") else words


SHAPES = frozenset(map(operation, SHAPE_NODES))


def change_numbers(operations: Collection[str]) -> bool:
    """Whether they do more than move numbers about.

    Example:
        >>> change_numbers(("view", "transpose")), change_numbers(("view", "mul"))
        (False, True)
    """
    return not SHAPES.issuperset(operations)
