"""What theory expected of the first step, beside what was measured there."""

from __future__ import annotations

import math

import numpy as np

from bpdiag.diagnosis.finding import real
from bpdiag.diagnosis.ledger import profile
from bpdiag.trace import Trace


def expected_gain(trace: Trace) -> tuple[float, float] | None:
    """(gain per hidden layer, what a measured one may be off), as noted when the run began; None without."""
    told = trace.meta.get("predicted") or {}
    numbers = [told.get("gain_per_layer"), told.get("within")]
    known = [float(x) for x in numbers if isinstance(x, int | float) and math.isfinite(x)]
    return (known[0], known[1]) if len(known) == 2 else None


def surprise(trace: Trace) -> str:
    """A measured gain at step 0 beyond the band of the expected one, in words; empty for none.

    Where the theory itself said that it falls short, its caveat is told instead.
    """
    told = expected_gain(trace)
    p = profile(trace)
    if told is None or not len(p.steps) or p.steps[0] != 0 or not p.finite[0]:
        return ""
    measured = p.hidden_gain(0)
    if not math.isfinite(measured) or np.abs(measured - told[0]) <= told[1]:
        return ""
    why = trace.meta["predicted"].get("caveat") or "more than the draw of the weights explains"
    return f"at step 0 the gain per hidden layer is {real(measured, 3)}, theory expects {with_band(*told)}: {why}"


def with_band(gain: float, within: float) -> str:
    """A gain with its band, as many digits as the band has.

    Example:
        >>> with_band(0.1411, 0.0042), with_band(1.0, 0.0566)
        ('0.141 ± 0.004', '1.00 ± 0.06')
    """
    digits = min(max(-math.floor(math.log10(within)), 1), 9) if within > 0 else 3
    return f"{real(gain, digits)} ± {within:.{digits}f}"
