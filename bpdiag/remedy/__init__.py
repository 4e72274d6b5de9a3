"""Remedies, tried: before and after on copies, and none recommended that was not seen to work.

For a training of anybody's: ``cure``; the changes of a model that it recommends: ``critical``, ``orthogonal``,
``rescale``, ``swap``, ``normalize``, ``residual``, ``register``, ``own``.  For runs of ours: ``cure_run``.
"""

from __future__ import annotations

from bpdiag.remedy.cure import cure
from bpdiag.remedy.overrides import candidates, cure_run, cure_stored, exhaustive, keep
from bpdiag.remedy.search import Cure, Remedy
from bpdiag.remedy.surgery import critical, normalize, orthogonal, own, register, rescale, residual, swap

__all__ = [
    "Cure",
    "Remedy",
    "candidates",
    "critical",
    "cure",
    "cure_run",
    "cure_stored",
    "exhaustive",
    "keep",
    "normalize",
    "orthogonal",
    "own",
    "register",
    "rescale",
    "residual",
    "swap",
]
