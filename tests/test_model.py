from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bpdiag.config import ModelConfig, UsageError
from bpdiag.model import INITIALIZERS, build
from bpdiag.rules import ACTIVATIONS, RULES


def twins(**options):
    return [build(ModelConfig(backward=b, **options), 20, 4, seed=3) for b in ("handwritten", "autograd")]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight_variance", INITIALIZERS)
def test_by_hand_and_by_torch_are_the_same_net(activation, weight_variance):
    ours, theirs = twins(depth=4, width=16, activation=activation, weight_variance=weight_variance)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x, y = torch.randn(8, 20, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    RULES["cross_entropy"].apply(ours.double()(x.double()), y).backward()
    nn.functional.cross_entropy(theirs.double()(x.double()), y).backward()
    near = 1e-6 if activation == "hardsigmoid" else 1e-12  # torch's own takes 1/6 in float32
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=near, atol=1e-15)


def test_by_torch_is_made_of_torchs_modules_only():
    assert all(type(m).__module__.startswith("torch.") for m in twins(depth=3)[1].modules())


def test_three_steps_equal_a_plain_torch_loop():
    config = ModelConfig(depth=3, width=16, activation="tanh")
    ours, theirs = (build(config, 20, 4, seed=1).double() for _ in range(2))
    plain = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), theirs.state_dict().values(), strict=True)))
    x, y = torch.randn(12, 20, generator=torch.Generator().manual_seed(0)).double(), torch.arange(12) % 4
    losses = []
    for net, loss in ((ours, RULES["cross_entropy"].apply), (plain, nn.functional.cross_entropy)):
        optimizer = torch.optim.SGD(net.parameters(), 0.5, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            value = loss(net(x), y)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-12)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("name", "variance", "bias"), [("he", 2.0, 0.0), ("torch", 1 / 3, 1 / 3)])
def test_weights_have_the_variance_they_claim(name, variance, bias):
    net = build(ModelConfig(depth=2, width=500, weight_variance=name), 400, 10, seed=0)
    W, b = net.linear1.weight, net.linear1.bias
    assert W.var().item() * 400 == pytest.approx(variance, rel=0.02)
    assert b.var().item() * 400 == pytest.approx(bias, rel=0.15, abs=1e-12)
    if name == "torch":
        assert W.abs().max().item() <= 1 / math.sqrt(400)


def test_the_seed_alone_decides():
    a, b, c = (build(ModelConfig(depth=2, width=8), 6, 3, seed=s).linear1.weight for s in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_building_draws_nothing_from_the_global_stream():
    before = torch.get_rng_state()
    twins(depth=3)
    assert torch.equal(before, torch.get_rng_state())


def test_one_layer_is_a_linear_classifier():
    assert [name for name, _ in build(ModelConfig(depth=1), 6, 3, seed=0).named_children()] == ["linear1"]


@pytest.mark.parametrize("option", ["name", "activation", "weight_variance", "backward"])
def test_an_unknown_name_is_refused_with_what_is_known(option):
    with pytest.raises(UsageError, match=rf"model\.{option}=nonsuch: unknown; known: "):
        build(ModelConfig(**{option: "nonsuch"}), 6, 3, seed=0)
