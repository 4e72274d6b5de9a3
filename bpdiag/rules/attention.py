"""Scaled dot-product attention.

Letters: ... batch and heads, l the L queries, s the S keys, e the E numbers of each, v the values' own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bpdiag.rules.arguments import flag, floats, number, tensor, wrong
from bpdiag.rules.function import Rule, owned, wide


class Attention(Rule):
    """y = P v,  P = softmax(c q k^T + m),  g_v = P^T g_y,  g_m = P (g_y v^T - g_y y),  g_q = c g_m k,  g_k = c g_m^T q.

    Softmax along the keys; g_y y is one number a query, the dot product of both, which the softmax's own slope takes
    off.  With dropout D / (1 - p) stands between: y = (P D / (1 - p)) v.

    Shapes: q (..., H, L, E), k (..., K, S, E), v (..., K, S, V), y (..., H, L, V), the dots alike; K is H, or with
    ``enable_gqa`` a divisor of it: each key and value serves H / K heads that follow each other (grouped queries).

    Masks: ``mask`` is bool (true: this key is seen) or of numbers that are added to the scores (-inf: not seen), of a
    shape that broadcasts to (..., H, L, S); ``is_causal``: query l sees the keys up to l.  A query that sees no key
    gets zeros, and zero is its cotangent and what it gives to keys and values (without a mask torch's softmax would
    make nan of it).  ``dropout`` (bool, (..., H, L, S)) is drawn by the caller, true with probability 1 - p: true
    stays.  ``scale``: c, 1 / sqrt E unless given.

    Keeps q, k, v and the masks; P, which grows with L S, is made again.  Computes in float32 at least.  No kink.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Source:
        Vaswani et al. 2017, eq. 1; grouped queries: Ainslie et al. 2023; g_y y: Dao et al. 2022, appendix B.

    Example:
        >>> q, k, v = torch.zeros(1, 2, 1), torch.ones(1, 2, 1), torch.tensor([[[2.0], [6.0]]])
        >>> Attention.apply(q, k, v).flatten(), Attention.apply(q, k, v, is_causal=True).flatten()
        (tensor([4., 4.]), tensor([2., 4.]))
        >>> Attention.apply(q, k, v, torch.tensor([[True, False], [False, False]])).flatten()
        tensor([2., 0.])
    """

    name = "attention"
    mixes = True

    def forward(q, k, v, mask=None, dropout=None, p=0.0, is_causal=False, scale=None, enable_gqa=False):
        scale = _check(q, k, v, mask, dropout, p, is_causal, scale, enable_gqa)
        if mask is None and dropout is None and q.numel() and k.numel():  # the same in one pass over the keys
            attention = nn.functional.scaled_dot_product_attention
            return owned(attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa))
        P = _weights(q, k, mask, is_causal, scale)
        y = torch.matmul(P if dropout is None else P * _kept(dropout, p, P), _for_each_head(wide(v), q))
        return y.to(q.dtype) if q.element_size() < 4 else y

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """q, k and the masks; v where more than its own cotangent is asked for; the settings."""
        q, k, v, mask, dropout, p, is_causal, scale, _ = inputs
        scores = needs[0] or needs[1] or needs[3]
        scale = 1 / math.sqrt(q.shape[-1] or 1) if scale is None else scale
        return q, k, v if scores else None, mask, dropout, p, is_causal, scale

    def vjp(g_y, q, k, v, mask=None, dropout=None, p=0.0, is_causal=False, scale=1.0, needs=(True, True, True, False)):
        g, one = wide(g_y), len(k.shape) > 2 and k.shape[-3]
        P = _weights(q, k, mask, is_causal, scale)
        kept = 1 if dropout is None else _kept(dropout, p, P)
        g_q = g_k = g_v = g_S = None
        if needs[2]:
            g_v = _over_heads(torch.matmul((P * kept).mT, g), one)
        if needs[0] or needs[1] or needs[3]:
            g_P = torch.matmul(g, _for_each_head(wide(v), q).mT) * kept
            Pg = P * g_P
            g_S = Pg - P * Pg.sum(-1, keepdim=True)
        if needs[0]:
            g_q = scale * torch.matmul(g_S, _for_each_head(wide(k), q))
        if needs[1]:
            g_k = _over_heads(scale * torch.matmul(g_S.mT, wide(q)), one)
        return g_q, g_k, g_v, g_S.sum_to_size(mask.shape) if needs[3] else None


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """P (..., H, L, S): 0 for a query that sees no key."""
    S = scale * torch.matmul(wide(q), _for_each_head(wide(k), q).mT)
    if is_causal:
        mask = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).tril()
    if mask is None:
        return torch.softmax(S, -1)
    S = S.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else S + mask.to(S.dtype)
    blind = torch.isneginf(S).all(-1, keepdim=True)
    P = torch.softmax(S.masked_fill(blind, 0), -1)  # filled: of a nan there would be nothing to differentiate
    return P.masked_fill(blind, 0)


def _for_each_head(t: Tensor, q: Tensor) -> Tensor:
    """Keys or values, one for each head of the queries."""
    groups = q.shape[-3] // (t.shape[-3] or 1) if q.dim() > 2 else 1
    return t if groups == 1 else t.repeat_interleave(groups, -3)


def _over_heads(g: Tensor, heads: int) -> Tensor:
    """The sum over the heads that one key or value served."""
    return g if not heads or g.shape[-3] == heads else g.unflatten(-3, (heads, -1)).sum(-3)


def _kept(dropout: Tensor, p: float, P: Tensor) -> Tensor:
    """What dropout multiplies each weight by: 0, or what keeps the mean."""
    return dropout.to(P.dtype) * (1 / (1 - p) if p < 1 else 0.0)


def _check(
    q: Any, k: Any, v: Any, mask: Any, dropout: Any, p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> float:
    """Refuse what does not fit; the scale."""
    floats("attention", q=q, k=k, v=v)
    flag("attention", "is_causal", is_causal)
    flag("attention", "enable_gqa", enable_gqa)
    number("attention", "p", p, "a number from 0 to 1", lambda p: 0 <= p <= 1)
    for argument, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() < 2 or t.dim() != q.dim():
            raise wrong("attention", argument, t, "shape (..., length, numbers), of as many dimensions as q")
    heads, served = q.shape[:-2], k.shape[:-2]
    grouped = enable_gqa and q.dim() > 2 and heads[:-1] == served[:-1] and served[-1] and not heads[-1] % served[-1]
    if heads != served and not grouped:
        expected = "a divisor of q's heads, the rest alike" if enable_gqa else "as in q"
        raise wrong("attention", "k", k, f"batch and heads {tuple(heads)}, {expected}")
    if k.shape[-1] != q.shape[-1]:
        raise wrong("attention", "k", k, f"{q.shape[-1]} numbers for each key, as for each query")
    if v.shape[:-1] != k.shape[:-1]:
        raise wrong("attention", "v", v, f"shape {(*k.shape[:-1], '...')}: a value for each key")
    scores = (*heads, q.shape[-2], k.shape[-2])
    for argument, t in (("mask", mask), ("dropout", dropout)):
        if t is None:
            continue
        tensor("attention", argument, t)
        if t.device != q.device:
            raise wrong("attention", argument, t, f"it on {q.device}, where q is")
        if t.dtype != torch.bool and (argument == "dropout" or not t.is_floating_point()):
            raise wrong(
                "attention", argument, t, f"torch.bool{', or numbers to add' * (argument == 'mask')}", TypeError
            )
        if t.dim() > len(scores) or any(n not in (1, m) for n, m in zip(t.shape[::-1], scores[::-1], strict=False)):
            raise wrong("attention", argument, t, f"a shape that broadcasts to {scores}")
    if is_causal and mask is not None:
        raise wrong("attention", "mask", mask, "None, as is_causal is a mask already")
    if scale is None:
        return 1 / math.sqrt(q.shape[-1] or 1)
    number("attention", "scale", scale, "a number or None")
    return float(scale)
