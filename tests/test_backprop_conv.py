"""Convolutions in a stack: against autograd and torch.optim, member by member."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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


# ---- against the rules ------------------------------------------------------------------------------------


def pooled(a: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """p and g_a of one member's a (B, C, H, W) and g_p, by a stack's convolution."""
    B, C, *size = a.shape
    at = Picture((1, size[0], size[1]), C, (1, 1), (0, 0), 2)
    z = by_window(a, 2).permute(1, 2, 3, 0, 4, 5).reshape(1, C, -1)

    def room(name: object, rows: int, columns: int, largest: int) -> torch.Tensor:
        return a.new_full((1, rows, columns), math.nan)

    conv = Convolution(at, a.new_ones(1, C, 1), z, z, B, None, False, 0, room)
    conv.pool()
    conv.arrive(g.reshape(1, B, -1))
    out = torch.empty_like(z)
    conv.unpool(out)
    back = torch.empty_like(a)
    by_window(back, 2).permute(1, 2, 3, 0, 4, 5).copy_(out.view(C, 2, 2, B, size[0] // 2, size[1] // 2))
    return conv.out.view(B, C, size[0] // 2, size[1] // 2), back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pool_is_its_rule_where_the_largest_is_there_twice_too(dtype):
    torch.manual_seed(0)
    a = torch.randint(-2, 3, (3, 2, 8, 6)).to(dtype)
    a[0, 0, 0, 0] = math.inf
    g = torch.randn(3, 2, 4, 3, dtype=dtype)
    p, g_a = pooled(a, g)
    assert torch.equal(p, RULES["max_pool"].forward(a, 2))
    settings = RULES["max_pool"].keeps((a, 2, None, 0, 1, False), p, (True,))
    assert torch.equal(g_a, RULES["max_pool"].vjp(g, *settings)[0])
    assert not torch.equal(g_a.flip(3), RULES["max_pool"].vjp(g.flip(3), a.flip(3), *settings[1:])[0])  # the twin: ties


def test_weights_times_patches_are_the_rule_s_convolution():
    x, W = torch.randn(4, 3 * 8 * 6, dtype=torch.float64), torch.randn(5, 3, 3, 3, dtype=torch.float64)
    at = Picture((3, 8, 6), 5, (3, 3), (1, 1), 2)
    read = patches(x, at, x.new_empty(27, 4 * 48))
    z = RULES["conv"].forward(x.view(4, 3, 8, 6), W, None, padding=1)
    told = by_window(z, 2).permute(1, 2, 3, 0, 4, 5).reshape(5, -1)
    torch.testing.assert_close(W.flatten(1) @ read, told, rtol=1e-13, atol=1e-13)


# ---- members and measuring --------------------------------------------------------------------------------


def bits(spoil=None, measured=(), steps=3, dtype=torch.float32) -> list[list[bytes]]:
    """Of each member."""
    torch.manual_seed(1)
    nets = [made(name, k).to(dtype) for k, name in enumerate(MIXED)]
    if spoil is not None:
        nn.init.constant_(nets[spoil].get_submodule("conv1").weight, math.nan)
    stack, meter = Stack(nets, rules(MIXED), Optimizer(RATES)), Meter(len(MIXED), torch.device("cpu"))
    for step in range(steps):
        xs, ys = draw(8)
        stack.step([x.to(dtype) for x in xs], ys, meter if step in measured else None)
    return [[p.W[k].numpy().tobytes() for layer in stack.layers for p in layer.parameters()] for k in range(len(MIXED))]


def test_measuring_changes_no_bit():
    assert bits() == bits(measured=(0, 2))
    assert bits() != bits(steps=2)


def test_a_member_of_nan_changes_no_bit_of_the_others():
    whole, spoiled = bits(), bits(spoil=2)
    assert [k for k in range(len(MIXED)) if whole[k] != spoiled[k]] == [2]


def test_units_change_nothing_that_float64_holds():
    torch.manual_seed(0)
    nets = [made("sigmoid", k, normalization="none", weight_variance="1e-24") for k in range(2)]
    stack, plain = (Stack(nets, rules(["sigmoid"] * 2), Optimizer([0.1] * 2)) for _ in range(2))
    xs, ys = draw(8)
    numbers = stack.look(xs, ys, Meter(2, torch.device("cpu")))
    assert (stack.units[0] > 1e20).all()
    assert (numbers["g_z", 0] < 1e-20).all()
    for _ in range(3):
        stack.step(xs, ys)
        plain.step(xs, ys)
    for ours, theirs in zip(stack.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.W.W, theirs.W.W, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([made("relu", 1, COLOR)], "differ in layer 1"),
        ([made("relu", 1, normalization="layer")], "differ in layer 1"),
        ([build(ModelConfig(depth=4, width=16), 144, 10, seed=0).double()], "differ in layer 1"),
        ([made("prelu", 1)], "prelu: it learns"),
    ],
)
def test_what_cannot_be_a_stack_is_refused_in_words(others, said):
    names = ["relu", "prelu" if "prelu" in said else "relu"]
    with pytest.raises(UsageError) as refusal:
        Stack([made("relu", 0), *others], rules(names), Optimizer([0.1] * 2))
    assert said in str(refusal.value)


def test_sides_that_a_pool_leaves_a_row_of_are_refused():
    with pytest.raises(UsageError, match="even sides; here 13 x 12"):
        Stack([made("relu", 0, (1, 13, 12))], rules(["relu"]), Optimizer([0.1]))
