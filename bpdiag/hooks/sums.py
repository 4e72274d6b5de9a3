"""Additions between modules as calls: where ways meet in a residual net that is written x + f(x)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

from torch import nn

from bpdiag.hooks.call import Call, Facts


class Add(nn.Module):
    """In the place of a module, for the sums that have none."""


class Sub(nn.Module):
    """Likewise for differences."""


ADDITIONS = {"AddBackward0": "+", "SubBackward0": "-"}
KINDS = {"+": Add, "-": Sub}


def joins(node: Any, below: Sequence[Collection[Any]]) -> bool:
    """Whether a node is a sum that has a row: of two operands, neither a number, from different watched calls.

    What is added in place to a view is none: autograd shows a copy into the view there, whatever was done.

    Args:
        node: of autograd's graph.
        below: for each of its inputs that has a graph, the calls that it was computed from.
    """
    if len(below) != 2 or not all(below) or set(below[0]) == set(below[1]):
        return False
    return node.name() in ADDITIONS and len(node._input_metadata[0].shape) > 0


def call_of(
    node: Any,
    parents: Collection[Call],
    is_taken: Callable[[tuple[str, int]], bool],
    place: tuple[int, tuple[int, int]],
    **known: Any,
) -> Call:
    """The call that a sum is: ``f+`` adds what f gave out, the last call that led to an operand and to no sum below.

    Args:
        node: the sum.
        parents: what it was computed from, one call at least.
        is_taken: whether another sum of the pass has a key.
        place: number of the pass, place in the order of execution.
        known: further fields of the call.
    """
    last = max((call.adds or call for call in parents), key=lambda call: call.order)
    sign = ADDITIONS[node.name()]
    name, number = last.name + sign, last.number
    while is_taken((name, number)):
        number += 1
    shape = tuple(node._input_metadata[0].shape)
    return Call(_facts(name, sign), number, place[0], shape, True, tuple(parents), place[1], adds=last, **known)


@cache
def _facts(name: str, sign: str) -> Facts:
    return Facts(KINDS[sign](), name)
