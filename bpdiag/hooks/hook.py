"""What is put on a model: hooks that no copy takes along, and what they stand on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def _nothing(*_: Any) -> None:
    """What a hook does in a copy."""


class Hook(partial[None]):
    """A function, some arguments given; what a copy or a pickle of the model takes along of it does nothing.

    Example:
        >>> from copy import deepcopy
        >>> hook = Hook(print, "seen")
        >>> hook(1), deepcopy(hook)(1)
        seen 1
        (None, None)
    """

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook(_nothing)

    def __reduce__(self) -> tuple[type[Hook], tuple[Callable[..., None]]]:
        return Hook, (_nothing,)


def what_hooks_stand_on(model: nn.Module) -> list[Any]:
    """Each module, its weight, whether that is trained, whether it works in place: where one changes, hooks do.

    Example:
        >>> [type(x).__name__ for x in what_hooks_stand_on(nn.Linear(2, 3))]
        ['Linear', 'Parameter', 'bool', 'NoneType']
    """
    found: list[Any] = []
    seen, stack = {model}, [model]
    while stack:
        module = stack.pop()
        weight = module._parameters.get("weight")
        found += module, weight, weight is not None and weight.requires_grad, module.__dict__.get("inplace")
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return found
