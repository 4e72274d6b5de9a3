"""Trace -> findings: which layer, which cause in numbers, which remedy and what it should do to the number.

Needs numpy, never torch: a stored run is judged again in a moment.  One generator per kind of finding, in the table
DIAGNOSES; a test owes each a sick and a healthy case.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bpdiag.diagnosis import between, blocks, unrolled
from bpdiag.diagnosis.beginning import forward_scale, logits_saturated, saturated
from bpdiag.diagnosis.course import chance_level, too_few_steps
from bpdiag.diagnosis.data import data_order, input_scale, targets
from bpdiag.diagnosis.expected import expected_gain, surprise, with_band
from bpdiag.diagnosis.finding import Finding, power
from bpdiag.diagnosis.flow import exploding, vanishing
from bpdiag.diagnosis.harm import LUCK
from bpdiag.diagnosis.interface import loss_interface
from bpdiag.diagnosis.ledger import ASSUMED_STEPS, Profile, profile
from bpdiag.diagnosis.nonfinite import non_finite
from bpdiag.diagnosis.precision import precision
from bpdiag.diagnosis.reach import DIVERGED
from bpdiag.diagnosis.structure import correlation_collapse, linear_stack, over_regularized, residual_mismatch
from bpdiag.diagnosis.symmetry import symmetric_initialization
from bpdiag.diagnosis.units import dead_by_chance, dead_units
from bpdiag.diagnosis.updates import dominating_layer, stale_gradient, update_too_large, update_too_small
from bpdiag.diagnosis.wiring import disconnected
from bpdiag.trace import Trace, write_json

__all__ = [
    "DIAGNOSES",
    "Finding",
    "Profile",
    "as_markdown",
    "dead_by_chance",
    "diagnose",
    "expected_gain",
    "notes",
    "profile",
    "summarize",
    "verdict",
    "with_band",
    "write",
]

# kind: its generator; the order is the order of telling
DIAGNOSES: dict[str, Callable[[Profile], Iterator[Finding]]] = {
    "non_finite": non_finite,
    "disconnected": disconnected,
    "loss_interface": loss_interface,
    "stale_gradient": stale_gradient,
    "symmetric_initialization": symmetric_initialization,
    "input_scale": input_scale,
    "targets": targets,
    "data_order": data_order,
    "precision": precision,
    "update_too_small": update_too_small,
    "saturated": saturated,
    "logits_saturated": logits_saturated,
    "forward_scale": forward_scale,
    "dead_units": dead_units,
    "residual_mismatch": residual_mismatch,
    "exploding": exploding,
    "vanishing": vanishing,
    "update_too_large": update_too_large,
    "over_regularized": over_regularized,
    "linear_stack": linear_stack,
    "correlation_collapse": correlation_collapse,
    "dominating_layer": dominating_layer,
    "chance_level": chance_level,
    "too_few_steps": too_few_steps,
}
VERDICTS = {"non_finite": "not finite", "exploding": "blows up"}  # every other harm: dies
UNEXPLAINED = ("chance_level", "too_few_steps")  # told where nothing else is
# one fault, one finding: where the first is found, the others are what it does
CAUSES = {
    "non_finite": ("forward_scale", "exploding", "update_too_large"),
    "symmetric_initialization": (
        "vanishing",
        "exploding",
        "dead_units",
        "saturated",
        "forward_scale",
        "correlation_collapse",
    ),
    "input_scale": (
        "saturated",
        "forward_scale",
        "dead_units",
        "update_too_large",
        "exploding",
        "vanishing",
        "correlation_collapse",
        "update_too_small",
        "targets",
    ),
    "targets": ("update_too_large", "update_too_small", "exploding", "vanishing", "dead_units"),
    "precision": ("non_finite", "vanishing", "update_too_small", "correlation_collapse", "dead_units"),
    "logits_saturated": ("forward_scale", "exploding"),
    "saturated": ("forward_scale",),
    "forward_scale": ("update_too_large",),
    "stale_gradient": ("update_too_large",),
    "dead_units": ("update_too_large", "correlation_collapse"),
    "update_too_small": ("vanishing", "correlation_collapse"),
    "residual_mismatch": ("exploding", "forward_scale"),
    "exploding": ("forward_scale", "dominating_layer", "update_too_small"),
    "vanishing": ("correlation_collapse", "dominating_layer"),
    "over_regularized": ("vanishing", "correlation_collapse", "dead_units", "exploding", "update_too_large"),
    "loss_interface": ("correlation_collapse", "exploding", "non_finite"),
    "disconnected": ("correlation_collapse", "vanishing", "dead_units"),
    "update_too_large": ("correlation_collapse",),
}
# what a net looks like that its steps have wrecked: no fault of its own where it began after the first sample
WRECKED = ("dead_units", "exploding", "vanishing", "residual_mismatch", "correlation_collapse")


def diagnose(trace: Trace) -> list[Finding]:
    """What is wrong with the run, worst first; empty for a healthy one.

    Raises:
        TypeError: It is no trace: of a watch, its ``trace`` is one.
        ValueError: The trace has no sampled step.
    """
    if not isinstance(trace, Trace):
        raise TypeError(
            f"diagnose takes a Trace, as `watch.trace` or `Trace.load(RUN)` give; got {type(trace).__name__}"
        )
    if not len(trace.sampled_steps):
        raise ValueError("the trace has no sampled step: nothing was measured")
    p = profile(trace)
    found = [finding for detect in DIAGNOSES.values() for finding in detect(p)]
    told = [f for f in found if not any(_explains(cause, f) for cause in found)]
    return sorted(told, key=lambda finding: finding.severity != "harm")


def _explains(cause: Finding, f: Finding) -> bool:
    """Whether ``f`` is what ``cause`` does; a warning explains no harm."""
    if f.kind in UNEXPLAINED:
        return cause.kind not in UNEXPLAINED
    if cause.severity == "warning" and f.severity == "harm":
        return False
    if f.kind in WRECKED and f.onset_step > 0 and (cause.key == DIVERGED or cause.kind == "stale_gradient"):
        return True
    if cause.kind in WRECKED and cause.onset_step > 0 and f.key == DIVERGED:
        return False
    if cause.kind in ("dead_units", "saturated") and f.kind == "vanishing":
        return f.cause in ("slopes", "alignment")
    if cause.kind == "vanishing" and f.kind == "dead_units":  # where no signal passes only biases move, and kill
        return cause.cause in ("weights", "depth") and cause.onset_step < f.onset_step
    if f.kind == "non_finite" and cause.kind in ("input_scale", "targets", "stale_gradient"):
        return f.key == DIVERGED or (f.key == "exploding" and cause.kind != "stale_gradient")
    return f.kind in CAUSES.get(cause.kind, ())


def notes(trace: Trace) -> list[str]:
    """What a reader of the findings must know and is no fault."""
    told = []
    if not len(trace.sampled_steps):
        told.append("nothing was measured")
    if not trace.meta.get("planned_steps"):
        told.append(f"planned_steps was not given: harm is judged over {ASSUMED_STEPS} steps")
    if not trace.meta.get("optimizer"):
        told.append("no optimizer was given: no update was measured, and plain gradient descent is assumed")
    if trace.meta.get("optimizer") and trace.meta.get("steps") == 0 and len(trace.sampled_steps):
        told.append("the optimizer given to watch never stepped: give it the one that does; all is told as step 0")
    if not len(trace.losses[0]):
        told.append("no loss was told (watch.loss): whether the run has converged, and its scale, are unknown")
    frozen = sorted({m.layer for m in trace.missing if m.reason == "frozen"})
    if frozen:
        told.append(f"frozen, by request: {', '.join(frozen[:8])}" + (" and more" if len(frozen) > 8 else ""))
    told += _unseen(trace)
    if changed := _changed_gradients(trace):
        told.append(changed)
    if beyond := surprise(trace):
        told.append(beyond)
    finite = np.flatnonzero(profile(trace).finite)
    skipped = trace.steps_table["skipped"].to_pylist()
    if count := sum(map(bool, skipped)):
        told.append(f"the gradient scaler skipped {count} of {trace.steps_table.num_rows} steps")
    for at in dict.fromkeys([*finite[:1], *finite[-1:]]):  # the theory is of the first
        for in_words in (blocks.in_words, between.in_words, unrolled.in_words):
            if sentence := in_words(trace, int(at)):
                told.append(f"at step {trace.sampled_steps[at]} {sentence}")
    if apart := {m.layer for m in trace.missing if m.column == "edge_gain"}:
        told.append(f"{len(apart)} layers read where others read too, each over a way that could not be told apart")
    return told


def _unseen(trace: Trace) -> list[str]:
    """What the watcher did not see, one line a reason."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for line in trace.meta.get("unseen", []):
        by_reason.setdefault((line["what"], line["reason"]), []).append(line["name"] or "the model")
    return [
        f"{what}{'s' if len(names) > 1 else ''} {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}: {reason}"
        for (what, reason), names in by_reason.items()
    ]


def _changed_gradients(trace: Trace) -> str:
    """What was done to gradients between backward and step, at the last sample that tells both; empty for nothing."""
    after, before = trace.column("g_W_norm")[0], trace.column("g_W_raw_norm")[0]
    for at in reversed(range(len(trace.sampled_steps))):
        both = np.isfinite(after[at]) & np.isfinite(before[at]) & (before[at] > 0)
        if both.any():
            share = float(np.linalg.norm(after[at][both]) / np.linalg.norm(before[at][both]))
            if math.isclose(share, 1, rel_tol=1e-6):
                return ""
            averaged = trace.meta.get("processes", 1) > 1
            scaled = bool(trace.meta.get("scaler"))
            why = "clipping" if scaled else "clipping, or a scaler that watch was not given"
            why = "averaging over processes" if averaged else why
            step = trace.sampled_steps[at]
            return f"between backward and step gradients changed, at step {step} to {share:.2g} of their norm ({why})"
    return ""


def verdict(findings: Sequence[Finding]) -> str:
    """One of: lives, weakened, dies, dies later, blows up, not finite."""
    harms = [finding for finding in findings if finding.severity == "harm"]
    if not harms:
        return "weakened" if findings else "lives"
    word = VERDICTS.get(harms[0].kind, "dies")
    return "dies later" if word == "dies" and harms[0].onset_step > 0 else word


def summarize(trace: Trace, findings: Sequence[Finding]) -> dict[str, Any]:
    """First and last finite profile and the verdict: enough to show a run among a thousand."""
    if not len(trace.sampled_steps):
        return {
            "schema": 1,
            "verdict": "not measured",
            "sentence": "Nothing was measured.",
            "layers": [],
            "decades_first_layer": math.nan,
            "findings": [],
            "first": (nothing := {"step": -1, "decades": [], "backward_gain": [], "gain_per_layer": math.nan}),
            "last": nothing,
        }
    p = profile(trace)
    shown = np.flatnonzero(p.finite) if p.finite.any() else np.arange(min(1, len(p.steps)))
    at = {"first": int(shown[0]), "last": int(shown[-1])}
    moments = {
        name: {
            "step": int(p.steps[i]),
            "decades": p.decades[i].tolist(),
            "backward_gain": p.gain[i].tolist(),
            "gain_per_layer": p.hidden_gain(i),
        }
        for name, i in at.items()
    }
    lowest = p.decades[at["last"], 0] if p.lines else math.nan
    return {
        "schema": 1,
        "verdict": verdict(findings),
        "sentence": findings[0].sentence if findings else healthy_sentence(p, at["last"]),
        "layers": list(p.names(range(len(p.lines)))),
        "decades_first_layer": float(lowest),
        "planned_steps": p.planned,
        "findings": [{"kind": f.kind, "severity": f.severity, "cause": f.cause} for f in findings],
        "predicted": trace.meta.get("predicted"),
        **moments,
    }


def healthy_sentence(p: Profile, at: int) -> str:
    """What a healthy net is told: how much of the output's gradient reaches its first layer."""
    if not p.lines:
        return "No weight layer received a gradient: there is nothing to judge."
    name, decades = p.title(0), p.decades[at, 0]
    if math.isnan(decades):
        return f"Nothing to judge: at step {p.steps[at]} no gradient was measured in {name}, or none left the output."
    told = f"{name} receives {power(decades)} of what the output sends"
    if decades < -LUCK:
        return f"No fault found: {told}, and learns all the same or has no need to."
    return f"The gradient lives: {told}."


def write(trace: Trace, findings: Sequence[Finding], folder: str | os.PathLike[str]) -> None:
    """findings.json and summary.json of a run folder."""
    told = {"schema": 1, "findings": list(findings), "notes": notes(trace)}
    write_json(Path(folder) / "findings.json", told)
    write_json(Path(folder) / "summary.json", summarize(trace, findings))


def as_markdown(findings: Sequence[Finding]) -> str:
    """The findings for TensorBoard's text tab."""
    if not findings:
        return "**No fault found.**"
    lines = []
    for f in findings:
        lines.append(f"**{f.sentence}** {f.why}\n\n- {f.kind} by {f.cause}, {f.severity}, from step {f.onset_step}")
        lines.append(f"- remedy: {f.remedy}\n- expected: {f.expected}")
        lines.append("\n| measured | value |\n|---|---|")
        lines += [f"| {name} | {value:.4g} |" for name, value in f.evidence.items()]
        lines.append("")
    return "\n".join(lines)
