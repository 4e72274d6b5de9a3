"""Norms of weights, gradients and updates where float32 squares them and where it cannot.  Oracle: float64."""

import math

import pytest
import torch
from torch import nn

from bpdiag import watch

torch.set_num_threads(1)

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def told(scale_weights=lambda step: 1.0, scale_loss=lambda step: 1.0, lr=0.1, steps=4):
    """(measured, true) of a step's numbers, one pair a step; weights and losses are scaled before it."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 300), nn.Linear(300, 2))
    optimizer, truths = torch.optim.SGD(model.parameters(), lr=lr), []
    with watch(model, optimizer) as watching:
        for step in range(steps):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(scale_weights(step))
            optimizer.zero_grad()
            (model(X).sum() * scale_loss(step)).backward()
            before, g = model[0].weight.detach().double(), model[0].weight.grad.double()
            optimizer.step()
            after = model[0].weight.detach().double()
            truths.append({"W_rms": rms(before), "g_W_norm": float(g.norm()), "dW_rms": rms((after - before).float())})
    rows = [r for r in watching.trace.to_arrow().to_pylist() if r["layer"] == "0"]
    return [({k: r[k] for k in truth}, truth) for r, truth in zip(rows, truths, strict=True)], watching.trace


def rms(x):
    return float(x.double().square().mean().sqrt())


def check(pairs):
    for measured, true in pairs:
        assert measured == {k: pytest.approx(v, rel=1e-6, abs=0) for k, v in true.items()}


def test_every_step_is_right_in_ordinary_size():
    pairs, trace = told()
    check(pairs)
    assert not [m for m in trace.missing if m.column.startswith(("W", "g_W", "dW"))]


@pytest.mark.parametrize("jump", [1e-25, 1e25])
def test_weights_that_jump_near_the_ends_of_float32(jump):
    """Float32's own squares would be 0 or infinite: the twin."""
    pairs, _ = told(scale_weights=lambda step: jump if step == 2 else 1.0, lr=1e-30)
    sizes = [measured["W_rms"] for measured, _ in pairs]
    assert 0 < sizes[2] / sizes[1] / jump < 1.01
    assert (torch.full((300,), sizes[2]).square().sum().item() in (0.0, math.inf)) is True
    for measured, true in pairs:
        assert measured["W_rms"] == pytest.approx(true["W_rms"], rel=1e-6)


@pytest.mark.parametrize("jump", [1e-25, 1e-38, 1e20])
def test_gradients_that_jump(jump):
    pairs, _ = told(scale_loss=lambda step: jump if step == 2 else 1.0, lr=1e-25)
    assert pairs[2][1]["g_W_norm"] / pairs[1][1]["g_W_norm"] == pytest.approx(jump, rel=0.01)
    check(pairs)


def test_an_update_of_nothing_is_zero_and_not_missing():
    pairs, _ = told(lr=0.0)
    assert [measured["dW_rms"] for measured, _ in pairs] == [0.0] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite(value):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as watching:
        for step in range(3):
            if step == 2:
                with torch.no_grad():
                    model[0].weight[1, 1] = value
            optimizer.zero_grad()
            model(X).sum().backward()
            optimizer.step()
    sizes = [r["W_rms"] for r in watching.trace.to_arrow().to_pylist() if r["layer"] == "0"]
    assert [math.isfinite(size) for size in sizes] == [True, True, False]


def test_a_gradient_that_is_gone_is_missing_rather_than_wrong():
    def spend(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.zero_()

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    optimizer.register_step_post_hook(spend)  # before the watcher has read
    with watch(model, optimizer) as watching:
        for factor in (1.0, 1.0, 1e-30, 1e-30):
            (model(X).sum() * factor).backward()
            optimizer.step()
    rows = [r["g_W_norm"] for r in watching.trace.to_arrow().to_pylist() if r["layer"] == "0"]
    assert rows[2] is None
    assert rows[3] == pytest.approx(rows[1] * 1e-30, rel=1e-5)
    reasons = {(m.column, m.from_step, m.reason) for m in watching.trace.missing if m.layer == "0" and m.from_step == 2}
    assert ("g_W_norm", 2, "it came near the ends of float32: told from the next sample on") in reasons


def test_a_group_added_while_it_is_watched_is_measured_from_then_on():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    optimizer, truth = torch.optim.SGD(model[2].parameters(), lr=0.1), []
    with watch(model, optimizer) as watching:
        for step in range(4):
            if step == 2:
                model[0].requires_grad_(True)
                optimizer.add_param_group({"params": model[0].parameters()})
            optimizer.zero_grad()
            model(X).square().mean().backward()
            before = model[0].weight.detach().double()
            optimizer.step()
            truth.append(rms((model[0].weight.detach().double() - before).float()) / rms(before))
    told = [row["update_ratio"] for row in watching.trace.to_arrow().to_pylist() if row["layer"] == "0"]
    assert told == pytest.approx(truth, rel=1e-6)
    assert told[1] == 0 < told[2]
