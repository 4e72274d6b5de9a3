"""assert_healthy: what it says of a sick net, and that it leaves everything as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bpdiag
from bpdiag.config import UsageError

torch.set_num_threads(1)


def mlp(*last, act=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 3), *last)


G = torch.Generator().manual_seed(0)
BATCH = torch.randn(32, 8, generator=G), torch.randint(3, (32,), generator=G)
LOSSES = {
    "torch's function": F.cross_entropy,
    "torch's module": nn.CrossEntropyLoss(),
    "of output and targets": lambda out, y: F.cross_entropy(out, y),
    "of model and batch": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_sick_net_fails_with_its_finding_and_a_healthy_one_passes(loss):
    bpdiag.assert_healthy(mlp(), BATCH, loss)
    with pytest.raises(AssertionError, match=r"a softmax stands before cross-entropy.*Remedy: give cross-entropy"):
        bpdiag.assert_healthy(mlp(nn.Softmax(1)), BATCH, loss)


def test_the_optimizer_given_is_the_one_judged():
    model = mlp()
    bpdiag.assert_healthy(model, BATCH, F.cross_entropy, torch.optim.Adam(model.parameters(), 1e-3))
    with pytest.raises(AssertionError, match="Nothing moves"):
        bpdiag.assert_healthy(model, BATCH, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.0))
    with pytest.raises(AssertionError, match="are in no optimizer"):
        bpdiag.assert_healthy(nn.Sequential(mlp(), nn.Linear(3, 3)), BATCH, F.cross_entropy, replaced(model))


def rate(model, lr, kind=torch.optim.SGD):
    return kind(model.parameters(), lr)


def test_a_rate_too_small_for_any_training():
    model = mlp()
    with pytest.raises(AssertionError, match="Nothing moves: over 100,000 steps"):
        bpdiag.assert_healthy(model, BATCH, F.cross_entropy, rate(model, 3e-8))
    with pytest.raises(AssertionError, match="Nothing moves: over 100,000 steps"):
        bpdiag.assert_healthy(model, BATCH, F.cross_entropy, rate(model, 1e-8, torch.optim.Adam))
    bpdiag.assert_healthy(model, BATCH, F.cross_entropy, rate(model, 1e-4))  # slow: not for so long
    bpdiag.assert_healthy(model, BATCH, F.cross_entropy, rate(model, 1e-6, torch.optim.Adam))


def replaced(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def test_nothing_of_the_user_is_touched():
    model = mlp(nn.Dropout(0.5)).train()
    model.append(nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x, y = BATCH
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    drawn = torch.get_rng_state()
    bpdiag.assert_healthy(model, BATCH, LOSSES["of output and targets"], optimizer, steps=3)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert str((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()])) == str(state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_loss_of_anything():
    """A batch that is no pair is the loss's own."""
    bpdiag.assert_healthy(mlp(), {"x": BATCH[0], "y": BATCH[1]}, lambda m, b: F.cross_entropy(m(b["x"]), b["y"]))


def test_what_cannot_be_tried_is_refused():
    with pytest.raises(UsageError, match="steps=0"):
        bpdiag.assert_healthy(mlp(), BATCH, F.cross_entropy, steps=0)
    model = mlp()
    model.cache = model(BATCH[0])  # a tensor of a graph takes no copy
    with pytest.raises(UsageError, match="Sequential cannot be copied: Only Tensors created explicitly"):
        bpdiag.assert_healthy(model, BATCH, F.cross_entropy)
    x = (BATCH[0].requires_grad_() * 1, BATCH[1])
    BATCH[0].requires_grad_(False)
    with pytest.raises(UsageError, match="batch: it cannot be copied: Only Tensors created explicitly"):
        bpdiag.assert_healthy(mlp(), x, F.cross_entropy)
    for optimizer in (None, rate(model := mlp(), 0.1)):
        with pytest.raises(UsageError, match="nothing to train: all 6 parameters are frozen"):
            bpdiag.assert_healthy(model.requires_grad_(False), BATCH, F.cross_entropy, optimizer)
    with pytest.raises(UsageError, match="nothing to train: it has no parameters"):
        bpdiag.assert_healthy(nn.ReLU(), BATCH, F.cross_entropy)


class Dictionary(nn.ModuleDict):
    """A model that can be asked for its parts by name, and answers with a dict."""

    def __init__(self):
        super().__init__({"net": mlp()})

    def forward(self, x):
        return {"logits": self["net"](x)}


def test_a_loss_of_outputs_by_name_is_no_loss_of_the_models_parts():
    bpdiag.assert_healthy(Dictionary(), BATCH, lambda out, y: F.cross_entropy(out["logits"], y))
    with pytest.raises(UsageError, match=r"either way: as loss.* KeyError: 'logit', as loss.* KeyError: 'logit'"):
        bpdiag.assert_healthy(Dictionary(), BATCH, lambda out, y: F.cross_entropy(out["logit"], y))


def test_what_goes_wrong_in_a_loss_is_told():
    with pytest.raises(TypeError, match="unsupported operand"):  # its own error, not that of another way to call it
        bpdiag.assert_healthy(mlp(), BATCH, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) + "1")
    with pytest.raises(
        UsageError, match=r"either way: as loss.model, batch. TypeError: tuple indices must be integers"
    ):
        bpdiag.assert_healthy(mlp(), BATCH, lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]))
    with pytest.raises(UsageError, match="one number that has a gradient; got a float"):
        bpdiag.assert_healthy(mlp(), BATCH, lambda model, batch: model(batch[0]).sum().item())
    with pytest.raises(UsageError, match=r"one number .*got a tensor of shape \(32, 3\) with a gradient"):
        bpdiag.assert_healthy(mlp(), BATCH, lambda out, y: out)
