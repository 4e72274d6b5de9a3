"""What was not seen is listed with its reason; what was is not."""

from threading import Thread

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bpdiag import Trace, diagnosis, watch
from bpdiag.config import UsageError

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


def test_a_call_under_torch_func_is_listed_with_that_reason():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (X,)).square().mean()

    with watch(model) as watching:
        torch.func.grad(loss)(dict(model.named_parameters()))
        watching.step()
    reasons = {line["reason"] for line in watching.trace.meta["unseen"]}
    assert reasons == {"called under torch.func, whose tensors take no hooks"}


def test_a_module_that_was_handed_nothing_is_listed():
    model = nn.ModuleDict({"same": nn.Identity(), "head": nn.Linear(16, 2), "spare": nn.Identity()})
    with watch(model) as watching:
        model["same"](None)
        model["head"](X).sum().backward()
        watching.step()
    assert watching.trace.meta["unseen"] == [{"what": "module", "name": "same", "reason": "its output holds no tensor"}]


def test_another_threads_calls_are_not_mixed_in():
    """Two threads train copies of nothing: one model, one recorded step, the first caller's."""
    model, other = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2)), 2 * X
    with watch(model) as watching:
        model(X).square().mean().backward()
        thread = Thread(target=lambda: model(other).square().mean().backward())
        thread.start()
        thread.join()
        watching.step()
    alone = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    alone.load_state_dict(model.state_dict())
    with watch(alone) as expected:
        alone(X).square().mean().backward()
        expected.step()
    (first, second), (one, two) = (
        [r["g_z_norm"] for r in watched.trace.to_arrow().to_pylist()] for watched in (watching, expected)
    )
    assert (first, second) == (one, two)


def test_a_module_that_only_another_thread_calls_is_listed_so():
    model = nn.ModuleDict({"here": nn.Linear(16, 2), "there": nn.Linear(16, 2)})
    with watch(model) as watching:
        model["here"](X).sum().backward()
        thread = Thread(target=lambda: model["there"](X).sum().backward())
        thread.start()
        thread.join()
        watching.step()
    assert watching.trace.meta["unseen"] == [
        {"what": "module", "name": "there", "reason": "called from another thread only"}
    ]


class Consistent(nn.Module):
    """One layer is called with gradient and without, as for a target of itself; another in a checkpoint."""

    def __init__(self, calls):
        super().__init__()
        self.body, self.inner, self.head, self.calls = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2), calls

    def forward(self, x):
        x = self.body(x)
        if self.calls:
            with torch.no_grad():
                target = self.body(x)
            x = x - target
        return self.head(checkpoint(self.inner, x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the evaluation
def test_a_call_without_gradient_beside_one_with_is_listed():
    """A checkpoint's first call has no gradient either, and is made again; an evaluation is none of the training's."""
    for calls, expected in ((True, {"body": "called without gradient too: that has no row"}), (False, {})):
        model = Consistent(calls)
        with watch(model) as watching:
            with torch.no_grad():
                model(X)
            model(X).square().mean().backward()
            watching.step()
        assert {line["name"]: line["reason"] for line in watching.trace.meta["unseen"]} == expected


@pytest.mark.parametrize("when", ["before the step ends", "after it"])
def test_a_layer_whose_parameters_another_uses_is_told_so_after_they_are_cleared(when):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as watching:
        model(X).square().mean().backward()
        if when == "before the step ends":
            optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
        optimizer.step()
        optimizer.zero_grad()
    told = {line["name"]: line["reason"] for line in watching.trace.meta["unseen"]}
    assert told["body.self_attn.out_proj"] == "never called as a module: another one uses its parameters itself"
    assert told["spare"] == "never called"


# ---- refused by name --------------------------------------------------------------------------------------


class Quantized(nn.Linear):
    __module__ = "torch.ao.nn.quantized.modules.linear"


REFUSED = {
    "scripted": (lambda: torch.jit.script(nn.Linear(2, 2)), "scripted and takes no hooks"),
    "scripted inside": (lambda: nn.Sequential(torch.jit.script(nn.Linear(2, 2))), r"model\.0: .* is scripted"),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(2, 2)), "DataParallel runs copies in threads"),
    "quantized": (lambda: nn.Sequential(Quantized(2, 2)), r"model\.0: Quantized is quantized and has no gradient"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_what_cannot_be_watched_is_refused_by_name(name):
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(UsageError, match=message), watch(model):
        pass
    assert not any(m._forward_hooks for m in model.modules() if not isinstance(m, torch.jit.ScriptModule))


class Joined(nn.Module):
    """Two branches side by side, one cut off."""

    def __init__(self, cut):
        super().__init__()
        self.a, self.b, self.c, self.cut = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(6, 2), cut

    def forward(self, x):
        other = self.b(x).relu()
        return self.c(torch.cat([self.a(x).relu(), other.detach() if self.cut else other], 1))


@pytest.mark.parametrize("cut", [True, False])
def test_a_branch_that_no_gradient_comes_back_to_is_listed(cut):
    model = Joined(cut)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as watching:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    listed = [(line["name"], line["reason"].split(":")[0]) for line in watching.trace.meta["unseen"]]
    assert listed == ([("b", "called, and no gradient came back")] if cut else [])


def test_an_optimizer_that_never_steps_is_told():
    model = nn.Linear(4, 2)
    steps, watched = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    for given, told in ((watched, True), (steps, False)):
        with watch(model, given) as watching:
            for _ in range(3):
                steps.zero_grad()
                watching.loss(model(torch.ones(2, 4)).sum()).backward()
                steps.step()
        assert any("never stepped" in note for note in diagnosis.notes(watching.trace)) is told
