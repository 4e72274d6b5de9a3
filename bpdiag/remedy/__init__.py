"""Remedies, tried: before and after on copies, and none recommended that was not seen to work."""

from __future__ import annotations

from bpdiag.remedy.overrides import candidates, cure_run, exhaustive, keep
from bpdiag.remedy.search import Cure, Remedy

__all__ = ["Cure", "Remedy", "candidates", "cure_run", "exhaustive", "keep"]
