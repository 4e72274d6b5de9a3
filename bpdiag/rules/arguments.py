"""What a rule refuses: one line that names the argument, says what came and what was expected.

A wrong kind of thing is a TypeError, a thing of the right kind and the wrong shape, size or device a ValueError.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LONGEST = 80  # characters for what came


class _Brief(reprlib.Repr):
    """Python's repr with long things cut, and of a tensor, however deep inside, no number."""

    maxlist = maxtuple = 12
    maxstring = maxother = LONGEST

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Tensor):
            return f"a tensor {tuple(x.shape)} of {x.dtype} on {x.device}"
        return super().repr1(x, level)


def told(came: Any) -> str:
    """Whatever came, on one line.

    Example:
        >>> told([torch.zeros(2, 3), "a"])
        "[a tensor (2, 3) of torch.float32 on cpu, 'a']"
    """
    line = " ".join(_Brief().repr(came).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def wrong(rule: str, argument: str, came: Any, expected: str, kind: type[Exception] = ValueError) -> Exception:
    """The error to raise.  ``came``: the value, or in a string what is wrong with it; of a value that may be one, told.

    Example:
        >>> wrong("conv", "stride", 0, "1 or more")
        ValueError('conv: stride is 0; expected 1 or more')
    """
    return kind(f"{rule}: {argument} is {came if isinstance(came, str) else told(came)}; expected {expected}")


def tensor(rule: str, argument: str, t: Any) -> None:
    """Refuse what is no tensor."""
    if not isinstance(t, Tensor):
        raise wrong(rule, argument, told(t), "a tensor", TypeError)


def floats(rule: str, /, *, mixed: bool = False, **tensors: Any) -> None:
    """Refuse all but real floating-point tensors of one dtype on one device; the first is the measure.

    Under autocast, and where a rule mixes precisions (``mixed``: float32 beside a narrower first), dtypes may differ
    from that of the first; where a rule mixes them the others are of one dtype.
    """
    (first, x), *others = tensors.items()
    second = None
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
        if mixed:
            second = second or (name, t.dtype)
            if t.dtype != second[1]:
                raise wrong(rule, name, t, f"{second[1]}, as {second[0]}", TypeError)


def shaped(rule: str, argument: str, t: Tensor | None, shape: Sequence[int], meaning: str) -> None:
    """Refuse a tensor of another shape; None passes."""
    if t is not None and t.shape != torch.Size(shape):
        raise wrong(rule, argument, t, f"shape {tuple(shape)}: {meaning}")


def whole(rule: str, argument: str, value: Any, least: int | None = 1, expected: str = "a whole number") -> int:
    """A whole number of at least ``least`` (None: any), from an int or what Python indexes with, as numpy's integers.

    Not from a tensor: its number may lie on another device.
    """
    if type(value) is not int:
        try:
            if isinstance(value, bool | Tensor):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise wrong(rule, argument, told(value), expected, TypeError) from None
    if least is not None and value < least:
        raise wrong(rule, argument, value, f"{least} or more")
    return value


def number(
    rule: str,
    argument: str,
    value: Any,
    expected: str = "a number",
    within: Callable[[float], bool] | None = None,
) -> None:
    """Refuse what is no real number, or one that is not ``within``, as ``expected`` says."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(rule, argument, told(value), expected, TypeError)
    if within and not within(value):
        raise wrong(rule, argument, value, expected)


def flag(rule: str, argument: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise wrong(rule, argument, told(value), "True or False", TypeError)


def each(rule: str, argument: str, value: Any, n: int, least: int | None = 1) -> tuple[int, ...]:
    """One whole number for each of n dimensions, from one for all or a sequence.

    Example:
        >>> each("conv", "stride", 2, 3), each("conv", "stride", (1, 2), 2)
        ((2, 2, 2), (1, 2))
    """
    if isinstance(value, int):
        return (whole(rule, argument, value, least),) * n
    if isinstance(value, str) or not isinstance(value, Sequence):
        return (whole(rule, argument, value, least, f"a whole number or {n} of them"),) * n
    if len(value) != n:
        raise wrong(rule, argument, tuple(value), f"a whole number or {n} of them, one a dimension")
    return tuple([whole(rule, argument, v, least) for v in value])


def one_of(rule: str, argument: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a name that is not known."""
    if not isinstance(value, str) or value not in known:
        raise wrong(rule, argument, told(value), f"one of {', '.join(known)}")
