"""Losses, fused with the output nonlinearity where the product is simpler than its factors.

Letters: b the B samples, k the K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bpdiag.rules.arguments import floats, shaped, tensor, wrong
from bpdiag.rules.function import Rule


class CrossEntropy(Rule):
    """C = mean_b(log sum_k exp z_bk - z_b,y_b),  g_z = (softmax(z) - onehot(y)) / B.

    Shapes: logits z (B, K), classes y (B,) of integers 0..K-1, C ().  Softmax and logarithm are one rule: apart, the
    slope of the logarithm at a probability that underflowed is infinite; together it is p - 1.  Stable: the largest
    logit is subtracted before the exponential, and not added back.  Keeps z and y.  No kink; rows of g_z sum to 0.  A
    logit of +inf or nan gives nan, as in torch; a wrong class of logit -inf costs nothing; the right class at -inf
    costs inf.  An empty batch gives nan.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.
        IndexError: A class is outside 0..K-1 (on a CPU; elsewhere torch's own check comes first).

    Example:
        >>> z, y = torch.zeros(1, 4), torch.tensor([2])
        >>> round(CrossEntropy.apply(z, y).item(), 6)           # log 4
        1.386294
        >>> CrossEntropy.vjp(torch.tensor(1.0), z, y)[0]
        tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
    """

    name = "cross_entropy"

    def forward(z, y):
        floats("cross_entropy", z=z)
        tensor("cross_entropy", "y", y)
        if y.dtype != torch.int64:
            raise wrong("cross_entropy", "y", y, "a tensor of torch.int64: the class of each sample", TypeError)
        if y.device != z.device:
            raise wrong("cross_entropy", "y", y, f"it on {z.device}, where z is")
        if z.dim() != 2 or not z.shape[1]:
            raise wrong("cross_entropy", "z", z, "logits of shape (B, K), of a class or more")
        shaped("cross_entropy", "y", y, z.shape[:1], "the class of each sample of z")
        # a mean of many small numbers: under autocast in float32, as torch does
        narrow = z.element_size() < 4 and torch.is_autocast_enabled(z.device.type)
        log_p = torch.log_softmax(z, 1, dtype=torch.float32 if narrow else None)
        try:
            return -log_p.gather(1, y.unsqueeze(1)).mean()
        except RuntimeError as error:
            # torch has looked at every class; to look again before would cost a pass, and on an accelerator a wait
            if "out of bounds" not in str(error):
                raise
            expected = f"classes from 0 to {z.shape[1] - 1}"
            raise wrong("cross_entropy", "y", "out of range", expected, IndexError) from error

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        """z and y."""
        return inputs

    def vjp(g_C, z, y, needs=(True, False)):
        if not needs[0]:
            return None, None
        onehot = y.unsqueeze(-1) == torch.arange(z.shape[-1], device=z.device)
        return g_C * (torch.softmax(z, -1) - onehot.to(z.dtype)) / z.shape[0], None
