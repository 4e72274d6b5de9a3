"""Convolutions in a stack: against autograd and torch.optim, member by member."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bpdiag.backprop import Meter, Optimizer, Stack
from bpdiag.backprop.conv import Convolution, Picture, by_window, patches
from bpdiag.config import ModelConfig, UsageError
from bpdiag.model import build
from bpdiag.rules import ACTIVATIONS, RULES

MIXED = ["tanh", "relu", "relu", "gelu"]
RATES = [0.01 * (k + 1) for k in range(len(MIXED))]
GREY, COLOR = (1, 12, 12), (3, 16, 12)


def made(name: str, seed: int, shape=GREY, **options: Any) -> nn.Module:
    config = ModelConfig(**{"name": "cnn", "depth": 4, "width": 16, "activation": name, **options})
    return build(config, shape, 10, seed=seed).double()


def rules(names: Sequence[str]):
    return [ACTIVATIONS[name] for name in names]


def draw(batch: int, orders: int = 1, shape=GREY):
    xs = [torch.randn(batch, math.prod(shape), dtype=torch.float64) for _ in range(orders)]
    return xs, [torch.randint(10, (batch,)) for _ in range(orders)]


def torchs(net: nn.Module, o: Optimizer, k: int) -> torch.optim.Optimizer:
    decay, eps = o.decay[k] if o.decay else 0.0, o.eps[k] if o.eps else 1e-8
    if o.name == "sgd":
        return torch.optim.SGD(net.parameters(), o.rate[k], o.momentum, nesterov=o.nesterov, weight_decay=decay)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[o.name](
        net.parameters(), o.rate[k], weight_decay=decay, eps=eps
    )


def distance(
    optimizer: Optimizer,
    names=MIXED,
    steps=6,
    orders=None,
    chunk=2**24,
    shape=GREY,
    backward="autograd",
    **options: Any,
) -> float:
    """The largest difference of any number of any member from autograd's and torch.optim's, after some steps."""
    torch.manual_seed(0)
    nets = [made(name, k, shape, **options) for k, name in enumerate(names)]
    theirs = [made(name, k, shape, backward=backward, **options) for k, name in enumerate(names)]
    stack = Stack(nets, rules(names), optimizer, orders, chunk_bytes=chunk)
    optimizers = [torchs(net, optimizer, k) for k, net in enumerate(theirs)]
    reads = orders or [0] * len(names)
    meter, worst = Meter(len(names), torch.device("cpu")), 0.0
    for step in range(steps):
        xs, ys = draw(8 if step < steps - 2 else 5, max(reads) + 1, shape)  # an epoch's last batches are short
        stack.step(xs, ys, meter if step % 2 else None)
        for k, net in enumerate(theirs):
            loss = nn.functional.cross_entropy(net(xs[reads[k]]), ys[reads[k]])
            optimizers[k].zero_grad()
            loss.backward()
            if optimizer.clip:
                nn.utils.clip_grad_norm_(net.parameters(), optimizer.clip[k])
            optimizers[k].step()
            worst = max(worst, abs(loss.item() - stack.losses[k].item()))
    for k, net in enumerate(theirs):
        ours = made(names[k], 99, shape, **options)
        stack.give_back(k, ours)
        for mine, own in zip(ours.state_dict().values(), net.state_dict().values(), strict=True):
            worst = max(worst, (mine - own).abs().max().item())
    return worst


@pytest.mark.parametrize(
    "optimizer",
    [
        Optimizer(RATES),
        Optimizer(RATES, nesterov=True, decay=[0.01 * k for k in range(4)]),
        Optimizer(RATES, clip=[0.5, 0.1, math.inf, 0.5]),
        # eps: the gradient of a bias under a batch norm is 0 but for rounding, which Adam would divide by itself
        Optimizer([0.001] * 4, "adam", eps=[1e-4] * 4),
        Optimizer([0.001 * (k + 1) for k in range(4)], "adamw", decay=[0.1] * 4, eps=[1e-4] * 4),
    ],
    ids=lambda o: f"{o.name}-{o.nesterov}-{bool(o.decay)}-{bool(o.clip)}",
)
@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
def test_every_optimizer_and_norm_is_torchs(optimizer, normalization):
    assert distance(optimizer, normalization=normalization) < 1e-12


@pytest.mark.parametrize("name", [name for name, rule in ACTIVATIONS.items() if not rule.learnable])
def test_every_activation_is_its_rule(name):
    """Not torch's own: its hardsigmoid has a sixth in float32 as its slope."""
    assert distance(Optimizer([0.05] * 2), [name] * 2, steps=3, backward="handwritten") < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"orders": [0, 1, 1, 0]},
        {"chunk": 1},
        {"shape": COLOR},
        {"depth": 3},
        {"shape": COLOR, "normalization": "layer"},
    ],
    ids=str,
)
def test_batches_of_their_own_chunks_and_colors_change_nothing(options):
    assert distance(Optimizer(RATES), **options) < 1e-12
