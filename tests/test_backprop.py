"""The sweep by hand: a stack against autograd and torch.optim, member by member."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bpdiag.backprop import Meter, Optimizer, Stack
from bpdiag.backprop.kernels import kernel
from bpdiag.config import ModelConfig, UsageError
from bpdiag.model import build
from bpdiag.rules import ACTIVATIONS

MIXED = ["tanh", "tanh", "sigmoid", "relu", "relu", "gelu", "silu"]
RATES = [0.01 * (k + 1) for k in range(len(MIXED))]
PLAIN = [name for name, rule in ACTIVATIONS.items() if not rule.learnable]


def nets_of(names: Sequence[str], dtype=torch.float64, depth=5, width=16, **options: Any) -> list[nn.Module]:
    return [
        build(ModelConfig(depth=depth, width=width, activation=name, **options), 20, 10, seed=k).to(dtype)
        for k, name in enumerate(names)
    ]


def stack_of(nets, names, optimizer: Optimizer, **options: Any) -> Stack:
    return Stack(nets, [ACTIVATIONS[name] for name in names], optimizer, **options)


def draw(batch: int, orders: int = 1, dtype=torch.float64):
    xs = [torch.randn(batch, 20, dtype=dtype) for _ in range(orders)]
    return xs, [torch.randint(10, (batch,)) for _ in range(orders)]


def torchs(net: nn.Module, o: Optimizer, k: int) -> torch.optim.Optimizer:
    decay = o.decay[k] if o.decay else 0.0
    eps = o.eps[k] if o.eps else 1e-8
    if o.name == "sgd":
        return torch.optim.SGD(
            net.parameters(), o.rate[k], momentum=o.momentum, nesterov=o.nesterov, weight_decay=decay
        )
    kind = torch.optim.Adam if o.name == "adam" else torch.optim.AdamW
    return kind(net.parameters(), o.rate[k], weight_decay=decay, eps=eps)


def distance(names, optimizer: Optimizer, steps=6, orders=None, chunk=30_000, **options: Any) -> float:
    """The largest difference of any number of any member from autograd's and torch.optim's, after some steps."""
    torch.manual_seed(0)
    nets = nets_of(names, **options)
    stack = stack_of(nets, names, optimizer, orders=orders, chunk_bytes=chunk)
    theirs = [torchs(net, optimizer, k) for k, net in enumerate(nets)]
    reads = orders or [0] * len(names)
    meter, worst = Meter(len(names), torch.device("cpu")), 0.0
    for step in range(steps):
        xs, ys = draw(8 if step < steps - 2 else 5, max(reads) + 1)  # the last batches of an epoch are short
        stack.step(xs, ys, meter if step % 2 else None)
        for k, net in enumerate(nets):
            loss = nn.functional.cross_entropy(net(xs[reads[k]]), ys[reads[k]])
            theirs[k].zero_grad()
            loss.backward()
            if optimizer.clip:
                nn.utils.clip_grad_norm_(net.parameters(), optimizer.clip[k])
            theirs[k].step()
            worst = max(worst, abs(loss.item() - stack.losses[k].item()))
    for k, net in enumerate(nets):
        ours = build(ModelConfig(depth=5, width=16, activation=names[k], **options), 20, 10, seed=99).double()
        stack.give_back(k, ours)
        for mine, own in zip(ours.state_dict().values(), net.state_dict().values(), strict=True):
            worst = max(worst, (mine - own).abs().max().item())
    return worst


@pytest.mark.parametrize(
    "optimizer",
    [
        Optimizer(RATES),
        Optimizer(RATES, momentum=0.0),
        Optimizer(RATES, nesterov=True),
        Optimizer(RATES, decay=[0.01 * k for k in range(7)]),
        Optimizer(RATES, clip=[0.5, 0.1, math.inf, 0.5, 0.5, 0.5, 0.0]),
        Optimizer([0.001] * 7, "adam"),
        Optimizer([0.001 * (k // 3) for k in range(7)], "adam", eps=[1e-8, 1e-5, *[1e-8] * 5]),
        Optimizer([0.001] * 7, "adam", decay=[0.1] * 7),
        Optimizer([0.001 * (k + 1) for k in range(7)], "adamw", decay=[0.1] * 7),
        Optimizer([0.001] * 7, "adamw", decay=[0.1] * 7),
        Optimizer([0.0] * 7),
    ],
    ids=lambda o: f"{o.name}-{o.momentum}-{o.nesterov}-{bool(o.decay)}-{bool(o.clip)}-{len(set(o.rate))}",
)
def test_every_optimizer_is_torchs(optimizer):
    assert distance(MIXED, optimizer) < 1e-13


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "batch"},
        {"normalization": "layer"},
        {"residual": "identity"},
        {"residual": "identity", "branch_scale": "0.5"},
        {"residual": "identity", "branch_scale": "1/sqrt(blocks)", "normalization": "layer"},
        {"residual": "identity", "normalization": "batch"},
    ],
    ids=str,
)
def test_every_architecture_is_autograds(options):
    assert distance(MIXED, Optimizer(RATES), **options) < 1e-12


def test_every_activation_is_autograds():
    assert distance(PLAIN, Optimizer([0.05] * len(PLAIN))) < 1e-12


def test_members_may_read_batches_of_their_own():
    assert distance(MIXED, Optimizer(RATES), orders=[0, 0, 1, 1, 2, 0, 2]) < 1e-13


def test_a_wrong_rule_is_told_from_the_right_one():
    """The twin: a slope a thousandth too large is seen."""

    class Bent(ACTIVATIONS["tanh"]):
        name = "bent"

        def vjp(g_a, a):
            return 1.001 * g_a * (1 - a * a)

    nets = nets_of(["tanh"])
    right, bent = (Stack(nets, [rule], Optimizer([0.1])) for rule in (ACTIVATIONS["tanh"], Bent))
    xs, ys = draw(8)
    for stack in (right, bent):
        stack.step(xs, ys)
    assert (right.layers[0].W.W - bent.layers[0].W.W).abs().max() > 1e-7


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kernel_is_its_rule_at_kinks_and_at_nan(name, dtype):
    rule, it = ACTIVATIONS[name], kernel(ACTIVATIONS[name])
    edges = [0.0, -0.0, 1e-30, math.nan, 88.0, -88.0, *rule.kinks]
    z = torch.cat([torch.linspace(-6, 6, 241, dtype=dtype), torch.tensor(edges, dtype=dtype)])
    a = torch.empty_like(z)
    it.forward(z, a)
    torch.testing.assert_close(a, rule.forward(z), equal_nan=True)
    g, kept = torch.randn_like(z), z if it.keeps_input else a
    out = torch.empty_like(z)
    it.vjp(g, kept, out)
    finite = torch.isfinite(z)
    torch.testing.assert_close(out[finite], rule.vjp(g, kept)[finite])


def run(names, steps=5, measured=(), dtype=torch.float32, spoil=None, **options: Any) -> Stack:
    torch.manual_seed(1)
    nets = nets_of(names, dtype)
    if spoil is not None:
        nn.init.constant_(nets[spoil][0].weight, math.nan)
    stack, meter = (
        stack_of(nets, names, Optimizer([0.05] * len(names)), **options),
        Meter(len(names), torch.device("cpu")),
    )
    for step in range(steps):
        stack.step(*draw(8, dtype=dtype), meter if step in measured else None)
    return stack


def bits(stack: Stack, members=slice(None)) -> list[bytes]:
    return [p.W[members].numpy().tobytes() for layer in stack.layers for p in layer.parameters()]


def test_measuring_changes_no_bit():
    assert bits(run(MIXED)) == bits(run(MIXED, measured=(0, 2, 3)))
    assert bits(run(MIXED)) != bits(run(MIXED, steps=4))


def test_a_member_of_nan_changes_no_bit_of_the_others():
    others = [k for k in range(len(MIXED)) if k != 3]
    whole, spoiled = run(MIXED), run(MIXED, spoil=3)
    assert math.isnan(spoiled.losses[3])
    assert bits(whole, others) == bits(spoiled, others)
    assert bits(whole) != bits(spoiled)


def test_what_members_compute_does_not_depend_on_the_chunks():
    torch.testing.assert_close(run(MIXED, chunk_bytes=1).losses, run(MIXED).losses, rtol=1e-6, atol=0)


def test_a_schedule_is_torchs():
    torch.manual_seed(0)
    nets = nets_of(["tanh", "relu"])
    stack = stack_of(nets, ["tanh", "relu"], Optimizer([0.1, 0.2]))
    theirs = [torch.optim.SGD(net.parameters(), rate, momentum=0.9) for net, rate in zip(nets, (0.1, 0.2), strict=True)]
    for step in range(4):
        if step == 2:
            stack.set_rate([0.05, 0.01])
            for one, rate in zip(theirs, (0.05, 0.01), strict=True):
                one.param_groups[0]["lr"] = rate
        xs, ys = draw(8)
        stack.step(xs, ys)
        for net, one in zip(nets, theirs, strict=True):
            one.zero_grad()
            nn.functional.cross_entropy(net(xs[0]), ys[0]).backward()
            one.step()
    assert (stack.layers[1].W.W[1] - nets[1].linear2.weight).abs().max() < 1e-14


# ---- units ------------------------------------------------------------------------------------------------


def deep(dtype: torch.dtype) -> tuple[Stack, dict[Any, np.ndarray]]:
    torch.manual_seed(0)
    nets = nets_of(["sigmoid", "sigmoid"], dtype, depth=60, weight_variance="0.05")
    stack = stack_of(nets, ["sigmoid"] * 2, Optimizer([0.1, 0.1]))
    xs, ys = draw(8, dtype=torch.float64)
    return stack, stack.look([x.to(dtype) for x in xs], ys, Meter(2, torch.device("cpu")))


def test_a_cotangent_that_float32_cannot_hold_is_told_as_float64_has_it():
    _, narrow = deep(torch.float32)
    _, wide = deep(torch.float64)
    assert np.all(wide["g_z", 0] < 1e-45)  # under the least number of float32
    for layer in range(60):
        np.testing.assert_allclose(narrow["g_z", layer], wide["g_z", layer], rtol=1e-4)


def test_without_units_it_would_read_0():
    """The twin."""
    torch.manual_seed(0)
    nets = nets_of(["sigmoid"], torch.float32, depth=60, weight_variance="0.05")
    stack, meter = stack_of(nets, ["sigmoid"], Optimizer([0.1])), Meter(1, torch.device("cpu"))
    stack.step(*draw(8, dtype=torch.float32), meter)
    assert meter.read(stack.units)["g_z", 0] == 0


def test_units_are_powers_of_two_and_change_nothing_that_float64_holds():
    stack, _ = deep(torch.float64)
    assert np.any(stack.units != 1)
    assert np.all(np.frexp(stack.units)[0] == 0.5)
    plain, _ = deep(torch.float64)
    plain.units = np.ones_like(plain.units)
    plain._plan_units()
    xs, ys = draw(8)
    for _ in range(3):
        stack.step(xs, ys)
        plain.step(xs, ys)
    for ours, theirs in zip(stack.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.W.W, theirs.W.W, rtol=1e-15, atol=0)
    top = stack.layers[-1].W.states[0] / torch.from_numpy(stack.units[-1]).view(-1, 1, 1)
    torch.testing.assert_close(top, plain.layers[-1].W.states[0], rtol=1e-12, atol=0)


def test_a_velocity_turns_with_its_unit():
    torch.manual_seed(0)
    stack = stack_of(nets_of(["tanh"]), ["tanh"], Optimizer([0.1]))
    xs, ys = draw(8)
    stack.step(xs, ys)
    before = stack.layers[1].W.states[0].clone()
    far = {("g_out", layer): np.array([1e-20]) for layer in range(stack.L)}
    assert stack.adjust(far)
    assert not stack.adjust(far)
    unit = float(stack.units[1, 0])
    assert 2**-30 < unit * 1e-20 < 2**30
    torch.testing.assert_close(stack.layers[1].W.states[0], before * unit, rtol=0, atol=0)


def test_a_velocity_outlives_the_collapse_of_its_cotangent():
    """What it holds in the old unit must not overflow in the new one."""
    torch.manual_seed(0)
    stack = stack_of(nets_of(["tanh"], torch.float32), ["tanh"], Optimizer([0.1]))
    for layer in stack.layers:
        layer.W.states[0].fill_(1e7)
    before = stack.layers[1].W.states[0].double().clone()
    for _ in range(3):
        stack.adjust({("g_out", layer): np.array([3e-37]) for layer in range(stack.L)})
    after = stack.layers[1].W.states[0].double() / stack.units[1, 0]
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e25, 1e-25, 0.0])
def test_what_float32_squares_wrongly_is_told_rightly_at_once_and_after(size):
    meter, spare = Meter(1, torch.device("cpu")), torch.empty(1, 4, 4)
    units = np.ones((1, 1))
    for x in (1.0, size, size, 1.0):
        meter.begin([torch.ones(4, 4)], [0])
        meter.size("a", 0, slice(0, 1), torch.full((1, 4, 4), x), spare)
        assert meter.read(units)["a", 0].item() == pytest.approx(4 * x, rel=1e-6)


# ---- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Stack([], [], Optimizer([])), "a stack of no nets"),
        (lambda: stack_of(nets_of(["tanh"] * 2), ["tanh"], Optimizer([0.1] * 2)), "1 activations; give one for each"),
        (lambda: stack_of(nets_of(["tanh"]), ["tanh"], Optimizer([0.1, 0.2])), "2 rates"),
        (
            lambda: stack_of([*nets_of(["tanh"]), *nets_of(["tanh"], width=8)], ["tanh"] * 2, Optimizer([0.1] * 2)),
            "differ in layer 1",
        ),
        (
            lambda: stack_of([*nets_of(["tanh"]), *nets_of(["tanh"], depth=6)], ["tanh"] * 2, Optimizer([0.1] * 2)),
            "differ",
        ),
        (
            lambda: stack_of(
                [*nets_of(["tanh"]), *nets_of(["tanh"], normalization="layer")], ["tanh"] * 2, Optimizer([0.1] * 2)
            ),
            "differ in layer 1",
        ),
        (lambda: stack_of(nets_of(["prelu"]), ["prelu"], Optimizer([0.1])), "prelu: it learns"),
        (lambda: Optimizer([math.inf]), "rate"),
        (lambda: Optimizer([math.nan]), "rate"),
        (lambda: Optimizer([-0.1]), "rate"),
        (lambda: Optimizer([0.1], "rmsprop"), "rmsprop: unknown; known: sgd, adam, adamw"),
        (lambda: Optimizer([0.1], decay=[0.1, 0.1]), "2 numbers for 1 members"),
    ],
)
def test_what_cannot_be_a_stack_is_refused_in_words(make, said):
    with pytest.raises(UsageError) as refusal:
        make()
    assert said in str(refusal.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the sweep is compared on the CPU alone")
def test_a_stack_on_a_gpu_is_the_one_on_the_cpu():
    torch.manual_seed(0)
    nets = nets_of(MIXED)
    here = stack_of(nets, MIXED, Optimizer(RATES))
    there = stack_of([net.cuda() for net in nets], MIXED, Optimizer(RATES))
    for _ in range(3):
        xs, ys = draw(8)
        here.step(xs, ys)
        there.step([x.cuda() for x in xs], [y.cuda() for y in ys])
    torch.testing.assert_close(there.losses.cpu(), here.losses, rtol=1e-10, atol=0)
