"""The gradient profile, or the chain of one layer, as a picture for a paper or a README: SVG, PNG or PDF."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bpdiag import diagnosis
from bpdiag.bridge import weight_gradient
from bpdiag.chain import Chain
from bpdiag.config import UsageError
from bpdiag.diagnosis import Profile
from bpdiag.lesson import short
from bpdiag.tables import replace
from bpdiag.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".svg", ".png", ".pdf")
INK, FAINT, BAND = "#1d1f23", "#656b73", "#e9e6df"
OWNERS = {"weights": "#755800", "slopes": "#5b2f8c", "alignment": "#b3912f", "other": "#8c9197"}
LINES = ("#1a5f9e", "#a84a08", "#666c74", "#8a1458", "#755800", "#5b2f8c")  # and a dash each: color alone says nothing
FEW = 6  # runs whose names stand in the picture; of more beside it
DASHES = ("-", "--", ":", "-.")


def write(traces: Mapping[str, Trace], out: str | os.PathLike[str], step: int | None = None) -> Path:
    """Draw one run's profile with who takes what, or several runs' profiles over each other.

    Args:
        traces: by the names that the legend tells.
        out: a file; its ending says the kind.
        step: a sampled step; None: the last with finite numbers.

    Raises:
        UsageError: The ending is not known, nothing was measured, the step was not sampled, or nothing can be written.
    """
    return _saved(lambda: profiles(traces, step), out)


def write_chain(
    trace: Trace | None, out: str | os.PathLike[str], layer: str | None = None, step: int | None = None
) -> Path:
    """Draw the product that dC/dW of a layer is, factor by factor; without a trace the lesson's.

    Args:
        trace: a run's.
        out: a file; its ending says the kind.
        layer: of the trace; None: the lowest.
        step: a sampled step; None: the last with finite numbers.

    Raises:
        UsageError: The ending is not known, the layer's way up forks or is not known whole, or nothing can be written.
    """
    return _saved(lambda: waterfall(*(_of_lesson() if trace is None else _of_run(trace, layer, step))), out)


def _saved(draw: Callable[[], Figure], out: str | os.PathLike[str]) -> Path:
    path = Path(out)
    if path.suffix not in KINDS:
        raise UsageError(f"{out}: a picture ends in {', '.join(KINDS)}")
    drawn = draw()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind, told = path.suffix[1:], {"Date": None} if path.suffix == ".svg" else {}
        replace(path, lambda aside: drawn.savefig(aside, format=kind, dpi=200, metadata=told, bbox_inches="tight"))
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror or error}") from error
    return path


def png(traces: Mapping[str, Trace], step: int | None = None) -> bytes:
    """The same as a PNG in memory."""
    drawn = io.BytesIO()
    profiles(traces, step).savefig(drawn, format="png", dpi=100)
    return drawn.getvalue()


def profiles(traces: Mapping[str, Trace], step: int | None = None) -> Figure:
    """The figure: layers down, output on top, decades across; the limit 1/T upright."""
    from matplotlib.figure import Figure

    laid = {name: (p := diagnosis.profile(trace), _sample(name, p, step)) for name, trace in traces.items()}
    one = len(laid) == 1
    deepest = max(len(p.lines) for p, _ in laid.values())
    figure = Figure(figsize=(8.0 if one else 5.5, min(9.0, 1.4 + 0.22 * max(deepest, 8))), layout="constrained")
    axes = figure.subplots(1, 2 if one else 1, sharey=True, squeeze=False)[0]
    for row, (name, (p, at)) in enumerate(laid.items()):
        _profile(axes[0], p, at, name, row, one)
    axes[0].axvline(-math.log10(max(p.planned for p, _ in laid.values())), color=INK, linewidth=0.8)
    axes[0].set_xlabel("gradient that reaches the layer, decades\n(upright: 1/T)", color=FAINT, fontsize=9)
    axes[0].invert_yaxis()
    if one:
        ((p, at),) = laid.values()
        _owners(axes[1], p, at)
        rows = range(len(p.lines))
        skip = max(1, math.ceil(len(p.lines) / 30))
        axes[0].set_yticks(list(rows)[::skip], [p.title(len(p.lines) - 1 - i) for i in rows][::skip], fontsize=8)
        figure.suptitle(f"{next(iter(laid))}, step {p.steps[at]}", fontsize=10, color=INK)
    else:
        axes[0].set_ylabel("layers below the output", color=FAINT, fontsize=9)
        axes[0].yaxis.get_major_locator().set_params(integer=True)
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(laid) > FEW else {}
        axes[0].legend(fontsize=8, frameon=False, **beside)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(length=2, labelsize=8)
    return figure


def _sample(name: str, p: Profile, step: int | None) -> int:
    """The number of a sampled step."""
    steps = p.steps.tolist()
    if not steps or not p.lines:
        raise UsageError(f"{name}: nothing was measured")
    if step is None:
        return int(np.flatnonzero(p.finite)[-1]) if p.finite.any() else len(steps) - 1
    if step not in steps:
        raise UsageError(f"{name}: step {step} was not sampled; {len(steps)} were, {steps[0]} to {steps[-1]}")
    return steps.index(step)


def _profile(axis: Axes, p: Profile, at: int, name: str, row: int, theory: bool) -> None:
    below = np.arange(len(p.lines))
    told = p.trace.meta.get("predicted") or {}
    if theory and len(told.get("decades") or []) == len(p.lines):
        middle, band = np.array(told["decades"])[::-1], told["spreads"] * np.array(told["decades_band"])[::-1]
        axis.fill_betweenx(below, middle - band, middle + band, color=BAND)
        axis.plot(middle, below, color=FAINT, linestyle="--", linewidth=0.8, label="theory at step 0")
    decades = np.where(np.isfinite(p.decades[at]), p.decades[at], np.nan)[::-1]
    color = INK if theory else LINES[row % len(LINES)]
    dash = DASHES[row % len(DASHES)]
    axis.plot(decades, below, color=color, linestyle=dash, marker="o", markersize=3, linewidth=1.2, label=name)
    if theory and told:
        axis.legend(fontsize=8, frameon=False)


def _owners(axis: Axes, p: Profile, at: int) -> None:
    """Who takes what of each step: bars end to end, to the left what takes, to the right what gives."""
    below = np.arange(len(p.lines))
    left, right = np.zeros(len(p.lines)), np.zeros(len(p.lines))
    for owner, color in OWNERS.items():
        share = np.nan_to_num(p.ledger[owner][at][::-1], posinf=0, neginf=0)
        start = np.where(share < 0, left, right)
        axis.barh(below, share, left=start, color=color, height=0.8, label=owner)
        left, right = left + np.minimum(share, 0), right + np.maximum(share, 0)
    axis.axvline(0, color=FAINT, linewidth=0.8)
    axis.set_xlabel("who takes it on the way to the layer, decades", color=FAINT, fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(OWNERS))


# ---- the chain ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factor:
    """One column: a factor of the product, and where it was measured what weights and slopes do of it."""

    name: str
    value: float
    parts: tuple[tuple[str, float], ...] = ()  # owner, factor


def _of_lesson() -> tuple[list[Factor], str]:
    """dC/dw1 of the lesson's three layers."""
    chain = Chain()
    factors = chain.factors()
    told = [Factor(_fraction(name), factors[name]) for name in chain.path(1)]
    product = " · ".join(short(factor.value) for factor in told)
    return told, f"{_fraction('dC/dw1')} = {product} = {short(chain.backward()['dC/dw1'])}"


def _fraction(name: str) -> str:
    r"""A derivative as a formula.

    Example:
        >>> print(_fraction("da3/da2"))
        $\dfrac{\partial a_{3}}{\partial a_{2}}$
    """
    above, below = (re.sub(r"d([a-zC])(\d*)", r"\\partial \1_{\2}", part) for part in name.split("/"))
    return f"$\\dfrac{{{above}}}{{{below}}}$".replace("_{}", "")


def _of_run(trace: Trace, layer: str | None, step: int | None) -> tuple[list[Factor], str]:
    """‖dC/dW‖ of a layer of a run, as ``bridge`` tells it."""
    rows = trace.weight_layers()
    if not rows:
        raise UsageError("plot --chain: no weight layer was measured")
    product = weight_gradient(trace, layer or trace.layers[rows[0]].key, step)
    told = []
    for term in product.terms:
        parts = [("weights", term.weights), ("slopes", term.slopes)]
        known = tuple((owner, x) for owner, x in parts if x is not None)
        told.append(Factor(_plain(term.name), term.value, known if len(known) == 2 else ()))
    title = f"‖∂C/∂W‖ of {product.layer}, step {product.step}: {short(product.measured, 3)}"
    return told, _plain(title)


def _plain(text: str) -> str:
    """Text from outside, none of it a formula."""
    return text.replace("$", r"\$")


def waterfall(factors: Sequence[Factor], title: str) -> Figure:
    """The figure: one column a factor, from the cost at the left; the running product on a scale of decades.

    A factor that is 0 or not finite has no height; with it the product ends.
    """
    from matplotlib.figure import Figure

    formulas = all(factor.name.startswith("$") for factor in factors)
    figure = Figure(figsize=(max(4.5, 1.2 + 0.36 * len(factors)), 4.2), layout="constrained")
    axes, so_far, reached = figure.subplots(), 0.0, [0.0]
    for column, factor in enumerate(factors):
        parts = factor.parts or (("other", factor.value),)
        heights = [math.log10(abs(x)) if math.isfinite(x) and x else math.nan for _, x in parts]
        ends = [so_far + sum(heights[:part]) for part in range(len(parts) + 1)]
        for part, (owner, _) in enumerate(parts):
            left, width = column - 0.4 + 0.8 * part / len(parts), 0.8 / len(parts)
            axes.bar(left, heights[part], width, ends[part], align="edge", color=OWNERS[owner])
        so_far = ends[-1]
        axes.plot([column - 0.4, column + 0.6], [so_far, so_far], color=INK, linewidth=1.2)
        known = [end for end in ends if math.isfinite(end)] or [min(reached)]
        size = 10 if formulas else 6.5
        axes.annotate(
            short(factor.value, 3), (column, max(known)), (0, 4), textcoords="offset points", ha="center", fontsize=size
        )
        reached += known
    room = 0.12 * max(0.5, max(reached) - min(reached))
    axes.set_ylim(min(reached) - room, max(reached) + room)
    axes.axhline(0, color=FAINT, linewidth=0.8)
    if max(reached) - min(reached) < 3:
        ticks = [log for d in range(-4, 4) for log in (d, d + math.log10(2), d + math.log10(5))]
        shown = [log for log in ticks if min(reached) - room < log < max(reached) + room]
        axes.set_yticks(shown, [short(10**log, 2) for log in shown])
    else:
        axes.yaxis.set_major_formatter(lambda y, _: f"$10^{{{y:g}}}$")
    axes.set_xticks(range(len(factors)), [factor.name for factor in factors])
    axes.tick_params(axis="x", labelsize=13 if formulas else 7.5, rotation=0 if formulas else 90, length=2)
    axes.tick_params(axis="y", labelsize=8, length=2)
    axes.set_ylabel("product so far, from the cost down", color=FAINT, fontsize=9)
    axes.set_title(title, fontsize=11, color=INK)
    owners = {owner for factor in factors for owner, _ in factor.parts}
    for owner in (o for o in OWNERS if o in owners):
        axes.bar(0, 0, color=OWNERS[owner], label=owner)
    if owners:
        axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
