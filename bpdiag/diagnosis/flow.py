"""Vanishing and exploding: one ledger, read in two directions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import numpy as np

from bpdiag.diagnosis.finding import Finding, percent, power, real
from bpdiag.diagnosis.harm import LEAST_TRAVEL, harmed_layers, verdict
from bpdiag.diagnosis.ledger import Profile
from bpdiag.diagnosis.unrolled import unrolled

GATED = ("lstmcell", "grucell")
SLIP = math.log10(2) / 2  # 0.15 decades a layer: the smallest classical slip of a weight variance, a factor of 2
ROUNDING = 1e-9  # decades: less is no share of anything
FORMAT_END = 38.5  # log10 of the largest float32


def _cause(p: Profile, quote: np.ndarray, lowest: int, sign: int) -> tuple[str, dict[str, float]]:
    """The owner of most decades lost (sign -1) or gained (+1), and each owner's decades and share of them.

    Between layer ``lowest`` and the top; medians over the samples quoted, summed over the steps.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a step whose way up is not known: nan
        typical = {k: np.nanmedian(v[quote][:, lowest:-1], axis=0) for k, v in p.ledger.items()}
    owners = {k: float(v[~np.isnan(v)].sum()) for k, v in typical.items()}
    taken = {k: max(sign * v, 0.0) for k, v in owners.items()}
    cut = math.inf in taken.values()
    if cut:  # a factor of exactly 0 took all, whatever the others did
        taken = {k: float(v == math.inf) for k, v in taken.items()}
    total = sum(taken.values())
    total = total if total > ROUNDING else 0.0
    evidence = {f"decades_{k}": v for k, v in owners.items()}
    evidence |= {f"share_{k}": v / total if total else math.nan for k, v in taken.items()}
    slips = [np.abs(typical[k][np.isfinite(typical[k])]) for k in ("weights", "slopes")]
    cause = max(taken, key=lambda k: taken[k]) if total else "depth"
    if cause == "other":  # what lies between: a normalization where there is one, else some function's slope
        normalized = any("norm" in layer.kind for layer in p.trace.layers)
        cause = "normalization" if normalized else "slopes"
    elif not cut and all(slip.mean() < SLIP for slip in slips if slip.size) and cause != "alignment":
        cause = "depth"
    return cause, evidence


def _time_steps(p: Profile, lowest: int) -> int:
    """How many time steps stand above layer ``lowest``, where it and most others have three; else 0.

    A cell unrolled in time: the steps between its calls are one map, over and over.
    """
    layers, above = p.trace.layers, p.lines[lowest:-1]
    if not len(above):
        return 0
    calls = unrolled(layers, {layers[i].name for i in above})
    if above[0] not in calls or 2 * sum(i in calls for i in above) <= len(above):
        return 0
    return sum(i in calls and layers[i].name == layers[above[0]].name for i in above) - 1


def _flow(p: Profile, kind: str, harmed: np.ndarray, sign: int) -> Iterator[Finding]:
    """Vanishing or exploding: the same ledger, read in two directions."""
    told = verdict(p, np.any(harmed, axis=1))
    if told is None:
        return
    severity, quote, onset, confidence = told
    where = np.flatnonzero(harmed[quote].mean(0) >= 0.5)
    where = where if where.size else np.flatnonzero(harmed[quote].any(0))
    where = where[sign * np.median(p.decades[quote][:, where], axis=0) > 0]
    if not where.size:
        return  # over all samples quoted it is not so
    lowest, limit = int(where[0]), math.log10(p.planned)
    decades = float(np.median(p.decades[quote, lowest]))
    cause, evidence = _cause(p, quote, lowest, sign)
    at = int(quote[-1])
    gain = p.hidden_gain(at)
    per_layer = decades / max(len(p.lines) - 1 - lowest, 1)
    travel = float(np.nanmedian(p.travel[quote, lowest])) if np.isfinite(p.travel[quote, lowest]).any() else math.nan
    evidence = {
        "decades": decades,
        "limit": sign * limit,
        "planned_steps": float(p.planned),
        "planned_steps_given": float(p.trace.meta.get("planned_steps") is not None),
        "gain_per_layer": gain,
        "travel": travel,
        "sgd_like": float(p.sgd_like),
        "loss": float(p.losses[at]),
        "step": float(p.steps[at]),
        **evidence,
    }
    if (times := _time_steps(p, lowest)) > 0:
        if severity == "warning":
            return  # it learns from its later calls, and has learned
        cause, per_layer = "time", decades / times
        evidence["gain_per_time_step"] = 10**per_layer
    name = p.title(lowest)
    if sign < 0:
        sentence = f"The gradient dies on its way down: {name} receives {power(decades)} of what the output sends."
    else:
        sentence = f"The gradient grows on its way down: {name} receives {power(decades)} times what the output sends."
    if severity == "warning":
        sentence += " It passed before the end."
    remedy, expected = _flow_remedy(p, cause, evidence, sign)
    yield Finding(
        kind=kind,
        severity=severity,
        layers=p.names(where),
        onset_step=onset,
        cause=cause,
        evidence=evidence,
        confidence=confidence,
        remedy=remedy,
        expected=expected,
        source="maths of the ledger: ours; variances: He et al. 2015, Schoenholz et al. 2017; harm: measured, ours",
        sentence=sentence,
        why=_flow_why(evidence, per_layer, p.planned, sign, "time step" if cause == "time" else "layer"),
    )


def vanishing(p: Profile) -> Iterator[Finding]:
    """Too little arrives below, by the harm rule."""
    yield from _flow(p, "vanishing", harmed_layers(p)[0], -1)


def exploding(p: Profile) -> Iterator[Finding]:
    """More arrives below than the top can live beside, or nearly more than the number format holds."""
    norms = p.trace.column("g_z_norm")[0][:, p.lines]
    with np.errstate(all="ignore"):
        near_the_end = (np.log10(norms) > FORMAT_END - 1) & p.finite[:, None]
    yield from _flow(p, "exploding", harmed_layers(p)[1] | near_the_end, +1)


OWNERS = {
    "weights": "the size of the weights",
    "slopes": "the activation's own slope",
    "alignment": "the alignment of cotangents with weights and slopes",
    "other": "what lies between weights and activations",
}


def _flow_why(evidence: dict[str, float], per_layer: float, planned: int, sign: int, unit: str) -> str:
    """Who takes how much of how much, and why that is too much."""
    shares = {k: evidence[f"share_{k}"] for k in OWNERS}
    ranked = sorted((k for k in shares if shares[k] > 0), key=lambda k: -shares[k])
    what, verb = ("lost", "takes") if sign < 0 else ("gained", "gives")
    if sign > 0:
        limit = f"over {planned:,} steps a rate that suits this layer leaves the top still"
    elif evidence["travel"] < LEAST_TRAVEL:
        most = f"by at most {evidence['travel']:.1g} of itself" if evidence["travel"] > 0 else "not at all"
        limit = f"over {planned:,} steps this layer can move its output {most}"
    elif not evidence["sgd_like"]:
        limit = f"the loss stands at {evidence['loss']:.3g} while so little comes this far"
    else:
        limit = f"over {planned:,} steps a layer must receive 10^{real(-math.log10(planned))} or more to learn"
    if not ranked:
        return f"{limit[0].upper()}{limit[1:]}."
    others = "".join(f", {OWNERS[k]} {percent(shares[k])}" for k in ranked[1:] if shares[k] >= 0.005)
    much = f"{real(abs(per_layer), 2)} decades a {unit} are {what}" if math.isfinite(per_layer) else f"All is {what}"
    return f"{much}: {OWNERS[ranked[0]]} {verb} {percent(shares[ranked[0]])} of it{others}; {limit}."


def _flow_remedy(p: Profile, cause: str, evidence: dict[str, float], sign: int) -> tuple[str, str]:
    """(what to do, what that should do to the number)."""
    decades = evidence["decades"]
    # another activation comes with its own critical weights: both go
    mended = {"weights": ("weights",), "slopes": ("weights", "slopes")}.get(cause, tuple(OWNERS))
    after = sign * max(sign * (decades - sum(evidence[f"decades_{owner}"] for owner in mended)), 0.0)
    normalized = any("norm" in layer.kind for layer in p.trace.layers)
    summed = any(len(layer.parents) > 1 for layer in p.trace.layers)
    goal = f"decades of the lowest layer from {real(decades)} to about {real(after)}"
    if not math.isfinite(after):
        goal = "a gradient in every layer: decades of the lowest layer to about 0"
    ours = "config" in p.trace.meta  # a run of our own, with our keys
    activations = {layer.activation for layer in p.trace.layers if layer.activation}
    kind = next(iter(activations)) if len(activations) == 1 else "the activation"
    r = next((layer.r for layer in p.trace.layers if layer.r), 1.0)
    if cause == "time":
        gated = any(layer.kind in GATED for layer in p.trace.layers)
        cells = "model.name=lstm, gru" if ours else "nn.LSTM, nn.GRU"
        return (
            "let the gates begin open (a forget gate's bias of 1 or more), or take shorter sequences"
            if gated
            else f"take a gated cell ({cells}), orthogonal recurrent weights, or shorter sequences",
            f"gain per time step from {evidence['gain_per_time_step']:.2g} to about 1",
        )
    if cause == "weights":
        critical = f"{1 / r**2:.2g}"
        preset = f" (model.weight_variance={'he' if critical == '2' else critical})" if ours else ""
        return f"initialize {kind} layers at weight variance {critical}/fan_in{preset}, or orthogonally", goal
    if cause == "slopes":
        words = "take an activation whose slope is 1 where it passes, with its critical weights"
        keys = " (model.activation=relu model.weight_variance=he)" if ours else ""
        return f"{words}{keys}" + ("" if normalized else ", or normalize the preactivations"), goal
    if cause == "alignment":
        return "initialize orthogonally" + ("" if normalized else ", or normalize the preactivations"), goal
    if summed:  # it has residual connections, or branches of another kind
        return (
            "scale each residual branch by 1/sqrt(number of blocks), or normalize at its beginning",
            "total gain between 1 and 1.65",
        )
    if cause == "normalization":
        return "add residual connections around the normalized layers", "decades of the lowest layer to about 0"
    gain = 10 ** (decades / max(len(p.lines) - 1, 1))
    deep = math.log10(p.planned) / max(abs(math.log10(gain)), 1e-9) if gain > 0 and math.isfinite(gain) else math.nan
    carries = f"; without them this chain carries {deep:.0f} layers over {p.planned:,} steps" if deep == deep else ""
    return (
        "add residual connections, each branch divided by sqrt(number of blocks)",
        f"total gain between 1 and 1.65{carries}",
    )
