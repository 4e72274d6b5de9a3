"""The affine map between two layers.

Letters: ... any batch dimensions, i the N_in inputs, o the N_out outputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bpdiag.rules.arguments import floats, shaped, wrong
from bpdiag.rules.function import Rule, owned


class Linear(Rule):
    """z = x W^T + b,  g_x = g_z W,  g_W = g_z^T x,  g_b = sum of g_z over the batch.

    Shapes: x (..., N_in), W (N_out, N_in), b (N_out,) or None, z (..., N_out).  Keeps x (for g_W) and W (for g_x):
    neither can be had from the other or from z; b leaves no trace in any slope.  No kink: linear in each input.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Example:
        >>> x, W, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.5]]), torch.tensor([1.0])
        >>> Linear.apply(x, W, b)
        tensor([[5.]])
        >>> Linear.vjp(torch.tensor([[2.0]]), x, W)
        (tensor([[6., 1.]]), tensor([[2., 4.]]), tensor([2.]))
    """

    name = "linear"

    def forward(x, W, b):
        floats("linear", x=x, W=W, b=b)
        if W.dim() != 2:
            raise wrong("linear", "W", W, "shape (N_out, N_in)")
        if x.shape[-1:] != W.shape[1:]:
            raise wrong("linear", "x", x, f"shape (..., {W.shape[1]}), for W {tuple(W.shape)}")
        shaped("linear", "b", b, W.shape[:1], "a number for each output")
        return owned(nn.functional.linear(x, W, b))

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """x for dL/dW, W for dL/dx; neither where its slope is not asked for."""
        x, W, _ = inputs
        return x if needs[1] else None, W if needs[0] else None

    def vjp(g_z, x, W, needs=(True, True, True)):
        batch = math.prod(g_z.shape[:-1])  # every dimension but the last counts as batch
        rows, x_rows = g_z.reshape(batch, g_z.shape[-1]), x.reshape(batch, x.shape[-1]) if needs[1] else None
        g_x = torch.matmul(g_z, W) if needs[0] else None  # dL/dx = dL/dz W
        g_W = torch.matmul(rows.t(), x_rows) if needs[1] else None  # dL/dW_oi = sum_b g_bo x_bi
        g_b = rows.sum(0) if needs[2] else None
        return g_x, g_W, g_b
