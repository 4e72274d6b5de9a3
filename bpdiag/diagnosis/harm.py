"""When is a small gradient a fault?  When over the steps planned a layer cannot move."""

from __future__ import annotations

import math
import warnings

import numpy as np

from bpdiag.diagnosis.ledger import Profile

LEAST_TRAVEL = 0.1  # all steps agreeing move z by under a tenth
LUCK = 1.0  # decades that the draw of the weights alone may cost or give: healthy nets measured -.75 ... +.56
ADAM_DECADES = 3.0  # an optimizer that divides the scale out meets its eps about there


def harmed_layers(p: Profile) -> tuple[np.ndarray, np.ndarray]:
    """(S, L) bool each: layers that cannot learn because too little arrives; because what arrives below drowns them.

    None once the loss has converged.  Too little, beyond what luck of the weights does (|D| < 1), is any of

    * tau < 0.1 in the layer while the best layer's is above: its own gradient is what holds it back;
    * SGD: D < -log10 T: where the top layer stands steps of 1/sqrt(fan_in), this one gets 10^D of them;
    * any optimizer: D < -3 together with a plateau.

    Two are spared while the loss falls: what lies below weights that began at 0 on purpose (a last layer, a branch, an
    adapter: it grows), and the early calls of a module whose later ones receive enough (a cell unrolled in time).

    Too much is D > log10 T and beyond luck (SGD, or any optimizer on a plateau): the rate that the lowest layer stands
    starves the top.
    """
    return p.trace.once("harm", lambda: _harm(p))


def _harm(p: Profile) -> tuple[np.ndarray, np.ndarray]:
    limit = math.log10(p.planned)
    low, open_ = p.decades < -LUCK, ~p.converged[:, None] & p.finite[:, None]
    shared = _best_call(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        best = np.nanmax(np.where(np.isfinite(p.travel), p.travel, np.nan), axis=1, keepdims=True, initial=0.0)
    still = (p.travel < LEAST_TRAVEL) & (best >= LEAST_TRAVEL) & (shared < -LUCK)
    moving = ~p.plateau | p.falling | p.falling[-1:]
    growing = _below_a_zero(p) & moving[:, None]
    starved = np.zeros_like(low) if not p.sgd_like else shared < -limit
    stuck = (p.decades < -ADAM_DECADES) & p.plateau[:, None]
    vanishing = open_ & low & ~growing & ~_heads(p) & (still | starved | stuck)
    exploding = open_ & (p.decades > max(limit, LUCK)) & (p.plateau[:, None] | p.sgd_like)
    return vanishing, exploding


def _best_call(p: Profile) -> np.ndarray:
    """(S, L) decades of the best of all calls of the layer's module: one weight learns from all of them."""
    names = np.array([p.trace.layers[i].name for i in p.lines])
    best = p.decades.copy()
    for name in {n for n in names if (names == n).sum() > 1}:
        calls = np.flatnonzero(names == name)
        best[:, calls] = np.fmax.reduce(p.decades[:, calls], axis=1)[:, None]
    return best


def _heads(p: Profile) -> np.ndarray:
    """(L,) bool: no weight layer reads it: what a head does not get, it has lost to none."""
    layers, below = p.trace.layers, set[int]()
    for i in reversed(range(len(layers))):
        if layers[i].is_weight_layer or i in below:
            below.update(layers[i].parents)
    return np.array([i not in below for i in p.lines], bool)


def _below_a_zero(p: Profile) -> np.ndarray:
    """(L,) bool: a weight that is all 0 at the first sample stands above the layer."""
    W, there = p.trace.column("W_rms")
    zeros = np.flatnonzero(there[0] & (W[0] == 0)) if len(W) else np.zeros(0, int)
    highest = zeros.max(initial=-1)
    return np.array([i < highest for i in p.lines], bool)


def verdict(p: Profile, harmed: np.ndarray) -> tuple[str, np.ndarray, int, float] | None:
    """(severity, samples to quote, onset, confidence) of a harm, (S,) bool; None where it is none.

    It is harm if most of the last quarter of the finite samples have it; a warning if a tenth of all had it and it
    passed.
    """
    usable = np.flatnonzero(p.finite)
    if not usable.size or not harmed.any():
        return None
    last = usable[-max(1, math.ceil(usable.size / 4)) :]
    onset = int(p.steps[np.flatnonzero(harmed)[0]])
    share = float(harmed[last].mean())
    if share > 0.5:
        quote = last[harmed[last]]
        run = np.flatnonzero(~harmed[usable])
        onset = int(p.steps[usable[run[-1] + 1]]) if run.size and run[-1] + 1 < usable.size else onset
        return "harm", quote, onset, share
    if harmed[usable].mean() >= 0.1:
        return "warning", np.flatnonzero(harmed), onset, float(harmed[usable].mean())
    return None
