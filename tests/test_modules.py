"""Our modules against torch's own, of which each is a subclass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bpdiag import modules
from bpdiag.modules import BACKWARDS, Residual, Sum

WALK = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 3}
POOL = {"stride": (1, 3), "padding": 1, "dilation": 2, "ceil_mode": True}
# name: torch's class, what it needs, settings other than its defaults, the shape of x
PAIRS = {
    "linear": (nn.Linear, (6, 4), {}, (5, 6)),
    "linear, set": (nn.Linear, (6, 4), {"bias": False}, (2, 5, 6)),
    "conv": (nn.Conv2d, (3, 4, 3), {}, (5, 3, 7, 8)),
    "conv, set": (nn.Conv2d, (6, 9, (3, 2)), {**WALK, "padding_mode": "reflect", "bias": False}, (5, 6, 7, 8)),
    "conv, same": (nn.Conv2d, (3, 4, 2), {"padding": "same", "padding_mode": "circular"}, (3, 7, 8)),
    "layer_norm": (nn.LayerNorm, (6,), {}, (5, 6)),
    "layer_norm, set": (nn.LayerNorm, (6,), {"eps": 0.5, "bias": False}, (5, 6)),
    "layer_norm, bare": (nn.LayerNorm, (6,), {"elementwise_affine": False}, (5, 6)),
    "layer_norm, pictures": (nn.LayerNorm, ((3, 4, 4),), {}, (5, 3, 4, 4)),
    "batch_norm": (nn.BatchNorm1d, (6,), {}, (5, 6)),
    "batch_norm, set": (nn.BatchNorm1d, (6,), {"eps": 0.5, "momentum": 0.75}, (5, 6, 3)),
    "batch_norm, mean of all": (nn.BatchNorm1d, (6,), {"momentum": None}, (5, 6)),
    "batch_norm, bare": (nn.BatchNorm1d, (6,), {"affine": False}, (5, 6)),
    "batch_norm, untracked": (nn.BatchNorm1d, (6,), {"track_running_stats": False}, (5, 6)),
    "batch_norm, pictures": (nn.BatchNorm2d, (3,), {}, (5, 3, 4, 4)),
    "batch_norm, pictures, set": (nn.BatchNorm2d, (3,), {"eps": 0.5, "momentum": None, "affine": False}, (5, 3, 4, 4)),
    "max_pool": (nn.MaxPool2d, (2,), {}, (5, 3, 7, 8)),
    "max_pool, set": (nn.MaxPool2d, ((2, 3),), POOL, (5, 3, 7, 8)),
    "max_pool, one sample": (nn.MaxPool2d, (2,), {}, (3, 7, 8)),
    "flatten": (nn.Flatten, (), {}, (5, 3, 2, 2)),
    "flatten, set": (nn.Flatten, (), {"start_dim": 2, "end_dim": 3}, (5, 3, 2, 2, 4)),
}
BATCH_NORMS = [name for name in PAIRS if name.startswith("batch_norm")]
TRACKED = [name for name in BATCH_NORMS if "untracked" not in name]
# those that a module looks at in its forward; of the others (bias, affine, ...) it only has or lacks a tensor
READ = {*WALK, "padding_mode", *POOL, "eps", "momentum", "start_dim", "end_dim"}
DROPPED = [(name, setting) for name, (_, _, settings, _) in PAIRS.items() for setting in settings if setting in READ]


def pair(name):
    """One of ours and one of torch's in float64, with the same weights, none of them 0 or 1; batches for both."""
    theirs, needed, settings, shape = PAIRS[name]
    net = theirs(*needed, **settings).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=generator)
    mine = getattr(modules, theirs.__name__)(*needed, **settings).double()
    mine.load_state_dict(net.state_dict())
    return mine, net, [torch.randn(shape, generator=generator, dtype=torch.float64) + k for k in range(4)]


def step(net, x):
    """The output, and the gradients of a sum of its numbers with weights of every size, in one list."""
    x = x.clone().requires_grad_()
    y = net(x)
    g = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [x, *net.parameters()], g)]


def same_in_training_and_evaluation(ours, theirs, batches):
    """Three batches in training, then one in evaluation."""
    for x in batches[:3]:
        torch.testing.assert_close(step(ours, x), step(theirs, x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(step(ours.eval(), batches[3]), step(theirs.eval(), batches[3]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PAIRS)
def test_three_batches_in_training_and_one_in_evaluation_are_torchs(name):
    same_in_training_and_evaluation(*pair(name))


@pytest.mark.parametrize(("name", "setting"), DROPPED)
def test_a_setting_that_is_dropped_is_caught(name, setting):
    """The twin: ours with one setting as torch has it by default."""
    ours, theirs, batches = pair(name)
    torchs_default = getattr(type(theirs)(*PAIRS[name][1]), setting)
    assert getattr(ours, setting) != torchs_default
    setattr(ours, setting, torchs_default)
    with pytest.raises((AssertionError, ValueError)):
        same_in_training_and_evaluation(ours, theirs, batches)


def test_every_setting_that_is_read_is_dropped_once():
    assert {setting for _, setting in DROPPED} == READ


def test_statistics_that_are_not_tracked_are_those_of_the_batch_in_evaluation_too():
    """The twin: running ones would be seen."""
    ours, theirs, batches = pair("batch_norm, untracked")
    same_in_training_and_evaluation(ours, theirs, batches)
    ours.running_mean, ours.running_var = torch.zeros(6).double(), torch.ones(6).double()
    assert not torch.allclose(ours(batches[3]), theirs(batches[3]))


@pytest.mark.parametrize("name", TRACKED)
def test_tracking_that_is_switched_off_leaves_the_running_statistics_as_they_are(name):
    """As in torch they are not moved then, and still hold in evaluation."""
    ours, theirs, batches = pair(name)
    ours(batches[0]), theirs(batches[0])
    ours.track_running_stats = theirs.track_running_stats = False
    same_in_training_and_evaluation(ours, theirs, batches)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("BatchNorm1d", (5, 6, 2, 2)), ("BatchNorm1d", (6,)), ("BatchNorm2d", (5, 6)), ("BatchNorm2d", (5, 6, 2))],
)
def test_a_shape_that_torchs_module_refuses_is_refused_in_its_words(name, shape):
    for module in (getattr(nn, name)(6), getattr(modules, name)(6)):
        with pytest.raises(ValueError, match=rf"expected .*D input \(got {len(shape)}D input\)"):
            module(torch.ones(shape))


def test_where_the_largest_stands_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^MaxPool2d: return_indices is True; expected False, or torch's own module$"):
        modules.MaxPool2d(2, return_indices=True)(torch.ones(1, 1, 2, 2))


def test_a_pool_of_two_dimensions_refuses_three():
    with pytest.raises(ValueError, match=r"^max_pool: x is .*; expected 4 dimensions"):
        modules.MaxPool2d(2)(torch.ones(1, 1, 4, 4, 4))


@pytest.mark.parametrize("name", TRACKED)
def test_a_batch_that_was_missed_would_be_seen(name):
    """The twin: running statistics and what evaluation makes of them depend on every batch."""
    ours, theirs, batches = pair(name)
    ours(batches[0])
    assert not torch.equal(ours.running_mean, theirs.running_mean)
    assert not torch.allclose(ours.eval()(batches[3]), theirs.eval()(batches[3]))


@pytest.mark.parametrize("name", BATCH_NORMS)
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


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("from_zero", [False, True])
def test_a_cell_takes_one_sample_as_torchs_does(name, from_zero):
    torch.manual_seed(0)
    ours, theirs = (BACKWARDS[by].cell[name](3, 4) for by in ("handwritten", "autograd"))
    theirs.load_state_dict(ours.state_dict())
    x, states = torch.randn(3), (torch.randn(4), torch.randn(4))
    given = () if from_zero else (states if name == "lstm" else states[0],)
    torch.testing.assert_close(ours(x, *given), theirs(x, *given))
