"""A gradient profile as a small SVG for a notebook's cell: output on top, one bar a layer, in decades."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

DIES, BLOWS, PLAIN, FAINT = "#1a5f9e", "#a84a08", "#8c9197", "#656b73"
ROW, NAME, BAR, NUMBER = 15, 130, 320, 60  # px: height of a row; widths of its three parts
MOST = 60  # rows; of more layers every k-th is drawn


def profile(names: Sequence[str], decades: Sequence[float], planned: int, step: int) -> str:
    """The share of the output's gradient that reaches each layer.

    Args:
        names: of the layers, input side first.
        decades: log10 of the share; -inf is exactly 0, nan was not measured.
        planned: T, the steps planned: bars below 1/T are blue, beyond T orange; 1/T is a dashed line.
        step: of which they are; told above.

    Example:
        >>> drawn = profile(["linear1", "linear2"], [-4.5, 0.0], 1000, 0)
        >>> drawn.count("<rect"), "linear1: 10^−4.5" in drawn
        (2, True)
    """
    limit = -math.log10(max(planned, 2))
    every = math.ceil(len(names) / MOST) or 1
    rows = list(zip(names, decades, strict=True))[::-1][::every]
    finite = [d for _, d in rows if math.isfinite(d)]
    low, high = min([limit * 1.2, *finite]), max([0.5, *finite])
    height, left = ROW * (len(rows) + 2), NAME + 8

    def x(d: float) -> float:
        return round(left + BAR * (d - low) / (high - low), 1)

    title = f"step {step}: share of the output's gradient that reaches each layer"
    parts = [f'<text x="{left}" y="11" fill="{FAINT}">{title}</text>']
    for row, (name, d) in enumerate(rows, start=1):
        y, told = ROW * row, _told(d)
        color = DIES if d < limit else BLOWS if d > -limit else PLAIN
        short = html.escape(name if len(name) <= 20 else f"…{name[-19:]}")
        parts.append(f'<text x="{NAME}" y="{y + 12}" text-anchor="end" fill="{FAINT}">{short}</text>')
        if math.isfinite(d):
            start, end = sorted((x(d), x(0)))
            bar = f'x="{start}" y="{y + 2}" width="{max(1.0, end - start):.1f}" height="{ROW - 4}" fill="{color}"'
            parts.append(f"<rect {bar}><title>{html.escape(name)}: {told}</title></rect>")
        parts.append(f'<text x="{left + BAR + 8}" y="{y + 12}" fill="{FAINT}">{told}</text>')
    line = f'x1="{x(limit)}" x2="{x(limit)}" y1="{ROW}" y2="{height - ROW}"'
    parts.append(f'<line {line} stroke="{FAINT}" stroke-dasharray="3 2"/>')
    parts.append(f'<text x="{x(limit)}" y="{height - 3}" text-anchor="middle" fill="{FAINT}">1/T</text>')
    size = f'width="{left + BAR + 8 + NUMBER}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
    )


def _told(d: float) -> str:
    if math.isfinite(d):
        return f"10^{d:z.1f}".replace("-", "−")
    return "not measured" if math.isnan(d) else "exactly 0" if d < 0 else "infinite"


def trace(measured: Any) -> str:
    """The profile of a ``Trace`` at its last step without a nan; empty where there is none."""
    at, rows = _shown(measured)
    if at is None:
        return ""
    names, decades = [measured.layers[i].short for i in rows], measured.column("decades")[0][at, rows]
    planned = measured.meta.get("planned_steps") or 1_000
    return profile(names, decades.tolist(), planned, int(measured.sampled_steps[at]))


def words(measured: Any) -> str:
    """How much a ``Trace`` holds, and what share of the output's gradient reaches the lowest layer that has one."""
    (at, rows), steps = _shown(measured), measured.sampled_steps
    span = f"steps {steps[0]} to {steps[-1]}" if len(steps) else "no step"
    held = f"{len(measured.layers)} layers, {len(steps)} sampled, {span}"
    if at is None:
        return held
    decades, there = (x[at, rows] for x in measured.column("decades"))
    lowest = int(np.flatnonzero(there)[0])
    name = measured.layers[rows[lowest]].title
    return f"{held}; at step {steps[at]} {name} receives {_told(decades[lowest])} of what the output sends"


def _shown(measured: Any) -> tuple[int | None, list[int]]:
    """The number of the last sampled step without a nan, None for none; and the weight layers."""
    rows, (decades, there) = measured.weight_layers(), measured.column("decades")
    shown = np.flatnonzero(there[:, rows].any(1) & ~(there & np.isnan(decades))[:, rows].any(1))
    return (int(shown[-1]) if len(shown) else None), rows
