"""Runs -> stacks: those of equal group are cut into stacks so that every process has work and ends at the same time."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from bpdiag.config import Config, planned_steps

LARGEST, LEAST = 16, 8  # members of a stack on one core: from 4 to 16 cost the same each, more buy nothing
ALONE = 3  # times what a member of a stack costs
PIXELS, DIGITS = 784, 55_000  # any data set's would do: only what costs more matters here
CONVOLUTIONS = 4_000_000  # multiplications for a picture
TIME_STEPS = {"rows": 28, "pixels": 784}  # of a recurrent net


@dataclass(frozen=True)
class Stack:
    """Runs that are trained together, by their number; ``together`` is False of one that no stack can take."""

    members: tuple[int, ...]
    cost: float
    together: bool = True


def cost(config: Config) -> float:
    """Multiplications of a run, roughly: which of two takes longer, and by how much.

    Example:
        >>> from bpdiag.config import ModelConfig
        >>> cost(Config(model=ModelConfig(depth=20))) > 2 * cost(Config(model=ModelConfig(depth=5)))
        True
    """
    net, batch = config.model, config.data.batch_size
    a_picture = PIXELS * net.width + net.width**2 * max(net.depth - 1, 0)
    a_picture += CONVOLUTIONS if net.name == "cnn" else 0
    a_picture *= TIME_STEPS[net.sequence] if net.name in ("rnn", "lstm", "gru") else 1
    return float(3 * a_picture * batch * planned_steps(config, DIGITS))


def deal(groups: Sequence[Hashable | None], costs: Sequence[float], processes: int) -> list[Stack]:
    """Stacks in the order in which they should begin: the longest first, each to the first process that is free.

    A stack holds at most 16 members, and fewer, down to 8, where the last process then ends sooner; where a group
    alone would keep a process longer than its share of everything, it is cut as small as it takes.

    Args:
        groups: of each run; None: it must train alone.
        costs: of each run, in any unit.
        processes: that work at the same time.

    Example:
        >>> [stack.members for stack in deal(["a"] * 12, [1.0] * 12, processes=2)]
        [(0, 1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11)]
        >>> [len(stack.members) for stack in deal(["a"] * 40 + [None], [1.0] * 41, processes=2)]
        [10, 10, 10, 10, 1]
    """
    tried = [_cut(groups, costs, processes, most) for most in range(LARGEST, LEAST - 1, -1)]
    return min(tried, key=lambda stacks: _makespan(stacks, processes))


def _cut(groups: Sequence[Hashable | None], costs: Sequence[float], processes: int, most: int) -> list[Stack]:
    together: dict[Hashable, list[int]] = {}
    stacks = []
    for number, group in enumerate(groups):
        if group is None:
            stacks.append(Stack((number,), ALONE * costs[number], together=False))
        else:
            together.setdefault(group, []).append(number)
    whole = {group: sum(costs[n] for n in runs) for group, runs in together.items()}
    share = (sum(whole.values()) + sum(stack.cost for stack in stacks)) / processes
    for group, runs in together.items():
        least = whole[group] / share - 1e-9 if share else 0
        pieces = max(1, min(math.ceil(len(runs) / most), len(runs) // LEAST), math.ceil(least))
        pieces = min(pieces, len(runs))
        for first, last in itertools.pairwise(len(runs) * piece // pieces for piece in range(pieces + 1)):
            part = runs[first:last]
            stacks.append(Stack(tuple(part), sum(costs[n] for n in part)))
    return sorted(stacks, key=lambda stack: -stack.cost)


def _makespan(stacks: Sequence[Stack], processes: int) -> float:
    """When the last of the processes ends."""
    free = [0.0] * min(processes, max(len(stacks), 1))
    for stack in stacks:
        heapq.heapreplace(free, free[0] + stack.cost)
    return max(free)
