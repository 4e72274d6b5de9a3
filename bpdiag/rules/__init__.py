"""Backward rules by hand.  The face of the package is the table RULES: name -> rule."""

from __future__ import annotations

from bpdiag.rules.activation import ACTIVATIONS, Activation
from bpdiag.rules.function import Rule
from bpdiag.rules.linear import Linear
from bpdiag.rules.loss import CrossEntropy

RULES: dict[str, type[Rule]] = {**ACTIVATIONS, **{rule.name: rule for rule in (Linear, CrossEntropy)}}

__all__ = ["ACTIVATIONS", "RULES", "Activation", "Rule"]
