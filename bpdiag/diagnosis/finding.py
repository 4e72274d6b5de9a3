"""A finding: one fault, with its place, its cause in numbers and its remedy; and how its numbers are worded."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One fault: where, since when, why in numbers, what to do and what that should do to the number."""

    kind: str
    severity: str  # harm, warning
    layers: tuple[str, ...]  # name#call, input side first
    onset_step: int
    cause: str
    evidence: dict[str, float]
    confidence: float  # share of the steps judged in which it holds
    remedy: str
    expected: str
    source: str
    sentence: str = ""  # what, where, how much
    why: str = ""

    @property
    def key(self) -> str:
        """The cause's first word: what a rule may ask for.

        Example:
            >>> Finding("non_finite", "harm", (), 3, "diverged: steps too large", {}, 1.0, "", "", "").key
            'diverged'
        """
        return self.cause.partition(" ")[0].rstrip(":")

    def __repr__(self) -> str:
        return f"Finding({self.kind} by {self.cause}, {self.severity}: {self.sentence})"

    def _repr_html_(self) -> str:
        """For a notebook's cell: the sentence, why, what to do."""
        told = (self.why, f"Remedy: {self.remedy}." if self.remedy else "", f"Expected: {self.expected}.")
        parts = "".join(f"<br>{html.escape(part)}" for part in told if part)
        head = f"{self.kind} by {self.cause} ({self.severity}), from step {self.onset_step}"
        return f"<p><b>{html.escape(self.sentence)}</b><br><i>{html.escape(head)}</i>{parts}</p>"

    def __str__(self) -> str:
        parts = (self.sentence, self.why, f"Remedy: {self.remedy}.", f"Expected: {self.expected}.")
        return " ".join(part for part in parts if part)


def real(x: float, digits: int = 1) -> str:
    """A number with a real minus sign, and none before a zero.

    Example:
        >>> real(-7.46), real(0.305, 2), real(-0.04)
        ('−7.5', '0.30', '0.0')
    """
    return f"{x:z.{digits}f}".replace("-", "−")


def percent(x: float) -> str:
    """A share in whole percent, never 0 for a small one.

    Example:
        >>> percent(0.718), percent(0.002), percent(0.0)
        ('72 %', '<1 %', '0 %')
    """
    if math.isnan(x):
        return "–"
    return "<1 %" if 0 < x < 0.005 else f"{100 * x:.0f} %"


def power(decades: float) -> str:
    """A factor given in decades: plain within a thousandth and a thousand, else a power of ten.

    Example:
        >>> power(-0.85), power(2.89), power(-7.46), power(-math.inf)
        ('0.14', '776', '10^−7.5', 'exactly 0')
    """
    if decades == -math.inf:
        return "exactly 0"
    if not abs(decades) < 3:
        return f"10^{real(decades)}"
    return f"{10**decades:.0f}" if decades >= 2 else f"{10**decades:.2g}"
