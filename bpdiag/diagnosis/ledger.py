"""A trace laid out for judging: gains, the exact ledger, travel and the course of the loss, as plain arrays.

The ledger of one step from weight layer l+1 down to l (log is log10, r = 1/sqrt(critical weight variance) of phi_l):

    log G = d_w + d_s + log A + log C        d_w = log(sig r)   sig = sqrt(fan_in) rms(W_{l+1})    A = w / sig
                                             d_s = log(sl / r)  sl = rms(phi'(z_l))                C = s / sl

d_w is the weights' share of the blame, d_s the slopes', log A + log C the alignment's; d_w = d_s = 0 in a net that
neither shrinks nor grows a gradient.  What lies between and is no activation (a normalization, a pool) is "other".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from bpdiag.trace import Trace

ASSUMED_STEPS = 1_000  # the horizon T where none was planned
CONVERGED = 0.1  # of ln K or of the first loss
FLAT = 0.02  # of the first loss: less of a fall in half the run is a plateau
ROSE = 10.0  # times its first value: a loss that diverges
SMALLEST = 1e-30  # a cotangent so small may underflow in float32 whatever the layer does
WINDOW = 5  # samples that an update ratio is the median of


@dataclass
class Profile:
    """A trace laid out for judging: S sampled steps, L weight layers, L-1 steps between them; log is log10."""

    trace: Trace
    lines: list[int]  # indices of the weight layers that got a gradient
    steps: np.ndarray  # (S,) sampled steps
    finite: np.ndarray  # (S,) bool: every number of the step is finite
    decades: np.ndarray  # (S, L)
    gain: np.ndarray  # (S, L): G of the step above l; nan for the last
    ledger: dict[str, np.ndarray]  # weights, slopes, alignment, other -> (S, L) decades of the step above l
    travel: np.ndarray  # (S, L)
    losses: np.ndarray  # (S,) mean of the last ones
    converged: np.ndarray  # (S,) bool
    plateau: np.ndarray  # (S,) bool
    falling: np.ndarray  # (S,) bool: the loss fell by 2 % of guessing or more in the second half of the steps so far
    planned: int
    sgd_like: bool

    def title(self, at: int) -> str:
        """What weight layer number ``at`` (from 0) is called in a sentence."""
        return self.trace.layers[self.lines[at]].title

    def names(self, where: Iterable[int]) -> tuple[str, ...]:
        """``name#call`` of weight layers by their number from 0."""
        return tuple(self.trace.layers[self.lines[i]].key for i in where)

    def hidden_gain(self, at: int) -> float:
        """The root of |g_z_1| / |g_z of the last hidden layer| at sample ``at``: the geometric mean of a chain's gains.

        Where one of the two is not known, the mean of the gains that are; nan if there is none.
        """
        hidden = len(self.lines) - 2
        gains = self.gain[at, : max(hidden, 1)]
        if hidden > 0 and np.isfinite(self.decades[at, [0, hidden]]).all():
            return float(10 ** ((self.decades[at, 0] - self.decades[at, hidden]) / hidden))
        gains = gains[np.isfinite(gains) & (gains > 0)]
        return float(10 ** np.log10(gains).mean()) if gains.size else math.nan


def profile(trace: Trace) -> Profile:
    """The numbers that judging needs, from the columns of a trace."""
    return trace.once("profile", lambda: _profile(trace))


def _profile(trace: Trace) -> Profile:
    lines = [i for i in trace.weight_layers() if trace.column("g_z_norm")[1][:, i].any()]
    steps = trace.sampled_steps

    def pick(name: str) -> np.ndarray:
        return trace.column(name)[0][:, lines]

    gain, decades = pick("backward_gain"), pick("decades")
    with np.errstate(all="ignore"):
        ledger = _ledger(trace, lines, gain)
        travel = _travel(trace, lines, pick("update_ratio"))
    losses, converged, plateau, falling = _course(trace, lines)
    return Profile(
        trace=trace,
        lines=lines,
        steps=steps,
        finite=_finite(trace),
        decades=decades,
        gain=gain,
        ledger=ledger,
        travel=travel,
        losses=losses,
        converged=converged,
        plateau=plateau,
        falling=falling,
        planned=horizon(trace),
        sgd_like=bool(trace.meta.get("optimizer", {}).get("sgd_like", True)),
    )


def _ledger(trace: Trace, lines: list[int], gain: np.ndarray) -> dict[str, np.ndarray]:
    """(S, L) decades of the step above each weight layer, by owner; nan where the way up is not known."""

    def log(name: str, i: int) -> np.ndarray:
        return np.log10(trace.column(name)[0][:, i])

    out = {owner: np.full(gain.shape, np.nan) for owner in ("weights", "slopes", "alignment", "other")}
    for at, i in enumerate(lines):
        layer = trace.layers[i]
        if layer.next is None:
            continue
        sig = log("W_rms", layer.next) + math.log10(trace.layers[layer.next].fan_in or 1) / 2
        passed = log("slope_factor", i)
        way = [i, *layer.via]
        carriers = [j for j in way if trace.layers[j].activation]
        r = math.prod(trace.layers[j].r or 1.0 for j in carriers)
        own = passed  # the activation's own factor; one unknown to us, a module or a function, takes all that passes
        if len(carriers) == 1:
            own = _activation_factor(trace, way, carriers[0], log)
        elif not carriers and any("norm" in trace.layers[j].kind for j in layer.via):
            own = 0.0 * passed
        measured = bool(carriers) and all(trace.column("slope_rms")[1][:, j].any() for j in carriers)
        size = sum(log("slope_rms", j) for j in carriers) if measured else own
        weights, other = sig + math.log10(r), passed - own
        if any("norm" in trace.layers[j].kind for j in layer.via):  # it undoes what the size of the weights does
            weights, other = 0 * weights, other + weights
        out["weights"][:, at] = weights
        out["slopes"][:, at] = size - math.log10(r)
        out["alignment"][:, at] = log("weight_factor", i) - sig + own - size
        out["other"][:, at] = other
        # nobody took what the number format could not hold
        gone = (gain[:, at] == 0) & (trace.column("g_z_norm")[0][:, layer.next] < SMALLEST)
        for owner in out.values():
            owner[gone, at] = np.nan
    return out


def _activation_factor(trace: Trace, way: list[int], j: int, log: Callable[[str, int], np.ndarray]) -> np.ndarray:
    """log(|cotangent below phi| / |above it|) of the activation on row ``j``, apart from what else lies on the way."""
    if trace.column("g_z_norm")[1][:, j].any():  # a function call: both are on the row of the layer below
        return log("g_z_norm", j) - log("g_a_norm", j)
    below = way[way.index(j) - 1]
    return log("g_z_norm", below) - log("g_a_norm", j)


def classes(trace: Trace, lines: list[int]) -> int:
    """K, what a softmax of the loss chooses among; without one the outputs of the last layer."""
    for step in reversed(trace.meta.get("loss_path") or []):
        if step["op"] == "LogSoftmax" and "dim" in step:
            return int(step["shape"][step["dim"]])
    return (trace.layers[lines[-1]].units if lines else None) or 1


def rose(trace: Trace) -> bool:
    """Whether the loss has risen to ten times its first value."""
    losses = trace.losses[1]
    losses = losses[np.isfinite(losses)]
    return len(losses) > 1 and bool(0 < ROSE * losses[0] < losses.max())


def horizon(trace: Trace) -> int:
    """T, the steps planned; 1,000 where none were given."""
    return int(trace.meta.get("planned_steps") or ASSUMED_STEPS)


def _travel(trace: Trace, lines: list[int], ratio: np.ndarray) -> np.ndarray:
    """tau = T u sqrt(fan_in), (S, L): a bound on the relative change of z over T planned steps that all agree.

    The median of the last five samples.  SGD's first steps are short while its momentum builds up: u / (1 - mu^(t+1)).
    """
    optimizer = trace.meta.get("optimizer", {})
    momentum = 0.0 if optimizer.get("begun") else min(float(optimizer.get("momentum", 0.0)), 0.999)
    ratio = ratio / (1 - momentum ** (trace.sampled_steps[:, None] + 1.0))
    recent = np.full((WINDOW, *ratio.shape), np.nan)
    for k in range(min(WINDOW, len(ratio))):
        recent[k, k:] = ratio[: len(ratio) - k]
    recent.sort(axis=0)  # nan last
    known = (~np.isnan(recent)).sum(axis=0)[None]
    middle = [np.take_along_axis(recent, np.maximum(known + k, 0) // 2, axis=0)[0] for k in (-1, 0)]
    usual = (middle[0] + middle[1]) / 2  # of a layer without any update nan
    fan_in = np.array([trace.layers[i].fan_in or 1 for i in lines], float)
    return horizon(trace) * usual * np.sqrt(fan_in)


def _finite(trace: Trace) -> np.ndarray:
    """(S,) bool: every number measured in the step is finite."""
    ok = np.ones(len(trace.sampled_steps), bool)
    for name in ("z_norm", "a_norm", "g_z_norm", "g_a_norm", "W_rms", "g_W_norm"):
        values, there = trace.column(name)
        ok &= ~(there & ~np.isfinite(values)).any(1)
    return ok


def _course(trace: Trace, lines: list[int]) -> tuple[np.ndarray, ...]:
    """(S,) each: the mean of the last losses at a sampled step; whether it has converged, is stuck, is falling.

    Guessing costs ln K, K the outputs, where the loss is a cross-entropy.  Converged: below a tenth of that, or below a
    tenth of its first value and half of that (a start far above guessing makes guessing no merit).  A plateau, of 20
    steps at least: within a tenth of guessing, or above half of it and fallen by under 2 % of it in the second half.
    """
    steps, losses = trace.losses
    steps, losses = steps[np.isfinite(losses)], losses[np.isfinite(losses)]
    count = np.searchsorted(steps, trace.sampled_steps, side="right")
    if not len(losses) or not lines:
        nothing = np.zeros(len(count), bool)
        return np.full(len(count), np.nan), nothing, nothing, nothing
    padded = np.append(losses, 0.0)

    def mean_to(end: np.ndarray, width: np.ndarray) -> np.ndarray:
        """Of the losses before ``end``; each sum for itself: one of 1e17 would drown the others in a running one."""
        start = np.maximum(end - width, 0)
        sums = np.add.reduceat(padded, np.stack([start, end], axis=1).ravel())[::2]
        return np.where(end > start, sums / np.maximum(end - start, 1), 0.0)

    width = np.maximum(10, count // 10)
    now, half_way = mean_to(count, width), mean_to(count // 2, width)
    first, among = losses[0], classes(trace, lines)
    kind = trace.meta.get("loss", "cross_entropy" if first >= math.log(among) / 2 else "unknown")
    guessing = math.log(among) if kind == "cross_entropy" and losses.min() >= 0 else 0.0
    low = (now < CONVERGED * guessing) | ((now < CONVERGED * first) & ((guessing == 0) | (now < guessing / 2)))
    converged = (count > 0) & low & (first > 0)
    stands = min(first, guessing) if guessing > 0 else first
    falling = half_way - now >= FLAT * stands
    flat = ~falling & (now > stands / 2)
    plateau = (count >= 20) & (flat | (now > (1 - CONVERGED) * stands))
    return np.where(count > 0, now, np.nan), converged, plateau, falling
