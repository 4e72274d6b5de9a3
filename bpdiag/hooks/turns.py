"""When a step of the training ends: of several optimizers, with the last of them to step, in whatever order they do."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

PATIENCE = 8  # steps of one optimizer in which another is waited for; more than the 5 of a critic for each generator's


class Turns:
    """A step ends when every optimizer that is waited for has stepped since the last one ended.

    Waited for is whoever last stepped within 8 steps of any other; at first all are.  One that never steps holds up the
    first step alone: it ends after the ninth of another, as nine, and from then on each of those is one.

    Example:
        >>> import torch
        >>> d, g = (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(2))
        >>> turns = Turns([g, d])
        >>> [turns.taken_by(one) for one in (d, d, g, d, d, g)]
        [0, 0, 1, 0, 0, 1]
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._taken = dict.fromkeys(optimizers, 0)  # steps since the last end
        # by optimizer, of each other one: the steps it has taken since
        self._since = {one: dict.fromkeys((o for o in self._taken if o is not one), 0) for one in self._taken}
        self._before = dict.fromkeys(self._taken, 0)  # the most of any, when it last stepped

    def taken_by(self, optimizer: Optimizer) -> int:
        """``optimizer`` has stepped: how many steps of the training end with that, mostly none or one."""
        self._before[optimizer] = max(self._since[optimizer].values(), default=0)
        self._since[optimizer] = dict.fromkeys(self._since[optimizer], 0)
        for one, others in self._since.items():
            if one is not optimizer:
                others[optimizer] += 1
        self._taken[optimizer] += 1
        if not all(taken or not self._is_awaited(one) for one, taken in self._taken.items()):
            return 0
        count = 1 if all(self._taken.values()) else self._taken[optimizer]
        self.begin()
        return count

    def begin(self) -> None:
        """A step has ended, by these turns or by word."""
        self._taken = dict.fromkeys(self._taken, 0)

    def _is_awaited(self, one: Optimizer) -> bool:
        return max(self._before[one], *self._since[one].values(), 0) <= PATIENCE
