"""What a judge must know of the optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def describe(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Class, settings of the group with most parameters, whether a step follows |g|, whether it had stepped before.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> describe([torch.optim.SGD([weight], lr=0.5)])["sgd_like"]
        True
    """
    if not optimizers:
        return {}
    optimizer = optimizers[0]
    group = max(optimizer.param_groups, key=lambda g: sum(p.numel() for p in g["params"] if p.requires_grad))
    told: dict[str, float] = {k: float(group[k]) for k in ("lr", "momentum", "eps", "weight_decay") if k in group}
    begun = bool(optimizer.state)
    largest = max(group["params"], key=torch.Tensor.numel, default=None)
    return {
        "name": type(optimizer).__name__,
        "sgd_like": isinstance(optimizer, torch.optim.SGD),
        "begun": begun,
        "dtype": str(largest.dtype).removeprefix("torch.") if largest is not None else "",
        **told,
    }
