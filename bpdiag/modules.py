"""What networks are made of: torch's modules with our rules in them, and torch's own.

Each is a subclass of torch's, with torch's parameters, buffers, settings and state dict; only ``forward`` is ours.  So
whoever knows torch's module (``eval()``, hooks, ``isinstance``, a checkpoint) knows this one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from bpdiag.rules import RULES, Activation
from bpdiag.rules.arguments import wrong
from bpdiag.rules.norm import running_statistics


class Linear(nn.Linear):
    """z = x W^T + b by our rule."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., N_in) -> (..., N_out)."""
        return RULES["linear"].apply(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """z = W * x + b by our rule."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H', W')."""
        settings = self.stride, self.padding, self.dilation, self.groups, self.padding_mode
        return RULES["conv"].apply(x, self.weight, self.bias, *settings)


class LayerNorm(nn.LayerNorm):
    """y = gamma (x - m) / sqrt(v + eps) + beta by our rule, m and v of one sample."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that ends in ``normalized_shape``."""
        return RULES["layer_norm"].apply(x, self.weight, self.bias, self.normalized_shape, self.eps)


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
    """In training m and v of the batch, which the running ones follow; in evaluation the running ones, if there are."""
    module._check_input_dim(x)
    mean, var, seen = module.running_mean, module.running_var, module.num_batches_tracked
    if not module.training:
        return RULES["batch_norm"].apply(x, module.weight, module.bias, mean, var, module.eps)
    y = RULES["batch_norm"].apply(x, module.weight, module.bias, eps=module.eps)
    if module.training and module.track_running_stats and mean is not None:
        assert var is not None
        assert seen is not None
        with torch.no_grad():
            seen.add_(1)
            batches = int(seen) if module.momentum is None else None
            for old, new in zip((mean, var), running_statistics(x, mean, var, module.momentum, batches), strict=True):
                old.copy_(new)
    return y


class BatchNorm1d(nn.BatchNorm1d):
    """y = gamma (x - m) / sqrt(v + eps) + beta by our rule, m and v of each feature over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) or (B, C, L) -> the same."""
        return _batch_norm(self, x)


class BatchNorm2d(nn.BatchNorm2d):
    """The same of each channel, over the batch and all places."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return _batch_norm(self, x)


class MaxPool2d(nn.MaxPool2d):
    """The largest of each window by our rule; where it stands (``return_indices``) the rule does not say."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) or (C, H, W) -> (..., H', W')."""
        if self.return_indices:
            raise wrong("MaxPool2d", "return_indices", True, "False, or torch's own module")
        settings = self.stride, self.padding, self.dilation, self.ceil_mode
        return RULES["max_pool"].apply(x, _pair(self.kernel_size), *settings)  # a pair: two dimensions, whatever x has


class Flatten(nn.Flatten):
    """One row of numbers a sample, by our rule."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C H W)."""
        return RULES["flatten"].apply(x, self.start_dim, self.end_dim)


def _stepped(cell: nn.RNNCellBase, rule: str, x: Tensor, state: tuple[Tensor, ...] | None) -> Tensor:
    """One time step of a rule of ``rules.recurrent``; from a state of zeros unless it is given; of one sample too."""
    if x.dim() == 1:
        states = None if state is None else tuple([s.unsqueeze(0) for s in state])
        return _stepped(cell, rule, x.unsqueeze(0), states).squeeze(-2)
    of: Any = RULES[rule]
    states = state or (x.new_zeros(len(x), cell.hidden_size),) * of.states
    y = of.apply(x.unsqueeze(0), *states, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    return y.squeeze(-3)


class RNNCell(nn.RNNCell):
    """h' = tanh(x W^T + b + h U^T + c) by our rule."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """(B, I) and the state (B, H), or of one sample (I,) and (H,) -> the next state."""
        return _stepped(self, "rnn", input, None if hx is None else (hx,))


class LSTMCell(nn.LSTMCell):
    """s' = f s + i k,  h' = o tanh s' by our rule."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(B, I) and (state, cell), each (B, H) -> the next of both."""
        h, s = _stepped(self, "lstm", input, hx).unbind(0)
        return h, s


class GRUCell(nn.GRUCell):
    """h' = (1 - z) n + z h by our rule."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """(B, I) and the state (B, H) -> the next state."""
        return _stepped(self, "gru", input, None if hx is None else (hx,))


class Unrolled(nn.Sequential):
    """h_t = cell(x_t, h_{t-1}) for every step of a sequence, then the head of the last state: one call a time step.

    Each cell reads the state of the one below; the last child is the head.  So a recorder sees every time step, as a
    call of its own.  ``shape``: (channels, height, width) of a sample; ``sequence``: rows, or pixels row by row.
    """

    def __init__(self, children: OrderedDict[str, nn.Module], shape: tuple[int, ...], sequence: str) -> None:
        super().__init__(children)
        self.shape, self.sequence = shape, sequence

    def read(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C H W) -> (B, C W) for each row, or (B, C) for each pixel."""
        places = x.view(len(x), *self.shape).movedim(1, -1)
        steps = places.flatten(2) if self.sequence == "rows" else places.flatten(1, 2)
        return steps.unbind(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C H W) -> (B, N_out)."""
        *cells, head = self
        states: list[Any] = [None] * len(cells)
        for read in self.read(x):
            for k, cell in enumerate(cells):
                states[k] = cell(read, states[k])
                read = states[k][0] if isinstance(states[k], tuple) else states[k]
        return head(read)


class Nonlinearity(nn.Module):
    """a = phi(z) by a rule of ``rules.activation``; what it learns is a parameter, named as torch names it."""

    def __init__(self, rule: type[Activation]) -> None:
        super().__init__()
        self.rule = rule
        for name, start in rule.learnable.items():
            self.register_parameter(name, nn.Parameter(torch.tensor([start])))

    def forward(self, z: Tensor) -> Tensor:
        """Elementwise on any shape."""
        return self.rule.apply(z, *self.parameters())

    def extra_repr(self) -> str:
        """The rule's name."""
        return self.rule.name


class Sum(nn.Module):
    """a = skip + scale branch, by our rule or by torch's: the end of a residual block, a module so that it is seen."""

    def __init__(self, scale: float, by_hand: bool = True) -> None:
        super().__init__()
        self.scale, self.by_hand = scale, by_hand

    def forward(self, skip: Tensor, branch: Tensor) -> Tensor:
        """Two tensors of one shape -> their sum."""
        if self.by_hand:
            return RULES["add"].apply(skip, branch, self.scale)
        return torch.add(skip, branch, alpha=self.scale)

    def extra_repr(self) -> str:
        """The branch's scale."""
        return f"scale={self.scale:g}"


class Residual(nn.Sequential):
    """a_1 = phi(z_1),  a_l = a_{l-1} + scale phi(z_l): layers in a row, where a ``Sum`` adds what entered its layer.

    ``layers`` are the modules of each layer by their names, in order; all are children of this module, as those of
    nn.Sequential are.

    Example:
        >>> halved = {"linear1": nn.Identity(), "sum1": Sum(0.5)}
        >>> Residual([halved])(torch.tensor([2.0]))
        tensor([3.])
    """

    def __init__(self, layers: list[dict[str, nn.Module]]) -> None:
        super().__init__()
        for layer in layers:
            for name, module in layer.items():
                self.add_module(name, module)
        self.layers = [list(layer) for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        """(B, N_in) -> (B, N_out)."""
        for layer in self.layers:
            entered = x
            for module in map(self.get_submodule, layer):
                x = module(entered, x) if isinstance(module, Sum) else module(x)
        return x


@dataclass(frozen=True)
class Kit:
    """The modules that one kind of backward builds networks from."""

    linear: type[nn.Linear]
    conv: type[nn.Conv2d]
    layer_norm: type[nn.LayerNorm]
    batch_norm: dict[int, Callable[[int], nn.Module]]  # by the dimensions of a sample
    max_pool: type[nn.MaxPool2d]
    flatten: type[nn.Flatten]
    activation: Callable[[type[Activation]], nn.Module]
    sum: Callable[[float], nn.Module]
    cell: dict[str, type[nn.RNNCellBase]]


def _torchs(rule: type[Activation]) -> nn.Module:
    return rule.oracle(**rule.settings)


BACKWARDS = {
    "handwritten": Kit(
        Linear,
        Conv2d,
        LayerNorm,
        {1: BatchNorm1d, 3: BatchNorm2d},
        MaxPool2d,
        Flatten,
        Nonlinearity,
        Sum,
        {"rnn": RNNCell, "lstm": LSTMCell, "gru": GRUCell},
    ),
    "autograd": Kit(
        nn.Linear,
        nn.Conv2d,
        nn.LayerNorm,
        {1: nn.BatchNorm1d, 3: nn.BatchNorm2d},
        nn.MaxPool2d,
        nn.Flatten,
        _torchs,
        partial(Sum, by_hand=False),
        {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell},
    ),
}
