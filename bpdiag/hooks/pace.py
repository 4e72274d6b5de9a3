"""Which steps are sampled: 0, N, 2N, ... with a given N, or the least N whose measured cost stays under a limit."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from statistics import median

TRIED = 4  # steps of either kind that the first estimate is made of; one more of each is not counted: it warms up
KEPT = 9  # durations of either kind that an estimate is the median of
FARTHEST = 10_000  # the largest N chosen


class Pace:
    """Tells a step's fate before it begins, and learns what it took when it ends.

    With a limit the first steps are sampled, as many are not, and then

        N = ceil(extra / (limit · plain)),  plain = median time of an unsampled step,  extra = that of a sampled - plain

    estimated anew whenever a sampled step has ended.  Times are the wall's, from the end of one step to the end of the
    next, whatever the loop does between; where a device works behind the host's back a sampled step, which waits for
    it, seems dearer than it is, and N comes out larger than it need be.

    Args:
        every: N; where there is a limit, what it begins with.
        max_overhead: the limit, a share of the time of a step: 0.02 is 2 %.
        clock: seconds.

    Example:
        >>> Pace(every=3).begins(6), Pace(every=3).begins(7)
        (True, False)
    """

    def __init__(
        self, every: int = 1, max_overhead: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.every, self.max_overhead = every, max_overhead
        self._clock = clock
        self._next = 0  # the next step to be sampled
        self._took: dict[bool, deque[float]] = {kind: deque(maxlen=KEPT) for kind in (True, False)}
        self._met = {True: 0, False: 0}  # steps of either kind so far
        self._sampling = False
        self._ended: float | None = None  # when the last step did

    def begins(self, step: int) -> bool:
        """Whether ``step``, the next one, is sampled."""
        if self.max_overhead is None:
            self._sampling = step % self.every == 0
        elif self._met[False] <= TRIED:  # the first estimate needs both kinds
            self._sampling = self._met[True] <= TRIED
        else:
            self._sampling = step >= self._next
        if self._sampling:
            self._next = step + self.every
        return self._sampling

    def ended(self) -> None:
        """The step that was asked about last is over."""
        if self.max_overhead is None:
            return
        now = self._clock()
        if self._ended is not None and self._met[self._sampling]:
            self._took[self._sampling].append(now - self._ended)
        self._ended = now
        self._met[self._sampling] += 1
        if self._met[False] == TRIED + 1 or (self._sampling and self._met[False] > TRIED):
            before, self.every = self.every, self._estimate()
            self._next += self.every - before

    def _estimate(self) -> int:
        plain = median(self._took[False])
        extra = median(self._took[True]) - plain
        if extra <= 0:
            return 1
        limit = (self.max_overhead or 0) * plain
        return min(FARTHEST, math.ceil(extra / limit)) if limit > 0 else FARTHEST
