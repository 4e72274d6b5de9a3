"""Tensor -> number, left on the device as a () tensor in float64: the host reads all of a step's numbers at once.

Each function declares what it measures (``of``) and its degree of homogeneity: how the number scales when the tensor
is multiplied by t > 0 (t^degree).  The suite checks the declaration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Statistic:
    """A function of this module and what it declares."""

    function: Callable[..., Tensor]
    of: str
    degree: int


STATISTICS: dict[str, Statistic] = {}
_WIDEST = {"mps": torch.float32}
_AS_THEY_ARE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PART = 2**20  # elements that are copied into a wider format at once
LARGE = 2**16  # elements from which on squares in float64 cost more than in float32 and a look at what came out
RIGHT = 1e-15, 1e18  # rms that float32 squares rightly: what is under 1e-19 squares to 0, and adds nothing to it
ALIKE = 1e-5  # of a row's length: projections of two rows so near are one; rounding is 1e-7, a random row's neighbor
# among a thousand 1e-3 away
SATURATED = 0.05  # of the largest slope: an element below it passes almost nothing back


def statistic(of: str, degree: int) -> Callable[[F], F]:
    """Put a function into STATISTICS with its declaration."""

    def register(function: F) -> F:
        STATISTICS[function.__name__] = Statistic(function, of, degree)
        return function

    return register


def dense(x: Tensor) -> Tensor:
    """The numbers of any tensor: a sparse one's values, duplicates added; a complex one's moduli; floating point."""
    x = x.detach()
    if x.dtype in _AS_THEY_ARE and x.layout is torch.strided:
        return x
    if x.layout != torch.strided:
        x = x.coalesce().values() if x.layout == torch.sparse_coo else x.values()
    if x.is_complex():
        return x.abs()
    return x if x.is_floating_point() else x.to(torch.float64)


def wide(device: torch.device) -> torch.dtype:
    """The widest dtype a device can reduce in: float64 but where there is none (Apple's)."""
    return torch.float64 if device.type == "cpu" else _WIDEST.get(device.type, torch.float64)


def mean(x: Tensor) -> Tensor:
    """Mean of all elements, of bools the share that is true.

    Returns:
        () float64; nan for no elements.

    Example:
        >>> mean(torch.tensor([True, False, False, False])).item()
        0.25
    """
    return x.to(wide(x.device)).mean()


@statistic(of="any", degree=1)
def norm(x: Tensor) -> Tensor:
    """‖x‖ = sqrt(sum of x^2), over all elements, batch included.

    Args:
        x: any shape, any dtype, any layout.

    Returns:
        () float64.  0 for no elements or all zero; nan if any element is nan, else inf if any is infinite.  A float32
        or float16 of any size is squared in float64, so 1e-23 is not lost; a float64 is scaled by its largest first.

    Example:
        >>> norm(torch.tensor([[3.0, 4.0]])).item(), norm(torch.full((4,), 1e-30)).item() > 1.9e-30
        (5.0, True)
    """
    x = dense(x)
    if x.dtype == wide(x.device):
        return lengths(x.reshape(1, -1))[0]
    if x.numel() > PART and type(x) is Tensor and x.is_contiguous():
        return norm(lengths(x.view(1, -1)) if x.dim() < 2 else lengths(x.view(x.shape[0], -1)))
    return torch.linalg.vector_norm(x, dtype=wide(x.device))


def lengths(rows: Tensor) -> Tensor:
    """r_i = ‖row i‖ of a matrix, at any size of its elements; their own norm is the norm of the matrix.

    Args:
        rows: (B, N), real.

    Returns:
        (B,) float64; a row's value at zero, nan and infinity is that of ``norm``.  Of a large float32 matrix on a CPU
        right to 1e-6, else to 1e-15.

    Example:
        >>> lengths(torch.tensor([[3.0, 4.0], [1e-30, 0.0]])).tolist()[0]
        5.0
    """
    widest = wide(rows.device)
    if rows.dtype == torch.float32 and rows.device.type == "cpu" and rows.numel() >= LARGE and rows.is_contiguous():
        return _large_lengths(rows)
    return _wide_lengths(rows, widest)


def _large_lengths(rows: Tensor) -> Tensor:
    """In float32, a run of at most 4,096 elements at once, and again in float64 where the result is not a right one."""
    run = math.gcd(rows.shape[1], 2**12)
    short = rows.view(len(rows), -1, run) if run >= 2**8 else rows.unsqueeze(1)
    found = torch.linalg.vector_norm(torch.linalg.vector_norm(short, dim=2), dim=1, dtype=torch.float64)
    low, high = (limit * math.sqrt(rows.shape[1]) for limit in RIGHT)
    doubtful = (found <= low) | (found >= high)  # nan is none: nothing but nan makes it
    if doubtful.any():
        found[doubtful] = _wide_lengths(rows[doubtful], torch.float64)
    return found


def _wide_lengths(rows: Tensor, widest: torch.dtype) -> Tensor:
    if rows.dtype != widest:
        if rows.numel() <= PART:
            return torch.linalg.vector_norm(rows, dim=1, dtype=widest)
        found = [torch.linalg.vector_norm(part, dim=1, dtype=widest) for part in parts(rows)]
        return found[0] if len(found) == 1 else torch.cat(found)
    if not rows.numel():
        return rows.new_zeros(len(rows))
    limits = torch.finfo(rows.dtype)
    scale = rows.abs().amax(1, keepdim=True).clamp(limits.tiny, limits.max)  # squares must stay in the format
    return torch.linalg.vector_norm(rows / scale, dim=1) * scale.squeeze(1)


def parts(rows: Tensor) -> Sequence[Tensor]:
    """A matrix as it is, or on a CPU a large one in groups of rows: a copy of all of it in float64 would be memory.

    Such a copy is made whenever a narrower number is reduced in float64, and where it is large it costs eight times as
    much as the sum.

    Example:
        >>> [tuple(part.shape) for part in parts(torch.ones(5, 2**19))]
        [(2, 524288), (2, 524288), (1, 524288)]
    """
    if rows.numel() <= PART or rows.device.type != "cpu":
        return (rows,)
    return rows.split(max(PART // rows.shape[1], 1))


def by_sample(x: Tensor) -> Tensor:
    """(B, N) numbers of any tensor, one row for each sample: its first dimension.

    Example:
        >>> by_sample(torch.ones(5, 2, 3)).shape, by_sample(torch.ones(5)).shape, by_sample(torch.ones(())).shape
        (torch.Size([5, 6]), torch.Size([5, 1]), torch.Size([1, 1]))
    """
    x = dense(x)
    if x.dim() == 2:
        return x
    return x.reshape(x.shape[0] if x.dim() and x.numel() else 1, -1)


@statistic(of="any", degree=1)
def rms(x: Tensor) -> Tensor:
    """sqrt(mean of x^2): per element, so that width and batch drop out.

    Returns:
        () float64; nan for no elements, otherwise as ``norm``.

    Source:
        ours; the names of the house: magnitudes are rms forwards, norms backwards.

    Example:
        >>> rms(torch.tensor([1.0, 7.0, 5.0, 5.0])).item()
        5.0
    """
    return norm(x) / x.numel() ** 0.5


@statistic(of="slope", degree=0)
def saturated_fraction(slope: Tensor, largest_slope: float | None = None) -> Tensor:
    """mean(|slope| < 5 % of the largest): the share of elements that pass almost nothing back.

    A relu's baseline is one half, not zero.

    Args:
        slope: phi'(z), any shape.
        largest_slope: sup |phi'| of the rule; the largest element where it is not given.

    Returns:
        () float64; nan for no elements.  nan slopes count as not saturated.

    Example:
        >>> saturated_fraction(torch.tensor([0.0, 0.01, 0.2, 0.25]), 0.25).item()
        0.5
    """
    size = dense(slope).abs()
    largest: Tensor | float = 1.0
    if largest_slope is not None:
        largest = largest_slope
    elif size.numel():
        largest = size.amax()
    return mean(size < SATURATED * largest)


def passing(slope: Tensor, largest_slope: float) -> Tensor:
    """1 where |slope| is 5 % of the largest or more, or nan, else 0: as floats, on a CPU far cheaper than bools.

    In float32 at least.

    Example:
        >>> passing(torch.tensor([0.0, -0.05, 0.049, torch.nan]), 1.0)
        tensor([0., 1., 0., 1.])
    """
    slope = slope.float() if slope.element_size() < 4 else slope
    limit = SATURATED * largest_slope * (1 - torch.finfo(slope.dtype).eps)  # what is above it passes
    return torch.ops.aten.threshold_backward(slope.new_ones(()), slope.abs(), limit)


def largest_of_units(slope: Tensor, unit_dim: int, stacked: bool = False) -> Tensor:
    """(N,) max |slope| over the batch, and positions: 0 where a unit passes nothing back for any sample.

    One batch proves nothing: a unit is called dead when that holds for several.

    Args:
        slope: phi'(z), with units along ``unit_dim``, of at least one element.
        unit_dim: 1 for (B, N) and (B, C, H, W), -1 for (B, T, N).
        stacked: the first dimension counts n such tensors; then (n, N).

    Example:
        >>> largest_of_units(torch.tensor([[0.0, 1.0], [0.0, -2.0]]), 1)
        tensor([0., 2.])
    """
    size = dense(slope).abs()
    others = [d for d in range(int(stacked), size.dim()) if d != unit_dim % size.dim()]
    return size.amax(others) if others else size


def histogram(x: Tensor, bins: int = 30) -> Tensor:
    """How many elements lie in each of ``bins`` equal bins from the least to the largest finite one.

    Returns:
        (3 + bins,) float64: least, largest, how many are not finite, the counts.  Both ends 0 if none is finite.

    Example:
        >>> histogram(torch.tensor([0.0, 1.0, 4.0, torch.nan]), bins=2).tolist()
        [0.0, 4.0, 1.0, 2.0, 1.0]
    """
    x = dense(x).flatten().to(wide(x.device))
    finite = torch.isfinite(x)
    zero = x.new_zeros(1)
    low = torch.where(finite, x, torch.inf).amin() if x.numel() else zero[0]
    high = torch.where(finite, x, -torch.inf).amax() if x.numel() else zero[0]
    low, high = (torch.where(torch.isfinite(end), end, 0.0) for end in (low, high))
    half = high / 2 - low / 2  # in halves: high - low may overflow
    place = torch.where(half > 0, (x / 2 - low / 2) / half * bins, 0.0).clamp(0, bins - 1)
    place = torch.where(finite, place, bins).long()
    counts = torch.zeros(bins + 1, dtype=x.dtype, device=x.device).index_add_(0, place, torch.ones_like(x))
    return torch.cat([torch.stack([low, high, counts[-1]]), counts[:-1]])


@statistic(of="preactivation", degree=0)
def mean_cosine(z: Tensor) -> Tensor:
    """c = mean over pairs of samples of cos(z_i, z_j), uncentred.

    With unit vectors u_i it is (‖sum u_i‖^2 - B) / (B (B - 1)).  1: all samples look alike to the layers above.

    Args:
        z: (B, ...), flattened per sample.

    Returns:
        () float64; nan for fewer than two samples, or if a sample is all zero or not finite.

    Source:
        Schoenholz et al. 2017, section 3 (the correlation map), with B samples for two.

    Example:
        >>> round(mean_cosine(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).item(), 4)
        0.7071
    """
    rows = by_sample(z)
    samples = len(rows)
    if samples < 2:
        return torch.full((), float("nan"), dtype=wide(z.device), device=z.device)
    total = norm(sum_of_units(rows, lengths(rows)))
    return (total * total - samples) / (samples * (samples - 1))


def sum_of_units(rows: Tensor, lengths: Tensor) -> Tensor:
    """sum of row_i / r_i: (N,) for rows (B, N) and their lengths r (B,), (n, N) for n such; in float32 at least.

    Example:
        >>> sum_of_units(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([3.0, 2.0]))
        tensor([1., 1.])
    """
    rows = rows.float() if rows.element_size() < 4 else rows
    lengths = lengths.to(rows.dtype).unsqueeze(-1)
    several = parts(rows)
    if len(several) == 1:
        return (rows / lengths).sum(-2)  # not a matrix product: autocast would round it
    return torch.stack([(x / r).sum(-2) for x, r in zip(several, lengths.split(len(several[0])), strict=True)]).sum(0)


def distinct_rows(weight: Tensor, groups: int = 1) -> Tensor:
    """Share of the rows that differ, counted by their projections on one fixed direction.

    1 for random weights; 1/N_out where all rows are the same or 0: units that compute the same and, while their
    gradients are the same too, go on doing so.

    Args:
        weight: (N_out, ...).
        groups: of units that read different inputs: only those of one group can be copies of each other.

    Returns:
        () float64; nan if a number is not finite.

    Example:
        >>> distinct_rows(torch.ones(4, 3)).item(), distinct_rows(torch.eye(4)).item()
        (0.25, 1.0)
        >>> distinct_rows(torch.ones(4, 3), groups=4).item()
        1.0
    """
    rows = by_sample(weight)
    rows = rows.to(wide(rows.device))
    direction = torch.cos(torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device) ** 2)
    places = (rows @ direction).view(groups, -1).sort().values
    near = ALIKE * lengths(rows).amax() * norm(direction)
    share = (groups + (places.diff() > near).sum()) / len(rows)
    return torch.where(torch.isfinite(places).all(), share, torch.nan)


@statistic(of="update", degree=1)
def update_ratio(update: Tensor, weight: Tensor) -> Tensor:
    """u = rms(dW) / rms(W): relative size of one optimizer step.

    Times sqrt(fan_in) and the steps planned it bounds how far the layer's output can move (travel): under 0.1 the
    layer hardly learns, over 1 in one step it is overwritten.

    Args:
        update: W_after - W_before, (N_out, N_in).
        weight: W_before, same shape.

    Returns:
        () float64 [1 / step].  inf when ``weight`` is all zero, nan when both are.

    Raises:
        ValueError: The shapes differ.

    Source:
        ours.

    Example:
        >>> update_ratio(torch.full((2, 3), 0.25), torch.full((2, 3), 2.0)).item()
        0.125
    """
    if update.shape != weight.shape:
        raise ValueError(f"update {tuple(update.shape)} and weight {tuple(weight.shape)} differ in shape")
    return norm(update) / norm(weight)
