"""Tensor -> number, left on the device as a () tensor in float64: the host reads all of a step's numbers at once.

Each function declares what it measures (``of``) and its degree of homogeneity: how the number scales when the tensor
is multiplied by t > 0 (t^degree).  The suite checks the declaration.
"""

from __future__ import annotations

from collections.abc import Callable
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


def statistic(of: str, degree: int) -> Callable[[F], F]:
    """Put a function into STATISTICS with its declaration."""

    def register(function: F) -> F:
        STATISTICS[function.__name__] = Statistic(function, of, degree)
        return function

    return register


def dense(x: Tensor) -> Tensor:
    """The numbers of any tensor: a sparse one's values, duplicates added; a complex one's moduli; floating point."""
    x = x.detach()
    if x.layout != torch.strided:
        x = x.coalesce().values() if x.layout == torch.sparse_coo else x.values()
    if x.is_complex():
        return x.abs()
    return x if x.is_floating_point() else x.to(torch.float64)


def wide(device: torch.device) -> torch.dtype:
    """The widest dtype a device can reduce in: float64 but where there is none (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64


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
        largest = x.abs().amax() if x.numel() else x.new_zeros(())
        usable = torch.isfinite(largest) & (largest > 0)
        scale = torch.where(usable, largest, 1.0)
        return torch.linalg.vector_norm(x / scale) * scale
    return torch.linalg.vector_norm(x, dtype=wide(x.device))


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
    return mean(size < 0.05 * largest)


def alive_units(slope: Tensor, unit_dim: int) -> Tensor:
    """(N,) bool: which units have a slope other than 0 for any sample (and position) of the batch.

    One batch proves nothing: a unit is called dead when it is alive in none of several.

    Args:
        slope: phi'(z), with units along ``unit_dim``.
        unit_dim: 1 for (B, N) and (B, C, H, W), -1 for (B, T, N).

    Example:
        >>> alive_units(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), 1)
        tensor([False,  True])
    """
    slope = dense(slope)
    others = [d for d in range(slope.dim()) if d != unit_dim % slope.dim()]
    return (slope != 0).any(dim=others) if others else slope != 0


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
    z = dense(z)
    samples = z.shape[0] if z.dim() else 0
    if samples < 2:
        return torch.full((), float("nan"), dtype=wide(z.device), device=z.device)
    rows = z.reshape(samples, -1)
    rows = rows.float() if rows.element_size() < 4 else rows
    rows = rows / rows.abs().amax(1, keepdim=True)  # else the squares of 1e30 or 1e-30 leave the number format
    units = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    total = torch.linalg.vector_norm(units.sum(0), dtype=wide(z.device))
    return (total * total - samples) / (samples * (samples - 1))


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
