"""Pooling: one number for each window of places, the largest or the mean.

Letters: i places of the input, j windows, which are the places of the output.  A window is a box, so that a mean over
it is a mean along each dimension in turn, and so is what it sends back; sums are made in float32 at least.  Dimensions
before the pooled ones are batch and channels; one sample (C, ...) may come without the first, where the number of
pooled dimensions is told by a tuple.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bpdiag.rules.arguments import each, flag, floats, whole, wrong
from bpdiag.rules.function import Rule, wide

MAX = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
AVG = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
ADAPTIVE_MAX = {
    1: functional.adaptive_max_pool1d,
    2: functional.adaptive_max_pool2d,
    3: functional.adaptive_max_pool3d,
}
ADAPTIVE_AVG = {
    1: functional.adaptive_avg_pool1d,
    2: functional.adaptive_avg_pool2d,
    3: functional.adaptive_avg_pool3d,
}


class MaxPool(Rule):
    """y_j = max of x_i over window j,  g_x_i = sum of g_y_j over the windows whose largest is i.

    Window j reaches from j s - p in steps of the dilation; the padding never is the largest.  ``stride`` is that of the
    kernel unless given; ``ceil_mode`` keeps a last window that the input does not fill.  Kink where the largest is
    there twice: the first in order takes all, as in torch; a nan is the largest.  Keeps x, which the layer below has
    in most cases kept as its output, and finds the largest again; torch keeps an index of 8 bytes besides.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0, 3.0, 2.0]]])
        >>> MaxPool.apply(x, 2)
        tensor([[[3., 3.]]])
        >>> MaxPool.vjp(torch.tensor([[[5.0]]]), x, (4,), (4,), (0,), (1,), False)[0]
        tensor([[[0., 5., 0., 0.]]])
    """

    name = "max_pool"

    def forward(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
        floats("max_pool", x=x)
        at = _windows("max_pool", x, kernel_size, stride, padding, dilation)
        _check("max_pool", x, *at, ceil_mode)
        return MAX[len(at[0])](x, *at, ceil_mode)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """x and the settings, one entry a dimension."""
        *window, ceil_mode = inputs
        return inputs[0], *_windows("max_pool", *window), ceil_mode

    def vjp(g_y, x, kernel_size, stride, padding, dilation, ceil_mode, needs=(True,)):
        if not needs[0]:
            return (None,)
        n = len(kernel_size)
        _, index = MAX[n](x, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
        return (_sent_back(g_y, x, index, n),)


class AdaptiveMaxPool(Rule):
    """y_j = max of x_i over window j,  g_x_i = sum of g_y_j over the windows whose largest is i.

    As many windows as ``output_size`` says (None: as many as there are places), window j of m from floor(j n / m) to
    ceil((j + 1) n / m).  Kinks, nan and what is kept as in ``MaxPool``.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Example:
        >>> AdaptiveMaxPool.apply(torch.tensor([[[1.0, 3.0, 2.0]]]), 2)
        tensor([[[3., 3.]]])
    """

    name = "adaptive_max_pool"

    def forward(x, output_size):
        floats("adaptive_max_pool", x=x)
        output_size = _sizes("adaptive_max_pool", x, output_size)
        _filled("adaptive_max_pool", x, len(output_size))
        return _owned(ADAPTIVE_MAX[len(output_size)](x, output_size), len(output_size))

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """x and the output's size."""
        return inputs[0], _sizes("adaptive_max_pool", *inputs)

    def vjp(g_y, x, output_size, needs=(True,)):
        if not needs[0]:
            return (None,)
        n = len(output_size)
        _, index = ADAPTIVE_MAX[n](x, output_size, return_indices=True)
        return (_sent_back(g_y, x, index, n),)


class GlobalMaxPool(Rule):
    """y = max of x_i over all places,  g_x_i = g_y where x_i is the largest, else 0.

    Shapes: x (B, C, ...), y (B, C).  ``AdaptiveMaxPool`` with one window; kinks, nan and what is kept as there.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Example:
        >>> GlobalMaxPool.vjp(torch.tensor([[5.0]]), torch.tensor([[[1.0, 3.0, 3.0]]]))[0]
        tensor([[[0., 5., 0.]]])
    """

    name = "global_max_pool"

    def forward(x):
        _check_places("global_max_pool", x)
        return x.amax(tuple(range(2, x.dim())))

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """x."""
        return inputs

    def vjp(g_y, x, needs=(True,)):
        (g_x,) = AdaptiveMaxPool.vjp(g_y.unsqueeze(-1), x.flatten(2), (1,), needs)
        return (None if g_x is None else g_x.reshape(x.shape),)


class AvgPool(Rule):
    """y_j = sum of x_i over window j / n_j,  g_x_i = sum of g_y_j / n_j over the windows j that hold i.

    n_j counts the places of the window, padding too unless ``count_include_pad`` is False (never what ``ceil_mode``
    adds beyond the padding), or is ``divisor_override``.  ``stride`` is that of the kernel unless given.  No kink:
    linear.  Keeps the size of x and no tensor, where torch keeps x.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Example:
        >>> AvgPool.apply(torch.tensor([[[1.0, 3.0, 5.0]]]), 2, stride=1)
        tensor([[[2., 4.]]])
        >>> AvgPool.vjp(torch.tensor([[[2.0, 4.0]]]), (3,), (2,), (1,), (0,), True)[0]
        tensor([[[1., 3., 2.]]])
    """

    name = "avg_pool"

    def forward(x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None):
        floats("avg_pool", x=x)
        kernel_size, stride, padding, dilation = _windows("avg_pool", x, kernel_size, stride, padding)
        _check("avg_pool", x, kernel_size, stride, padding, dilation, ceil_mode)
        flag("avg_pool", "count_include_pad", count_include_pad)
        n = len(kernel_size)
        if n == 3 and any(size < k for size, k in zip(x.shape[-3:], kernel_size, strict=True)):
            raise wrong(
                "avg_pool", "kernel_size", kernel_size, f"at most {tuple(x.shape[-3:])}: torch's limit in 3 dimensions"
            )
        count = (count_include_pad,)
        if divisor_override is not None:
            count += (whole("avg_pool", "divisor_override", divisor_override, None),)
            if divisor_override == 0:
                raise wrong("avg_pool", "divisor_override", 0, "a whole number other than 0")
        if n == 1 and divisor_override is not None:  # torch takes a divisor from two dimensions on
            flat = (1, *kernel_size), (1, *stride), (0, *padding)
            return _owned(AVG[2](wide(x).unsqueeze(-2), *flat, ceil_mode, *count).squeeze(-2), n).to(x.dtype)
        return _owned(AVG[n](wide(x), kernel_size, stride, padding, ceil_mode, *count), n).to(x.dtype)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The size of x and the settings, one entry a dimension."""
        x, *window, _, count_include_pad, divisor = inputs
        kernel_size, stride, padding, _ = _windows("avg_pool", x, *window)
        return x.shape[-len(kernel_size) :], kernel_size, stride, padding, count_include_pad, divisor

    def vjp(g_y, size, kernel_size, stride, padding, count_include_pad=True, divisor=None, needs=(True,)):
        if not needs[0]:
            return (None,)
        g = wide(g_y) if divisor is None else wide(g_y) / divisor
        for dim, (n, k, s, p) in enumerate(zip(size, kernel_size, stride, padding, strict=True), start=-len(size)):
            if divisor is None:
                start = torch.arange(g.shape[dim], device=g.device) * s - p
                end = (start + k).clamp(max=n + p)
                if not count_include_pad:
                    start, end = start.clamp(min=0), end.clamp(max=n)
                g = g / _along(end - start, dim)
            i = torch.arange(n, device=g.device) + p
            first = (i - k).div(s, rounding_mode="floor") + 1  # the windows that hold i: j s <= i + p < j s + k
            last = i.div(s, rounding_mode="floor")
            g = _gathered(g, dim, first, last, -(-k // s))
        return (g,)


class AdaptiveAvgPool(Rule):
    """y_j = mean of x_i over window j,  g_x_i = sum of g_y_j / n_j over the windows j that hold i.

    As many windows as ``output_size`` says (None: as many as there are places), window j of m from floor(j n / m) to
    ceil((j + 1) n / m), n_j long.  No kink: linear.  Keeps the size of x and no tensor, where torch keeps x.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Example:
        >>> AdaptiveAvgPool.apply(torch.tensor([[[1.0, 3.0, 5.0]]]), 2)
        tensor([[[2., 4.]]])
        >>> AdaptiveAvgPool.vjp(torch.tensor([[[2.0, 4.0]]]), (3,))[0]
        tensor([[[1., 3., 2.]]])
    """

    name = "adaptive_avg_pool"

    def forward(x, output_size):
        floats("adaptive_avg_pool", x=x)
        output_size = _sizes("adaptive_avg_pool", x, output_size)
        _filled("adaptive_avg_pool", x, len(output_size))
        return _owned(ADAPTIVE_AVG[len(output_size)](wide(x), output_size), len(output_size)).to(x.dtype)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The size of x."""
        x, output_size = inputs
        return (x.shape[-len(_sizes("adaptive_avg_pool", x, output_size)) :],)

    def vjp(g_y, size, needs=(True,)):
        if not needs[0]:
            return (None,)
        g = wide(g_y)
        for dim, n in enumerate(size, start=-len(size)):
            m = g.shape[dim]
            j, i = torch.arange(m, device=g.device), torch.arange(n, device=g.device)
            starts, ends = (j * n).div(m, rounding_mode="floor"), -(-(j + 1) * n).div(m, rounding_mode="floor")
            first = (i * m).div(n, rounding_mode="floor")  # the windows that hold i: j n / m < i + 1, (j + 1) n / m > i
            last = -(-(i + 1) * m).div(n, rounding_mode="floor") - 1
            most = m // n if m % n == 0 else 1 if n % m == 0 else -(-m // n) + 1
            g = _gathered(g / _along(ends - starts, dim), dim, first, last, most)
        return (g,)


class GlobalAvgPool(Rule):
    """y = mean of x_i over all n places,  g_x_i = g_y / n.

    Shapes: x (B, C, ...), y (B, C).  No kink: linear.  Keeps the size of x and no tensor.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Example:
        >>> GlobalAvgPool.vjp(torch.tensor([[6.0]]), (3,))[0]
        tensor([[[2., 2., 2.]]])
    """

    name = "global_avg_pool"

    def forward(x):
        _check_places("global_avg_pool", x)
        return x.mean(tuple(range(2, x.dim())))

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The size of x."""
        return (inputs[0].shape[2:],)

    def vjp(g_y, size, needs=(True,)):
        if not needs[0]:
            return (None,)
        g = g_y / math.prod(size)
        return (g.reshape(*g.shape, *[1] * len(size)).expand(*g.shape, *size),)


def _sent_back(g: Tensor, x: Tensor, index: Tensor, n: int) -> Tensor:
    """Each g where the index says, among the last n dimensions of x as one; what meets is summed."""
    batch = x.shape[:-n]
    rows = wide(g).reshape(*batch, math.prod(g.shape[-n:]))
    g_x = rows.new_zeros(*batch, math.prod(x.shape[-n:]))
    return g_x.scatter_add(-1, index.reshape(rows.shape), rows).reshape(x.shape)


def _gathered(g: Tensor, dim: int, first: Tensor, last: Tensor, most: int) -> Tensor:
    """The sum of g from first to last along a dimension, for each place; at most so many of them."""
    inside = g.shape[dim] - 1

    def term(step: int) -> Tensor:
        j = first + step
        held = (j >= 0) & (j <= inside) & (j <= last)
        return torch.where(_along(held, dim), g.index_select(dim, j.clamp(0, inside)), 0)

    return reduce(torch.add, map(term, range(most)))


def _along(t: Tensor, dim: int) -> Tensor:
    """A vector as the dimension ``dim`` (counted from the end) of something larger."""
    return t.reshape(-1, *[1] * (-dim - 1))


def _owned(y: Tensor, n: int) -> Tensor:
    """Torch pools one dimension as two and returns a view; made inside a rule it could not be changed in place."""
    return y.clone() if n == 1 else y


def _windows(
    rule: str, x: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any = 1
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Kernel, stride, padding and dilation, one entry a dimension, as they are asked for or refused."""
    n = _pooled(rule, "kernel_size", kernel_size, x)
    kernel_size = each(rule, "kernel_size", kernel_size, n)
    stride = kernel_size if stride is None else each(rule, "stride", stride, n)
    return kernel_size, stride, each(rule, "padding", padding, n, 0), each(rule, "dilation", dilation, n)


def _check(
    rule: str,
    x: Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: Any,
) -> None:
    """Refuse windows that do not fit x."""
    flag(rule, "ceil_mode", ceil_mode)
    _filled(rule, x, len(kernel_size))
    for size, k, s, p, d in zip(x.shape[-len(kernel_size) :], kernel_size, stride, padding, dilation, strict=True):
        if 2 * p > k:
            raise wrong(rule, "padding", p, f"at most half of the kernel's {k}")
        windows = (size + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)) // s + 1
        if windows < 1:
            raise wrong(rule, "kernel_size", k, f"one that reaches no further than {size} places and the padding {p}")
        # before the first place a window that steps over all of them holds none: torch would write beside its memory
        if any((j * s - p) % d >= size for j in range(min(windows, -(-p // s)))):
            raise wrong(rule, "dilation", d, f"one whose every window holds one of the {size} places")


def _sizes(rule: str, x: Tensor, output_size: Any) -> tuple[int, ...]:
    """The output's size, one number a dimension; None is the input's."""
    n = _pooled(rule, "output_size", output_size, x)
    given = output_size if _several(output_size) else (output_size,) * n
    return each(rule, "output_size", [m if g is None else g for g, m in zip(given, x.shape[-n:], strict=True)], n)


def _pooled(rule: str, argument: str, value: Any, x: Tensor) -> int:
    """How many dimensions are pooled: as many as a tuple names, else all after batch and channels."""
    if not _several(value):
        if x.dim() - 2 not in MAX:
            raise wrong(rule, "x", x, f"batch, channels and 1 to 3 dimensions to pool, as {argument} is no tuple")
        return x.dim() - 2
    n = len(value)
    if n not in MAX:
        raise wrong(rule, argument, tuple(value), "1 to 3 whole numbers, one a dimension to pool")
    if x.dim() not in (n + 1, n + 2):
        expected = f"{n + 2} dimensions (batch, channels and {n} to pool) or, for one sample, {n + 1}"
        raise wrong(rule, "x", x, f"{expected}, as {argument} is {tuple(value)}")
    return n


def _several(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _filled(rule: str, x: Tensor, n: int) -> None:
    """Refuse what has no channel or no place to pool."""
    if 0 in x.shape[-n - 1 :]:
        raise wrong(rule, "x", x, "no size 0 but the batch's")


def _check_places(rule: str, x: Any) -> None:
    floats(rule, x=x)
    if x.dim() < 3:
        raise wrong(rule, "x", x, "3 dimensions or more, (batch, channels, ...)")
    _filled(rule, x, x.dim() - 2)
