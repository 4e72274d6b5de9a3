"""Our modules against torch's own, of which each is a subclass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bpdiag import modules
from bpdiag.modules import BACKWARDS, Residual, Sum

PAIRS = {
    "linear": (modules.Linear, nn.Linear, (6, 4), (5, 6)),
    "conv": (modules.Conv2d, nn.Conv2d, (3, 4, 3, 2, 1), (5, 3, 7, 8)),
    "layer_norm": (modules.LayerNorm, nn.LayerNorm, (6,), (5, 6)),
    "layer_norm_of_pictures": (modules.LayerNorm, nn.LayerNorm, ((3, 4, 4),), (5, 3, 4, 4)),
    "batch_norm": (modules.BatchNorm1d, nn.BatchNorm1d, (6,), (5, 6)),
    "batch_norm_of_pictures": (modules.BatchNorm2d, nn.BatchNorm2d, (3,), (5, 3, 4, 4)),
    "max_pool": (modules.MaxPool2d, nn.MaxPool2d, (2,), (5, 3, 7, 8)),
    "flatten": (modules.Flatten, nn.Flatten, (), (5, 3, 2, 2)),
}


def pair(name):
    """One of ours and one of torch's in float64, with the same weights, none of them 0 or 1."""
    ours, theirs, arguments, shape = PAIRS[name]
    net = theirs(*arguments).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=generator)
    mine = ours(*arguments).double()
    mine.load_state_dict(net.state_dict())
    return mine, net, [torch.randn(shape, generator=generator, dtype=torch.float64) + k for k in range(4)]


def step(net, x):
    """The output, and the gradients of its squares' sum, in one list."""
    x = x.clone().requires_grad_()
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]


@pytest.mark.parametrize("name", PAIRS)
def test_three_batches_in_training_and_one_in_evaluation_are_torchs(name):
    ours, theirs, batches = pair(name)
    for x in batches[:3]:
        torch.testing.assert_close(step(ours, x), step(theirs, x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(step(ours.eval(), batches[3]), step(theirs.eval(), batches[3]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_of_pictures"])
def test_a_batch_that_was_missed_would_be_seen(name):
    """The twin: running statistics and what evaluation makes of them depend on every batch."""
    ours, theirs, batches = pair(name)
    ours(batches[0])
    assert not torch.equal(ours.running_mean, theirs.running_mean)
    assert not torch.allclose(ours.eval()(batches[3]), theirs.eval()(batches[3]))


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_of_pictures"])
def test_evaluation_moves_no_running_statistic(name):
    ours, _, batches = pair(name)
    before = copy.deepcopy(ours.state_dict())
    ours.eval()(batches[0])
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("name", PAIRS)
def test_whoever_knows_torchs_module_knows_ours(name):
    ours, theirs, _ = pair(name)
    assert isinstance(ours, type(theirs))
    assert type(ours).__name__ == type(theirs).__name__
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("name", PAIRS)
def test_ours_runs_our_rule(name):
    """The twin of being torch's: the graph holds our node, torch's module leaves none of ours."""
    ours, theirs, (x, *_) = pair(name)
    rule_nodes = {f"{rule.__name__}Backward" for rule in modules.RULES.values()}
    assert ours(x.requires_grad_()).grad_fn.name() in rule_nodes
    assert theirs(x).grad_fn.name() not in rule_nodes


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_sum_by_hand(by_hand):
    """a = s + beta f at s = (1, 2), f = (10, -4), beta = .5; a cotangent (3, 5) gives (3, 5) and (1.5, 2.5)."""
    skip, branch = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([10.0, -4.0], requires_grad=True)
    a = Sum(0.5, by_hand)(skip, branch)
    assert a.tolist() == [6.0, 0.0]
    g = torch.autograd.grad(a, [skip, branch], torch.tensor([3.0, 5.0]))
    assert [t.tolist() for t in g] == [[3.0, 5.0], [1.5, 2.5]]


def test_a_sum_adds_what_entered_its_own_layer():
    """x = 1: first layer 2 x = 2; block 2 + .5 (3 * 2) = 5; block 5 + .5 (4 * 5) = 15; head 10 * 15; slope 150."""

    def times(weight):
        module = nn.Linear(1, 1, bias=False)
        nn.init.constant_(module.weight, weight)
        return module

    layers = [
        {"one": times(2.0)},
        {"two": times(3.0), "sum2": Sum(0.5)},
        {"three": times(4.0), "sum3": Sum(0.5)},
        {"head": times(10.0)},
    ]
    net, x = Residual(layers), torch.ones(1, 1, requires_grad=True)
    assert [name for name, _ in net.named_children()] == ["one", "two", "sum2", "three", "sum3", "head"]
    y = net(x)
    assert y.item() == 150
    y.backward()
    assert x.grad.item() == 150
    assert copy.deepcopy(net)(x).item() == 150


def test_both_kits_hold_the_same_parts():
    ours, theirs = BACKWARDS["handwritten"], BACKWARDS["autograd"]
    for part in ("linear", "conv", "layer_norm", "max_pool", "flatten"):
        assert issubclass(getattr(ours, part), getattr(theirs, part))
    assert all(issubclass(ours.batch_norm[n], theirs.batch_norm[n]) for n in (1, 3))
