"""Normalization: what makes the mean 0 and the variance 1 over some of the numbers, and what that costs a gradient.

    y = gamma xn + beta,  xn = (x - m) r,  r = 1 / sqrt(v + eps),  m and v mean and variance over n numbers

    g_x = r (h - mean h - xn mean(h xn)),  h = gamma g_y,  g_gamma = sum of g_y xn,  g_beta = sum of g_y

m and v follow x, so that two parts of a cotangent come to nothing: its mean, and its part along xn.  The rules differ
in the numbers they average over.  Each keeps x and gamma, where torch keeps m and r besides: these are made again from
x, and so the vjp can be differentiated to any order.  Each computes in float32 at least and rounds once.  No kink: at
v = 0 the slope is r = 1 / sqrt(eps).  Of an empty batch the sums are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bpdiag.rules.arguments import each, floats, number, shaped, whole, wrong
from bpdiag.rules.function import Rule, wide

EPS = "a finite number, 0 or more", lambda eps: 0 <= eps < math.inf
EPS_IN_TRAINING = "a finite number over 0", lambda eps: 0 < eps < math.inf  # as torch has it for a batch


class BatchNorm(Rule):
    """xn = (x - m) r,  g_x = gamma r (g_y - mean g_y - xn mean(g_y xn)),  over the batch and all places of a channel.

    Shapes: x (B, C, ...); gamma, beta, mean, var (C,), or None.  Training: ``mean`` and ``var`` are None, m and v those
    of the batch.  Evaluation: the running statistics are given and constant, so that g_x = gamma r g_y.  A training
    step brings them up to date beside the rule: ``running_statistics``.  Keeps x and gamma; in evaluation x for g_gamma
    only, and the statistics.  For the whole formula and what else holds see the head of this file.

    Raises:
        ValueError: A channel has one number in training (less its mean it is 0 whatever it was), or a shape is wrong.
        TypeError: A dtype is wrong, or a gradient of mean or var is asked for.

    Source:
        Ioffe & Szegedy 2015.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> BatchNorm.apply(x, None, None, eps=1e-12).flatten()
        tensor([-1.,  1.])
        >>> BatchNorm.vjp(torch.tensor([[1.0], [3.0]]), x, None, None, None, 0.0)[0].flatten()  # mean and xn: no rest
        tensor([0., 0.])
    """

    name = "batch_norm"
    mixes = True

    def forward(x, gamma, beta, mean=None, var=None, eps=1e-5):
        floats("batch_norm", mixed=True, x=x, gamma=gamma, beta=beta, mean=mean, var=var)
        _check_channels("batch_norm", x, gamma=gamma, beta=beta, mean=mean, var=var)
        number("batch_norm", "eps", eps, *(EPS_IN_TRAINING if mean is None else EPS))
        if (mean is None) != (var is None):
            given, missing = ("mean", "var") if var is None else ("var", "mean")
            raise wrong("batch_norm", missing, None, f"a tensor as {given}, or both None (training)", TypeError)
        if mean is None and x.numel() == x.shape[1]:
            raise wrong("batch_norm", "x", x, "in training more than one number for each channel")
        return functional.batch_norm(x, mean, var, gamma, beta, training=mean is None, eps=eps)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """x and gamma; in evaluation mean for g_gamma and var, and x for g_gamma only."""
        x, gamma, _, mean, var, eps = inputs
        for argument, needed in zip(("mean", "var"), needs[3:], strict=False):
            if needed:
                raise wrong("batch_norm", argument, "asked for a gradient", "a constant: detach it", TypeError)
        needs_x = needs[1] or (needs[0] and var is None)
        used = needs[0] or needs[1]
        return (
            x if needs_x else None,
            gamma if needs[0] else None,
            mean if needs[1] else None,
            var if used else None,
            eps,
        )

    def vjp(g_y, x, gamma, mean, var, eps, needs=(True, True, True)):
        g, over, channel = wide(g_y), [0, *range(2, g_y.dim())], (1, -1, *[1] * (g_y.dim() - 2))
        gamma = 1 if gamma is None else wide(gamma).reshape(channel)
        g_gamma = g_x = None
        g_beta = g.sum(over, keepdim=True) if needs[2] or (needs[0] and var is None) else None
        if var is None and (needs[0] or needs[1]):
            centered, r = _centered(x, over, eps)
            r = r if g.numel() else torch.zeros_like(r)  # of no numbers the mean is nan
            g_gamma = r * (g * centered).sum(over, keepdim=True)
            if needs[0]:
                per = gamma / (math.prod([g.shape[d] for d in over]) or 1)
                g_x = _pulled(g, centered, r, gamma * r, per * g_beta, per * g_gamma)
        elif needs[0] or needs[1]:
            r = torch.rsqrt(wide(var) + eps).reshape(channel)
            g_x = gamma * r * g if needs[0] else None
            g_gamma = r * (g * (wide(x) - mean.reshape(channel))).sum(over, keepdim=True) if needs[1] else None
        return g_x, g_gamma.reshape(-1) if needs[1] else None, g_beta.reshape(-1) if needs[2] else None


def running_statistics(
    x: Tensor, mean: Tensor, var: Tensor, momentum: float | None = 0.1, batches: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, followed over batches:  m' = (1 - k) m + k mean x,  v' likewise.

    The variance of the batch is the unbiased one, n / (n - 1) times what ``BatchNorm`` divides by.

    Args:
        x: What ``BatchNorm`` takes in training (B, C, ...).
        mean: So far (C,); stays as it is, as do var and x.
        var: So far (C,).
        momentum: k, the weight of the new batch; None: 1 / batches, which makes the average of all batches so far.
        batches: How many were seen, this one included; for momentum None.

    Returns:
        The new mean and variance, in the dtype of the old.  An empty batch moves nothing.  Not differentiable.

    Example:
        >>> m, v = running_statistics(torch.tensor([[1.0], [3.0]]), torch.zeros(1), torch.ones(1), momentum=0.5)
        >>> m, v
        (tensor([1.]), tensor([1.5000]))
    """
    floats("running_statistics", mixed=True, x=x, mean=mean, var=var)
    _check_channels("running_statistics", x, mean=mean, var=var)
    if momentum is None:
        if batches is None:
            raise wrong("running_statistics", "batches", None, "their number, as momentum is None", TypeError)
        momentum = 1 / whole("running_statistics", "batches", batches)
    number("running_statistics", "momentum", momentum, "a finite number", math.isfinite)
    over, n = [0, *range(2, x.dim())], x.numel() // max(x.shape[1], 1)
    if n == 1:
        raise wrong("running_statistics", "x", x, "more than one number for each channel")
    if n == 0:
        return mean, var
    x = wide(x.detach())
    m = x.mean(over, keepdim=True)
    v = (x - m).square().sum(over) / (n - 1)
    new_mean, new_var = (1 - momentum) * mean + momentum * m.flatten(), (1 - momentum) * var + momentum * v
    return new_mean.to(mean.dtype), new_var.to(var.dtype)


class GroupNorm(Rule):
    """xn = (x - m) r,  g_x = r (h - mean h - xn mean(h xn)),  h = gamma g_y,  over a group of channels of one sample.

    Shapes: x (B, C, ...), gamma, beta (C,) or None; the channels fall into ``num_groups`` runs of one length.  Keeps x
    and gamma.  For the whole formula and what else holds see the head of this file.

    Raises:
        ValueError: A group has one number and there is one sample, as in torch; or a shape is wrong.
        TypeError: A dtype is wrong.

    Source:
        Wu & He 2018.

    Example:
        >>> GroupNorm.apply(torch.tensor([[1.0, 3.0, 0.0, 8.0]]), None, None, num_groups=2, eps=0.0)
        tensor([[-1.,  1., -1.,  1.]])
    """

    name = "group_norm"
    mixes = True

    def forward(x, gamma, beta, num_groups, eps=1e-5):
        floats("group_norm", mixed=True, x=x, gamma=gamma, beta=beta)
        _check_channels("group_norm", x, gamma=gamma, beta=beta)
        number("group_norm", "eps", eps, *EPS)
        if 0 in x.shape[1:]:
            raise wrong("group_norm", "x", x, "no size 0 but the batch's")
        num_groups = whole("group_norm", "num_groups", num_groups)
        if x.shape[1] % num_groups:
            raise wrong("group_norm", "num_groups", num_groups, f"a divisor of the {x.shape[1]} channels of x")
        if x.numel() == num_groups:
            raise wrong("group_norm", "x", x, "more than one number in a group")
        return functional.group_norm(x, num_groups, gamma, beta, eps)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """x and gamma, where a cotangent is a function of them."""
        x, gamma, _, num_groups, eps = inputs
        return x if needs[0] or needs[1] else None, gamma if needs[0] else None, int(num_groups), eps

    def vjp(g_y, x, gamma, num_groups, eps, needs=(True, True, True)):
        B, C, *places = g_y.shape
        split = (B, num_groups, C // num_groups, math.prod(places))
        g = wide(g_y).reshape(split)
        g_sum, gxn_sum, g_x = g.sum(3, keepdim=True) if needs[0] or needs[2] else None, None, None
        if needs[0] or needs[1]:
            centered, r = _centered(x.reshape(split), (2, 3), eps)
            gxn_sum = r * (g * centered).sum(3, keepdim=True)
        if needs[0]:
            gamma = 1 if gamma is None else wide(gamma).reshape(num_groups, -1, 1)
            h, hxn = [(gamma * t).sum(2, keepdim=True) / (split[2] * split[3]) for t in (g_sum, gxn_sum)]
            g_x = _pulled(g, centered, r, gamma * r, h, hxn).reshape(g_y.shape)
        return g_x, gxn_sum.sum(0).reshape(-1) if needs[1] else None, g_sum.sum(0).reshape(-1) if needs[2] else None


class InstanceNorm(Rule):
    """xn = (x - m) r,  g_x = gamma r (g_y - mean g_y - xn mean(g_y xn)),  over the places of one channel of one sample.

    ``GroupNorm`` with as many groups as channels, and its vjp.  Shapes: x (B, C, ...), gamma, beta (C,) or None.  Keeps
    x and gamma.  (With running statistics it is ``BatchNorm`` in evaluation.)

    Raises:
        ValueError: A channel has one place (less its mean it is 0 whatever it was), or a shape is wrong.
        TypeError: A dtype is wrong.

    Source:
        Ulyanov, Vedaldi & Lempitsky 2016.

    Example:
        >>> InstanceNorm.apply(torch.tensor([[[1.0, 3.0], [0.0, 8.0]]]), None, None, eps=0.0)
        tensor([[[-1.,  1.],
                 [-1.,  1.]]])
    """

    name = "instance_norm"
    mixes = True

    def forward(x, gamma, beta, eps=1e-5):
        floats("instance_norm", mixed=True, x=x, gamma=gamma, beta=beta)
        _check_channels("instance_norm", x, gamma=gamma, beta=beta)
        number("instance_norm", "eps", eps, *EPS)
        if not x.shape[1]:
            raise wrong("instance_norm", "x", x, "a channel or more")
        if math.prod(x.shape[2:]) < 2:
            raise wrong("instance_norm", "x", x, "more than one place for each channel")
        return functional.group_norm(x, x.shape[1], gamma, beta, eps)  # torch's instance_norm returns a view

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """x and gamma, where a cotangent is a function of them."""
        x, gamma, _, eps = inputs
        return x if needs[0] or needs[1] else None, gamma if needs[0] else None, eps

    def vjp(g_y, x, gamma, eps, needs=(True, True, True)):
        return GroupNorm.vjp(g_y, x, gamma, g_y.shape[1], eps, needs)


class LayerNorm(Rule):
    """xn = (x - m) r,  g_x = r (h - mean h - xn mean(h xn)),  h = gamma g_y,  over the last dimensions.

    Shapes: x (..., normalized_shape), gamma, beta normalized_shape or None.  ``normalized_shape``: that of gamma unless
    given.  Keeps x and gamma.  For the whole formula and what else holds see the head of this file.

    Raises:
        ValueError: A shape is wrong.
        TypeError: A dtype is wrong.

    Source:
        Ba, Kiros & Hinton 2016.

    Example:
        >>> LayerNorm.apply(torch.tensor([[1.0, 3.0], [0.0, 8.0]]), None, None, normalized_shape=2, eps=0.0)
        tensor([[-1.,  1.],
                [-1.,  1.]])
    """

    name = "layer_norm"
    mixes = True

    def forward(x, gamma, beta, normalized_shape=None, eps=1e-5):
        floats("layer_norm", mixed=True, x=x, gamma=gamma, beta=beta)
        shape = _last("layer_norm", x, gamma, normalized_shape)
        number("layer_norm", "eps", eps, *EPS)
        shaped("layer_norm", "beta", beta, shape, "a number for each that is normalized")
        return functional.layer_norm(x, shape, gamma, beta, eps)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """x and gamma, where a cotangent is a function of them; how many dimensions are normalized."""
        x, gamma, _, normalized_shape, eps = inputs
        dims = len(_last("layer_norm", x, gamma, normalized_shape))
        return x if needs[0] or needs[1] else None, gamma if needs[0] else None, dims, eps

    def vjp(g_y, x, gamma, dims, eps, needs=(True, True, True)):
        g, over, batch = wide(g_y), tuple(range(-dims, 0)), list(range(g_y.dim() - dims))
        g_x = g_gamma = None
        if needs[0] or needs[1]:
            centered, r = _centered(x, over, eps)
            gxn = (g * centered).mul_(r)
            g_gamma = _summed(gxn, batch) if needs[1] else None
        if needs[0]:
            h, hxn = (g, gxn) if gamma is None else (wide(gamma) * g, wide(gamma) * gxn)
            g_x = _pulled(h, centered, r, r, h.mean(over, keepdim=True), hxn.mean(over, keepdim=True))
        return g_x, g_gamma, _summed(g, batch) if needs[2] else None


class RMSNorm(Rule):
    """xn = x r,  r = 1 / sqrt(mean x^2 + eps),  g_x = r (h - xn mean(h xn)),  h = gamma g_y,  over the last dimensions.

    ``LayerNorm`` without the mean: only the part of the cotangent along xn is lost.  Shapes: x (..., normalized_shape),
    gamma normalized_shape or None; ``normalized_shape`` is that of gamma unless given.  ``eps`` None is the spacing of
    numbers at 1 in float32, or in float64 for float64, as in torch.  Keeps x and gamma.

    Raises:
        ValueError: A shape is wrong.
        TypeError: A dtype is wrong.

    Source:
        Zhang & Sennrich 2019, eq. 4.

    Example:
        >>> RMSNorm.apply(torch.tensor([[1.0, 7.0]]), None, 2)
        tensor([[0.2000, 1.4000]])
    """

    name = "rms_norm"
    mixes = True

    def forward(x, gamma, normalized_shape=None, eps=None):
        floats("rms_norm", mixed=True, x=x, gamma=gamma)
        shape = _last("rms_norm", x, gamma, normalized_shape)
        if eps is not None:
            number("rms_norm", "eps", eps, *EPS)
        y = functional.rms_norm(wide(x), shape, None if gamma is None else wide(gamma), _spacing(x, eps))
        return y.to(x.dtype)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """x and gamma, where a cotangent is a function of them; how many dimensions are normalized."""
        x, gamma, normalized_shape, eps = inputs
        dims = len(_last("rms_norm", x, gamma, normalized_shape))
        return x if needs[0] or needs[1] else None, gamma if needs[0] else None, dims, _spacing(x, eps)

    def vjp(g_y, x, gamma, dims, eps, needs=(True, True)):
        if not (needs[0] or needs[1]):
            return None, None
        g, x, over = wide(g_y), wide(x), tuple(range(-dims, 0))
        r = torch.rsqrt((x * x).mean(over, keepdim=True) + eps)
        xn, g_x = x * r, None
        gxn = g * xn
        if needs[0]:
            h, hxn = (g, gxn) if gamma is None else (wide(gamma) * g, wide(gamma) * gxn)
            g_x = r * torch.addcmul(h, xn, -hxn.mean(over, keepdim=True))
        return g_x, _summed(gxn, list(range(g.dim() - dims))) if needs[1] else None


def _centered(x: Tensor, over: Any, eps: float) -> tuple[Tensor, Tensor]:
    """(x - m, r).  The mean goes first: a variance from sums of squares would cancel where the mean is large."""
    x = wide(x)
    centered = x - x.mean(over, keepdim=True)
    return centered, torch.rsqrt((centered * centered).mean(over, keepdim=True) + eps)


def _pulled(g: Tensor, centered: Tensor, r: Tensor, slope: Tensor, h: Tensor, hxn: Tensor) -> Tensor:
    """g_x = slope g - r (h + xn hxn), h and hxn the means, slope gamma r; new memory costs more than the sums."""
    return torch.addcmul((g * slope).sub_(r * h), centered, -r * r * hxn)


def _summed(t: Tensor, over: list[int]) -> Tensor:
    return t.sum(over) if over else t


def _check_channels(rule: str, x: Tensor, **tensors: Tensor | None) -> None:
    if x.dim() < 2:
        raise wrong(rule, "x", x, "2 dimensions or more, (batch, channels, ...)")
    for argument, t in tensors.items():
        shaped(rule, argument, t, x.shape[1:2], "a number for each channel of x")


def _last(rule: str, x: Tensor, gamma: Tensor | None, shape: Any) -> tuple[int, ...]:
    """The normalized shape: given, or that of gamma; the last sizes of x."""
    source = "normalized_shape"
    if shape is None:
        if gamma is None:
            raise wrong(rule, source, None, "the last sizes of x, or gamma, which has them", TypeError)
        source, shape = "gamma", tuple(gamma.shape)
    shape = each(rule, source, shape, len(shape) if isinstance(shape, Sequence) else 1, 0)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise wrong(rule, source, shape, f"the last sizes of x {tuple(x.shape)}")
    shaped(rule, "gamma", gamma, shape, "a number for each that is normalized")
    return shape


def _spacing(x: Tensor, eps: float | None) -> float:
    return torch.finfo(wide(x).dtype).eps if eps is None else eps
