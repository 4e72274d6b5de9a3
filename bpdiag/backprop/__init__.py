"""The backward sweep by hand, for a stack of networks at once."""

from __future__ import annotations

from bpdiag.backprop.meter import Meter
from bpdiag.backprop.stack import Stack
from bpdiag.backprop.update import Optimizer

__all__ = ["Meter", "Optimizer", "Stack"]
