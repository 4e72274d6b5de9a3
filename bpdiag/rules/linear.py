"""The affine map between two layers.

Letters: ... any batch dimensions, i the N_in inputs, o the N_out outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bpdiag.rules.function import Rule


class Linear(Rule):
    """z = x W^T + b,  g_x = g_z W,  g_W = g_z^T x,  g_b = sum of g_z over the batch.

    Shapes: x (..., N_in), W (N_out, N_in), b (N_out,), z (..., N_out).  Keeps x and W: neither can be had from the
    other or from z; b leaves no trace in any slope.  No kink; the map is linear in each of its inputs.

    Example:
        >>> x, W, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.5]]), torch.tensor([1.0])
        >>> Linear.apply(x, W, b)
        tensor([[5.]])
        >>> Linear.vjp(torch.tensor([[2.0]]), x, W)
        (tensor([[6., 1.]]), tensor([[2., 4.]]), tensor([2.]))
    """

    name = "linear"

    def forward(x, W, b):
        return nn.functional.linear(x, W, b)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor) -> tuple[Tensor, Tensor]:
        """x and W."""
        x, W, _ = inputs
        return x, W

    def vjp(g_z, x, W, needs=(True, True, True)):
        rows = g_z.reshape(-1, g_z.shape[-1])  # every batch dimension counts as batch
        g_x = torch.matmul(g_z, W) if needs[0] else None  # dL/dx = dL/dz W
        g_W = torch.matmul(rows.t(), x.reshape(-1, x.shape[-1])) if needs[1] else None  # dL/dW_oi = sum_b g_bo x_bi
        g_b = rows.sum(0) if needs[2] else None
        return g_x, g_W, g_b
