"""From norms to what happens between layers: gains, factors, decades; and for each that is missing, why."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from bpdiag.hooks.between import change_numbers
from bpdiag.hooks.call import Call

NOT_ALONE = "not this layer's way alone, or one through a checkpoint, or no gradient came"
FLOW = ("decades", "backward_gain", "weight_factor", "slope_factor")
Gap = tuple[Call, str, str]  # call, column, reason
Way = tuple[tuple[Call, ...], Call | None, str]  # calls passed, next weight layer, why there is none


def derive(calls: Sequence[Call], given: Collection[Call]) -> tuple[dict[Call, Way], list[Gap]]:
    """Add the step-to-step numbers to each call's values (host floats by now); the ways up, and what is missing.

    Args:
        calls: of one step, in execution order.
        given: those the model's output was computed from: the loss may read them directly.
    """
    gaps: list[Gap] = []
    for call in calls:
        _finish_norms(call, gaps)
    readers: dict[Call, list[Call]] = {}
    for call in calls:
        for parent in call.parents:
            readers.setdefault(parent, []).append(call)
    lost = any(call.given_up for call in calls)
    ways = {call: _way(call, readers, given, lost) for call in calls if call.fan_in is not None}
    _decades(calls, ways, readers)
    _edge_gains(calls, readers, given, gaps)
    below = _weights_below(calls)
    for call, way in ways.items():
        feed = call.values.get("x_rms") if not call.parents else None
        if len(below[call]) == 1:
            feed = below[call][0].values["z_rms"]
        if feed is None:
            gaps.append((call, "forward_gain", "several layers feed it" if below[call] else "its input is not watched"))
        else:
            call.values["forward_gain"] = ratio(call.values["z_rms"], feed)
        _factors(call, way, gaps)
    return ways, gaps


def _finish_norms(call: Call, gaps: list[Gap]) -> None:
    """Several outputs' cotangents into one norm, rms from norms; say why a cotangent is missing."""
    own = call.g
    if max(call.events.values(), default=0) > 1:
        for name in [n for n in call.values if n.startswith(("g_z", "g_a"))]:
            del call.values[name]
        call.sizes = {k: v for k, v in call.sizes.items() if not k.startswith("g_")}
        gaps.append((call, f"{own}_norm", "several backwards went through it"))
    elif call.events:
        parts = [call.values.pop(f"_{own}_{i}") for i in call.events]
        call.values[f"{own}_norm"] = parts[0] if len(parts) == 1 else math.hypot(*parts)
    else:
        reason = "no gradient came back" if call.in_graph else "outside the graph: nothing below it is trained"
        gaps.append((call, f"{own}_norm", reason))
    if call.is_sum and "z_norm" not in call.values:
        gaps.append((call, "z_norm", "a sum between modules, read by none as it is"))
    for tensor, size in call.sizes.items():
        if f"{tensor}_norm" in call.values:
            call.values[f"{tensor}_rms"] = ratio(call.values[f"{tensor}_norm"], math.sqrt(size))
    if call.fan_in is not None and call.tensor == "z":
        n, total = call.samples, call.values.get("_units_norm", math.nan)
        call.values["z_cosine"] = (total * total - n) / (n * (n - 1)) if n > 1 else math.nan
    if "dW_rms" in call.values:
        call.values["update_ratio"] = ratio(call.values["dW_rms"], call.values["W_rms"])


def _decades(calls: Sequence[Call], ways: dict[Call, Way], readers: dict[Call, list[Call]]) -> None:
    """D_l = log10(|g_z_l| / |g_z of the last|); of several heads, the norm of all of them together."""
    covered: set[Call] = set()  # calls with a weight layer above them
    for call in reversed(calls):
        if any(r.fan_in is not None or r in covered for r in readers.get(call, [])):
            covered.add(call)
    for number in {call.backward for call in calls}:
        arrived = [c for c in ways if c.backward == number and "g_z_norm" in c.values]
        top = math.hypot(*(c.values["g_z_norm"] for c in arrived if c not in covered))
        for call in arrived:
            call.values["decades"] = log10(ratio(call.values["g_z_norm"], top))


def _edge_gains(
    calls: Sequence[Call], readers: dict[Call, list[Call]], given: Collection[Call], gaps: list[Gap]
) -> None:
    """|v| / |g| for each edge of a call that reads where others read too, or over a gap: v what the edge carries.

    g is the call's own cotangent; for a gap what the call sends into it, which of a sum is its own.
    """
    for call in calls:
        own = call.values.get(f"{call.g}_norm")
        if own is None:
            continue
        forks = [p for p in call.parents if len(readers[p]) > 1 or p in given]
        over = [p for p in call.parents if change_numbers(call.gap.get(p, ()))]
        if not forks and not over:
            continue
        carried = {p: p.values.get(f"{p.g}_norm") for p in call.parents} | {p: call.edges.get(p) for p in forks}
        known = {p: v for p, v in carried.items() if v is not None}
        if any(p in known for p in forks):
            call.edge_gains = {p: ratio(v, own) for p, v in known.items()}
        if any(p not in known for p in forks):
            gaps.append((call, "edge_gain", NOT_ALONE))
        if over:
            sent = own if call.is_sum else call.values.get("_entering_norm") if call.inputs == 1 else None
            if sent is not None:
                call.gap_gains = {p: ratio(known[p], sent) for p in over if p in known}
            if sent is None:
                gaps.append((call, "gap_gain", "it has several inputs, or works in place: what it sends is not known"))
            elif any(p not in known for p in over):
                gaps.append((call, "gap_gain", NOT_ALONE))


def _factors(call: Call, way: Way, gaps: list[Gap]) -> None:
    """G = w s of the step above ``call``."""
    passed, child, why = way
    here = call.values.get("g_z_norm")
    above = child.values.get("g_z_norm") if child else None
    if here is None:
        gaps += [(call, column, "its own gradient is missing") for column in FLOW]
        return
    if child is None or above is None:
        gaps += [(call, c, why or "no gradient came back to the next weight layer") for c in FLOW[1:]]
        return
    call.values["backward_gain"] = ratio(here, above)
    last = passed[-1] if passed else call
    entering = child.values.get("_entering_norm", last.values.get(f"{last.g}_norm"))
    if entering is None:
        gaps += [(call, c, "no gradient came back to the activation") for c in FLOW[2:]]
        return
    call.values["weight_factor"] = ratio(entering, above)
    call.values["slope_factor"] = ratio(here, entering)


def _way(call: Call, readers: dict[Call, list[Call]], given: Collection[Call], lost: bool) -> Way:
    """Upwards as long as each output has one reader; ``lost``: some layer's walk down was given up."""
    passed: list[Call] = []
    while True:
        above = readers.get(call, [])
        if not above:
            why = "no watched layer reads its output" if passed else "the last layer: nothing above it"
            return tuple(passed), None, "too many operations between layers to follow the way up" if lost else why
        if len(above) > 1 or call in given:
            also = " and the model's output" if call in given else ""
            return tuple(passed), None, f"its output is read by {len(above)} layers{also}: the way up forks"
        call = above[0]
        if call.fan_in is not None:
            return tuple(passed), call, ""
        passed.append(call)


def _weights_below(calls: Sequence[Call]) -> dict[Call, list[Call]]:
    """The nearest weight layers below each call, over calls that have none; two at the most: more say no more."""
    below: dict[Call, list[Call]] = {}
    for call in calls:  # in execution order, so that parents come first
        nearest: dict[Call, None] = {}
        for parent in call.parents:
            nearest |= dict.fromkeys([parent] if parent.fan_in is not None else below.get(parent, []))
        below[call] = list(nearest)[:2]
    return below


def ratio(a: Any, b: Any) -> float:
    """a / b with 0/0 = nan, a/0 = inf.

    Example:
        >>> ratio(1.0, 4.0), ratio(1.0, 0.0), ratio(0.0, 0.0)
        (0.25, inf, nan)
    """
    if b:
        return a / b
    return math.nan if not a or math.isnan(a) else math.inf


def log10(x: float) -> float:
    """Decades of a factor: -inf for 0; nan stays nan.

    Example:
        >>> log10(0.01), log10(0.0)
        (-2.0, -inf)
    """
    if x == math.inf:
        return x
    return math.log10(x) if x > 0 else -math.inf if x == 0 else math.nan
