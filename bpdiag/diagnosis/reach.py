"""Reach: how far one step can move an output, u sqrt(fan_in) of its own size, u = rms(dW) / rms(W)."""

from __future__ import annotations

import math

import numpy as np

from bpdiag.diagnosis.ledger import Profile

MOST_REACH = 1.0  # of a step: rms(dW)/rms(W) sqrt(fan_in); at 1 one step moves an output by its own size
FIRST_REACH = 1.5  # of one step alone, as the first: up to 1.4 nets got over it
WORSE = 1.25  # times the first loss: it has risen
DIVERGED = "diverged"  # first word of the cause of what steps too large have done to a loss


def reach(p: Profile) -> np.ndarray:
    """(S, L) of each weight layer; 0 where it is not known, and of weights at 0, which any step moves without end."""
    fan_in = np.array([p.trace.layers[i].fan_in or 1 for i in p.lines], float)
    far = p.trace.column("update_ratio")[0][:, p.lines] * np.sqrt(fan_in)
    return np.where(np.isfinite(far), far, 0.0)


def risen(p: Profile, losses: np.ndarray) -> np.ndarray:
    """(S,) bool: the loss is well above its first value, one above 0."""
    _, told = p.trace.losses
    first = next(iter(told[np.isfinite(told)]), math.nan)
    return (losses > WORSE * first) & (first > 0)


def before_the_rise(p: Profile) -> tuple[int, float]:
    """(sample, reach) of the largest step taken while the loss had not yet risen; (-1, nan) where there is none.

    What has diverged has weights of another size, and a reach that says nothing of the rate it began with.
    """
    furthest = reach(p).max(axis=1, initial=0)
    furthest[~p.finite | np.maximum.accumulate(risen(p, p.trace.told("loss")))] = 0
    at = int(np.argmax(furthest)) if furthest.size else -1
    return (at, float(furthest[at])) if at >= 0 and furthest[at] > 0 else (-1, math.nan)


def overwritten(p: Profile) -> np.ndarray:
    """(S,) bool: so far some step has moved an output by more than its size, beyond what nets got over."""
    far = np.where(p.finite[:, None], reach(p), 0.0).max(axis=1, initial=0)
    return np.maximum.accumulate(far) > FIRST_REACH
