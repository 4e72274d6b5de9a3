"""What was not seen is listed with its reason; what was is not."""

import pytest
import torch
from torch import nn

from bpdiag import Trace, diagnosis, watch

torch.set_num_threads(1)

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Attention, a fused recurrent layer, a spare layer, a target read without gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head, self.spare, self.target = nn.Linear(16, 2), nn.Linear(3, 3), nn.Linear(16, 2)
        self.same = nn.Identity()

    def forward(self, x):
        with torch.no_grad():
            self.target(x)
        return self.head(self.lstm(self.body(x))[0])


def listed(model, parameters, tmp_path=None):
    """name -> reason."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with watch(model, optimizer, log=tmp_path and tmp_path / "run") as watching:
        for _ in range(2):
            model(X).square().mean().backward()
            optimizer.step()
    told = Trace.load(tmp_path / "run") if tmp_path else watching.trace
    return {line["name"]: line["reason"] for line in told.meta["unseen"]}, told


def test_each_with_its_reason(tmp_path):
    model = Net()
    told, trace = listed(model, model.parameters(), tmp_path)
    assert told == {
        "body.self_attn": "fused: not visible inside",
        "body.self_attn.out_proj": "never called as a module: another one uses its parameters itself",
        "lstm": "fused: not visible inside",
        "spare": "never called",
        "target": "called without gradient only",
    }
    assert "module spare: never called" in diagnosis.notes(trace)
    assert "modules body.self_attn, lstm: fused: not visible inside" in diagnosis.notes(trace)


def test_parameters_that_nobody_updates_or_owns():
    model = Net()
    told, _ = listed(model, [*model.body.parameters(), *model.lstm.parameters(), nn.Parameter(torch.ones(3, 4))])
    never = "in no optimizer, so never updated"
    assert {name for name, reason in told.items() if reason == never} == {
        f"{layer}.{what}" for layer in ("head", "spare", "target") for what in ("weight", "bias")
    }
    assert told["of shape (3, 4)"].startswith("in an optimizer, in no module of the model")


def test_a_head_replaced_after_the_optimizer_was_made():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5))
    parameters = list(model.parameters())
    model[2] = nn.Linear(8, 2)
    told, _ = listed(model, parameters)
    assert set(told) == {"2.weight", "2.bias", "of shape (5, 8)", "of shape (5,)"}


def test_a_frozen_parameter_is_in_no_need_of_an_optimizer():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    assert listed(model, model[2].parameters())[0] == {}


@pytest.mark.parametrize("log", [True, False])
def test_of_a_model_that_was_seen_whole_nothing_is_listed(log, tmp_path):
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    assert listed(model, model.parameters(), tmp_path if log else None)[0] == {}
