"""What a rule refuses: one line that names the argument, says what came and what was expected.

A wrong kind of thing is a TypeError, a thing of the right kind and the wrong shape, size or device a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def wrong(rule: str, argument: str, came: Any, expected: str, kind: type[Exception] = ValueError) -> Exception:
    """The error to raise.

    Example:
        >>> wrong("conv", "stride", 0, "1 or more")
        ValueError('conv: stride is 0; expected 1 or more')
    """
    if isinstance(came, Tensor):
        came = f"a tensor {tuple(came.shape)} of {came.dtype} on {came.device}"
    return kind(f"{rule}: {argument} is {came}; expected {expected}")


def tensor(rule: str, argument: str, t: Any) -> None:
    """Refuse what is no tensor."""
    if not isinstance(t, Tensor):
        raise wrong(rule, argument, repr(t), "a tensor", TypeError)


def floats(rule: str, /, *, mixed: bool = False, **tensors: Any) -> None:
    """Refuse all but real floating-point tensors of one dtype on one device; the first is the measure.

    Under autocast, and where a rule mixes precisions (``mixed``: float32 beside a narrower first), dtypes may differ.
    """
    (first, x), *others = tensors.items()
    tensor(rule, first, x)
    if not x.is_floating_point():
        raise wrong(rule, first, x, "a tensor of real floating-point numbers", TypeError)
    for name, t in others:
        if t is None:
            continue
        tensor(rule, name, t)
        if t.device != x.device:
            raise wrong(rule, name, t, f"it on {x.device}, where {first} is")
        if t.dtype != x.dtype:
            widened = mixed and t.dtype == torch.float32 and x.element_size() < 4
            if not (widened or (t.is_floating_point() and torch.is_autocast_enabled(x.device.type))):
                raise wrong(rule, name, t, f"{x.dtype}, as {first}", TypeError)


def shaped(rule: str, argument: str, t: Tensor | None, shape: Sequence[int], meaning: str) -> None:
    """Refuse a tensor of another shape; None passes."""
    if t is not None and t.shape != torch.Size(shape):
        raise wrong(rule, argument, t, f"shape {tuple(shape)}: {meaning}")


def whole(rule: str, argument: str, value: Any, least: int | None = 1) -> int:
    """A whole number of at least ``least`` (None: any)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(rule, argument, repr(value), "a whole number", TypeError)
    if least is not None and value < least:
        raise wrong(rule, argument, value, f"{least} or more")
    return value


def number(rule: str, argument: str, value: Any, expected: str = "a number") -> None:
    """Refuse what is no real number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(rule, argument, repr(value), expected, TypeError)


def flag(rule: str, argument: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise wrong(rule, argument, repr(value), "True or False", TypeError)


def each(rule: str, argument: str, value: Any, n: int, least: int | None = 1) -> tuple[int, ...]:
    """One whole number for each of n dimensions, from one for all or a sequence.

    Example:
        >>> each("conv", "stride", 2, 3), each("conv", "stride", (1, 2), 2)
        ((2, 2, 2), (1, 2))
    """
    if isinstance(value, int):
        return (whole(rule, argument, value, least),) * n
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise wrong(rule, argument, repr(value), f"a whole number or {n} of them", TypeError)
    if len(value) != n:
        raise wrong(rule, argument, tuple(value), f"a whole number or {n} of them, one a dimension")
    return tuple([whole(rule, argument, v, least) for v in value])


def one_of(rule: str, argument: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a name that is not known."""
    if value not in known:
        raise wrong(rule, argument, repr(value), f"one of {', '.join(known)}")
