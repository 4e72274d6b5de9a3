"""Backward rules by hand.  The face of the package is the table RULES: name -> rule."""

from __future__ import annotations

from bpdiag.rules.activation import ACTIVATIONS, Activation
from bpdiag.rules.attention import Attention
from bpdiag.rules.conv import Conv, ConvTranspose
from bpdiag.rules.function import Rule
from bpdiag.rules.linear import Linear
from bpdiag.rules.loss import L1, BceWithLogits, CrossEntropy, Huber, KlDiv, Mse, Nll, SmoothL1
from bpdiag.rules.mixing import Glu, LogSoftmax, Softmax, Swiglu
from bpdiag.rules.norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from bpdiag.rules.pool import AdaptiveAvgPool, AdaptiveMaxPool, AvgPool, GlobalAvgPool, GlobalMaxPool, MaxPool
from bpdiag.rules.recurrent import Gru, Lstm, Rnn
from bpdiag.rules.shape import Add, Concat, Dropout, Embedding, Flatten, Pad

_TABLE = (
    Linear, CrossEntropy, Conv, ConvTranspose, BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm,
    MaxPool, AvgPool, AdaptiveMaxPool, AdaptiveAvgPool, GlobalMaxPool, GlobalAvgPool,
    Add, Concat, Flatten, Pad, Dropout, Embedding,
    Softmax, LogSoftmax, Glu, Swiglu, Nll, Mse, L1, Huber, SmoothL1, BceWithLogits, KlDiv, Attention, Rnn, Lstm, Gru,
)  # fmt: skip
RULES: dict[str, type[Rule]] = {**ACTIVATIONS, **{rule.name: rule for rule in _TABLE}}

__all__ = ["ACTIVATIONS", "RULES", "Activation", "Rule"]
