"""Convolution and its transpose, one rule each for one, two and three dimensions.

Letters: b the samples, c the input channels, o the output channels, i places of the input, j places of the output,
k places of the kernel; s stride, p padding, d dilation.  Both rules are bilinear in x and W, so that each cotangent is
again a convolution: of g_y with W, or of x with g_y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bpdiag.rules.arguments import each, floats, one_of, shaped, whole, wrong
from bpdiag.rules.function import Rule, wide
from bpdiag.rules.shape import Pad, check_pads

CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
CONV_TRANSPOSE = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}  # as Pad says


class Window(NamedTuple):
    """How a kernel walks over its input: all but the numbers, one entry a dimension."""

    size: tuple[int, ...]  # of the input as the convolution sees it, after Pad
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # zeros that the convolution itself adds on both sides
    dilation: tuple[int, ...]
    groups: int
    pad: tuple[int, ...]  # what Pad adds before, the last dimension first; () where padding does
    mode: str  # ... and how


class Conv(Rule):
    """y_boj = b_o + sum_ck W_ock x_bc(sj - p + dk),  g_x = g_y * W transposed,  g_W = x * g_y,  g_b = sum_bj g_y_boj.

    The first product is the transposed convolution of g_y with W; the second is a convolution of x with g_y as its
    kernel, in which samples and channels change places, and stride and dilation too.

    Shapes: x (B, C, ...) or one sample (C, ...), W (O, C / groups, ...), b (O,) or None, y (B, O, ...), with one to
    three dimensions for the dots.  ``padding``: whole numbers, "same" (y as large as x, at stride 1) or "valid" (none);
    ``padding_mode``: zeros, reflect, replicate, circular, which the rule ``Pad`` adds where zeros on both sides do not.

    Keeps x (for g_W) and W (for g_x): neither can be had from the other or from y; a padded x is made again.  No kink:
    linear in each input.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Example:
        >>> x, W = torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[[1.0, -1.0]]], requires_grad=True)
        >>> y = Conv.apply(x, W, None, padding=1)
        >>> y.tolist()
        [[[-1.0, -1.0, -2.0, 4.0]]]
        >>> torch.autograd.grad(y, W, torch.tensor([[[0.0, 1.0, 1.0, 0.0]]]))[0].tolist()
        [[[3.0, 6.0]]]
    """

    name = "conv"

    def forward(x, W, b, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros"):
        floats("conv", x=x, W=W, b=b)
        _check("conv", x, W, b, groups)
        at = _window("conv", x, W, stride, padding, dilation, groups, padding_mode)
        if at.pad:
            check_pads("conv", "padding", at.pad, x, at.mode)
            x = functional.pad(x, at.pad, at.mode)
        for n, k, p, d in zip(at.size, at.kernel, at.padding, at.dilation, strict=True):
            if n + 2 * p < d * (k - 1) + 1:
                raise wrong(
                    "conv", "x", x, f"{d * (k - 1) + 1} places or more, padding {p} on each side counted, for W"
                )
        return _owned(CONV[len(at.kernel)](x, W, b, at.stride, at.padding, at.dilation, at.groups), at)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """x for g_W, W for g_x, neither where its cotangent is not asked for; how the kernel walks."""
        x, W, _, *settings = inputs
        return x if needs[1] else None, W if needs[0] else None, _window("conv", x, W, *settings)

    def vjp(g_y, x, W, at, needs=(True, True, True)):
        g, g_x, g_W = _batched(g_y, at), None, None
        if needs[0]:
            left_over = [
                n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
                for n, m, s, p, d, k in zip(
                    at.size, g.shape[2:], at.stride, at.padding, at.dilation, at.kernel, strict=True
                )
            ]
            g_x = torch.convolution(g, W, None, at.stride, at.padding, at.dilation, True, left_over, at.groups)
            g_x = Pad.vjp(g_x, at.pad, at.mode)[0] if at.pad else g_x
            g_x = g_x.squeeze(0) if g is not g_y else g_x
        if needs[1]:
            x = _batched(x, at)
            g_W = _correlate(functional.pad(x, at.pad, at.mode) if at.pad else x, g, at)
        return g_x, g_W, _over_batch(g) if needs[2] else None


class ConvTranspose(Rule):
    """y_boi = b_o + sum of W_cok x_bcj over sj - p + dk = i,  g_x = g_y * W,  g_W = g_y * x,  g_b = sum_bi g_y_boi.

    What ``Conv`` does to its cotangent; so g_x is what Conv does to its input, and in g_W x and g_y change places.

    Shapes: x (B, C, ...) or one sample (C, ...), W (C, O / groups, ...), b (O,) or None, y (B, O, ...), with one to
    three dimensions for the dots; a size n becomes (n - 1) s - 2 p + d (k - 1) + 1 + ``output_padding``, the last less
    than s or than d.  Keeps x (for g_W) and W (for g_x).  No kink: linear in each input.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Example:
        >>> x, W = torch.tensor([[[1.0, 2.0]]], requires_grad=True), torch.tensor([[[1.0, -1.0]]])
        >>> y = ConvTranspose.apply(x, W, None, stride=2)
        >>> y.tolist()
        [[[1.0, -1.0, 2.0, -2.0]]]
        >>> torch.autograd.grad(y, x, torch.tensor([[[5.0, 1.0, 1.0, 1.0]]]))[0].tolist()
        [[[4.0, 0.0]]]
    """

    name = "conv_transpose"

    def forward(x, W, b, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        floats("conv_transpose", x=x, W=W, b=b)
        _check("conv_transpose", x, W, b, groups)
        padding = each("conv_transpose", "padding", padding, W.dim() - 2, 0)  # no name: "same" is of Conv alone
        at = _window("conv_transpose", x, W, stride, padding, dilation, groups)
        extra = each("conv_transpose", "output_padding", output_padding, len(at.kernel), 0)
        for n, k, s, p, d, e in zip(at.size, at.kernel, at.stride, at.padding, at.dilation, extra, strict=True):
            if e >= max(s, d):
                raise wrong("conv_transpose", "output_padding", e, f"less than stride {s} or than dilation {d}")
            size = (n - 1) * s - 2 * p + d * (k - 1) + 1 + e
            if size < 1:
                raise wrong("conv_transpose", "padding", p, f"one that leaves y a place; a size {n} becomes {size}")
        walk = at.stride, at.padding, extra, at.groups, at.dilation
        return _owned(CONV_TRANSPOSE[len(at.kernel)](x, W, b, *walk), at)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """x for g_W, W for g_x, where they are asked for; the size of x; how the kernel walks on y."""
        x, W, _, stride, padding, _, groups, dilation = inputs
        at = _window("conv_transpose", output, W, stride, padding, dilation, groups)
        return x if needs[1] else None, W if needs[0] else None, x.shape[2 - W.dim() :], at

    def vjp(g_y, x, W, size, at, needs=(True, True, True)):
        g, g_x, g_W = _batched(g_y, at), None, None
        if needs[0]:
            g_x = torch.convolution(g, W, None, at.stride, at.padding, at.dilation, False, [0] * len(size), at.groups)
            g_x = _cropped(g_x, size)  # output_padding of a stride or more makes room for another place
            g_x = g_x.squeeze(0) if g is not g_y else g_x
        if needs[1]:
            g_W = _correlate(g, _batched(x, at), at)
        return g_x, g_W, _over_batch(g) if needs[2] else None


def _correlate(x: Tensor, g: Tensor, at: Window) -> Tensor:
    """g_W_ock = sum_bj g_boj x_bc(sj - p + dk): in a convolution of x with g, stride and dilation change places.

    The sum over b: samples take the place of input channels.  Where a group has one input channel that would be slow
    (tens of times, on a CPU): there each sample is a group of its own, and what comes out is summed.
    """
    B, C, *size = x.shape
    _, N, *places = g.shape
    if not x.numel():
        return x.new_zeros(N, C // at.groups, *at.kernel) + x.sum() + g.sum()  # of both, for a second gradient
    if at.groups == C:
        x, g, groups = wide(x).reshape(1, B * C, *size), wide(g).reshape(B * N, 1, *places), B * C
    else:
        x = x.reshape(B, at.groups, C // at.groups, *size).transpose(0, 1)
        x, g, groups = x.reshape(-1, C // at.groups, *size).transpose(0, 1), g.transpose(0, 1), at.groups
    y = torch.convolution(x, g, None, at.dilation, at.padding, at.stride, False, [0] * len(size), groups)
    y = _cropped(y, at.kernel)  # the steps of x that the stride left over
    return y.reshape(B, N, 1, *at.kernel).sum(0) if at.groups == C else y.transpose(0, 1)


def _owned(y: Tensor, at: Window) -> Tensor:
    """Of one sample torch returns a view, and a view made inside a rule could not be changed in place."""
    return y.clone() if y.dim() == len(at.kernel) + 1 else y


def _batched(t: Tensor, at: Window) -> Tensor:
    return t.unsqueeze(0) if t.dim() == len(at.kernel) + 1 else t


def _over_batch(g: Tensor) -> Tensor:
    return g.sum((0, *range(2, g.dim())))


def _cropped(t: Tensor, size: Sequence[int]) -> Tensor:
    for dim, n in enumerate(size, start=2):
        t = t.narrow(dim, 0, n)
    return t


def _window(
    rule: str, x: Tensor, W: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, padding_mode: str = "zeros"
) -> Window:
    """The settings, one entry a dimension, as they are asked for or refused."""
    n = W.dim() - 2
    kernel, size = tuple(W.shape[2:]), tuple(x.shape[-n:])
    stride, dilation = each(rule, "stride", stride, n), each(rule, "dilation", dilation, n)
    groups = whole(rule, "groups", groups)
    one_of(rule, "padding_mode", padding_mode, tuple(MODES))
    if isinstance(padding, str):
        one_of(rule, "padding", padding, ("same", "valid"))
        if padding == "same" and any(s != 1 for s in stride):
            raise wrong(rule, "padding", "'same'", f"stride 1 with it, or whole numbers; stride is {stride}")
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in each(rule, "padding", padding, n, 0)]
    if padding_mode == "zeros" and all(left == right for left, right in sides):
        return Window(size, kernel, stride, tuple([p for p, _ in sides]), dilation, groups, (), "constant")
    pad = tuple([p for side in reversed(sides) for p in side])
    size = tuple([m + sum(side) for m, side in zip(size, sides, strict=True)])
    return Window(size, kernel, stride, (0,) * n, dilation, groups, pad, MODES[padding_mode])


def _check(rule: str, x: Tensor, W: Tensor, b: Tensor | None, groups: Any) -> None:
    """Refuse shapes that do not fit each other."""
    n = W.dim() - 2
    groups = whole(rule, "groups", groups)
    if n not in CONV or 0 in (W.shape[0], *W.shape[2:]):
        raise wrong(rule, "W", W, "3 to 5 dimensions, output and input channels and 1 to 3 sizes, none of them 0")
    if x.dim() not in (n + 1, n + 2) or 0 in x.shape[-n:]:
        raise wrong(rule, "x", x, f"{n + 2} dimensions (batch, channels and {n} sizes) or, for one sample, {n + 1}")
    if W.shape[0] % groups:
        raise wrong(rule, "groups", groups, f"a divisor of {W.shape[0]}, the first size of W {tuple(W.shape)}")
    inside, outside = W.shape[1] * groups, W.shape[0]
    channels, out = (inside, outside) if rule == "conv" else (outside, inside)
    if x.shape[-n - 1] != channels:
        raise wrong(rule, "x", x, f"{channels} channels, for W {tuple(W.shape)} in {groups} groups")
    shaped(rule, "b", b, (out,), "a number for each output channel")
