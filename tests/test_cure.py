"""Remedies for models of anybody's: nothing of the caller's is touched, and what is pasted does what was promised."""

from __future__ import annotations

import itertools
import math
import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bpdiag
from bpdiag.config import UsageError
from bpdiag.diagnosis import Finding
from bpdiag.remedy import candidate, snippets, surgery
from bpdiag.remedy.cure import Subject
from bpdiag.remedy.trial import Randomness, seeded

DRAW = torch.Generator().manual_seed(5)
Y = torch.randint(4, (96,), generator=DRAW)
X = torch.randn(4, 20, generator=DRAW)[Y] + 0.3 * torch.randn(96, 20, generator=DRAW)
BATCHES = [(X[:48], Y[:48]), (X[48:], Y[48:])]


def finding(kind: str, cause: str = "") -> Finding:
    return Finding(kind, "harm", (), 0, cause, {}, 1.0, "", "", "")


def mlp(act=nn.Sigmoid, depth=8, width=24):
    widths = [20] + [width] * (depth - 1)
    hidden = [m for n, k in itertools.pairwise(widths) for m in (nn.Linear(n, k), act())]
    return nn.Sequential(*hidden, nn.Linear(width, 4))


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def cure(make=mlp, data=BATCHES, loss=loss, make_optimizer=sgd, findings=None, **more):
    return bpdiag.cure(make, data, loss, make_optimizer, findings, **{"steps": 60, **more})


def names(told):
    return {remedy.name for remedy in told.remedies}


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- it mends ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told():
    return cure()


def pasted(change, seed, steps):
    """A user's own loop with the lines where their comments say."""
    torch.manual_seed(seed)
    lines = change.splitlines()
    assert len(lines) <= 3
    names = {"bpdiag": bpdiag, "torch": torch, "model": mlp(), "loss": loss, "batch": BATCHES[0]}
    for line in lines:
        if "#" not in line:
            exec(line, names)
    names["optimizer"] = sgd(names["model"])
    for line in lines:
        if "after the optimizer is made" in line:
            exec(line, names)
    lost = []
    for batch in itertools.islice(itertools.cycle(BATCHES), steps):
        names["optimizer"].zero_grad()
        lost.append(loss(names["model"], batch))
        lost[-1].backward()
        for line in lines:
            if "between" in line:
                exec(line, names)
        names["optimizer"].step()
        for line in lines:
            if "after optimizer.step" in line:
                exec(line, names)
    return float(torch.stack(lost[-6:]).detach().mean())


def test_the_lines_pasted_into_a_loop_reach_what_was_promised(told):
    best = told.recommended
    assert best.verdict == "works"
    assert best.overrides == []
    assert best.before["loss"] > 1.2  # guessing costs 1.39
    assert best.after["loss"] < best.before["loss"] / 2
    for seed in (21, 22):
        assert pasted(best.change, seed, best.steps) < best.after["loss"] + 0.3
    assert pasted("", 21, best.steps) > 1.2  # without them it does not learn


def test_torchs_own_losses_are_taken_as_they_are():
    subjects = [Subject(mlp, BATCHES, one, sgd, 60) for one in (loss, cross_entropy, nn.CrossEntropyLoss())]
    told = []
    for subject in subjects:
        subject.start(None, 0).step(lambda lost: told.append(float(lost.detach())) or lost)
    assert told[0] == told[1] == told[2]


def test_a_table_and_a_dictionary_come_of_it(told):
    assert told.recommended.change in str(told)
    assert told.to_dict()["remedies"][0]["recommended"]


def test_a_healthy_training_gets_none():
    fine = cure(lambda: mlp(nn.ReLU, depth=3))
    assert fine.remedies == []
    assert "nothing was found" in fine.notes[0]


def test_clipped_output_is_set_free():
    found = cure(lambda: nn.Sequential(*mlp(nn.Tanh, 3), nn.ReLU()), findings=[finding("loss_interface")])
    assert "no ReLU on the output" in names(found)
    assert found.recommended is None or found.recommended.verdict == "works"


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = [nn.Linear(20, 20) for _ in range(3)], nn.Linear(20, 4)

    def forward(self, x):
        for layer in self.hidden:
            x = layer(x).tanh()
        return self.head(x)


def test_lists_of_modules_are_registered_and_owned():
    net = Listed()
    assert len(list(net.parameters())) == 2
    surgery.register(net)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    surgery.own(optimizer, net)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in net.parameters()}
    assert len(list(net.parameters())) == 8
    with pytest.raises(UsageError, match="no module of the model keeps others"):
        surgery.register(net)
    assert "lists of modules registered" in names(cure(Listed, findings=[finding("disconnected")]))


def test_gradients_that_were_never_cleared_stay_uncleared_until_they_are_mended():
    subject = Subject(mlp, BATCHES, loss, sgd, 60)
    subject.clears = False
    kept = subject.start(None, 0)
    clear = snippets.candidates(kept.model, kept.optimizer, BATCHES[0], None, [finding("stale_gradient")])[0]
    mended = subject.start(clear, 0)
    norms = []
    for training in (kept, mended):
        for _ in range(3):
            training.step(lambda lost: lost)
        norms.append(float(training.model[-1].bias.grad.norm()))
    assert clear.name == "gradients cleared"
    assert norms[0] > 1.5 * norms[1]


# ---- changes of a model -------------------------------------------------------------------------------------------


def measured(model):
    """|g_z_l| / |g_z_{l+1}| by autograd.grad alone."""
    zs = []
    handles = [m.register_forward_hook(lambda m, i, o: zs.append(o)) for m in model if isinstance(m, nn.Linear)]
    norms = [float(g.norm()) for g in torch.autograd.grad(loss(model, BATCHES[0]), zs)]
    for handle in handles:
        handle.remove()
    return [a / b for a, b in itertools.pairwise(norms)]


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.GELU])
def test_rescaled_gains_are_1(act):
    torch.manual_seed(0)
    net = mlp(act)
    assert min(measured(net)) < 0.8
    surgery.rescale(net, BATCHES[0], loss)
    assert measured(net) == pytest.approx([1.0] * 7, rel=0.12)
    assert all(p.grad is None for p in net.parameters())


def test_a_net_that_overflows_is_rescaled_too():
    net = mlp(nn.ReLU, depth=40)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=30)
    assert not loss(net, BATCHES[0]).isfinite()
    surgery.rescale(net, BATCHES[0], loss)
    assert measured(net) == pytest.approx([1.0] * 39, rel=0.12)


def test_orthogonal_weights_have_equal_singular_values():
    net = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 4))
    surgery.orthogonal(net)
    assert torch.linalg.svdvals(net[0].weight.detach()) == pytest.approx(torch.ones(30), abs=1e-4)
    assert float(net[0].bias.detach().abs().max()) == 0


def test_norms_stand_behind_all_layers_but_the_last():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 5), nn.ReLU(), nn.Linear(5, 2))
    surgery.normalize(net)
    assert [type(m).__name__ for m in net[0]] == ["Conv2d", "BatchNorm2d"]
    assert [type(m).__name__ for m in net[3]] == ["Linear", "LayerNorm"]
    assert isinstance(net[5], nn.Linear)
    assert net(torch.randn(2, 1, 4, 4)).shape == (2, 2)


class Chain(nn.Module):
    """A list of layers, of which one changes the width."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 4)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).tanh()
        return self.layers[-1](x)


def test_a_residual_block_adds_its_share_to_what_comes_in():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4)
    )
    a = net[1](net[0](X))
    b = a + net[4](net[3](net[2](a))) / math.sqrt(2)
    right = net[6](b + net[5](b) / math.sqrt(2))
    count = len(list(net.parameters()))
    surgery.residual(net)
    assert torch.allclose(net(X), right, atol=1e-6)
    assert len(list(net.parameters())) == count

    chain = Chain()
    x = X
    for layer in chain.layers[:-1]:
        x = (x + layer(x) / math.sqrt(2)).tanh()
    right = chain.layers[-1](x)
    surgery.residual(chain)
    assert torch.allclose(chain(X), right, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "is_one"),
    [
        (nn.Conv2d(3, 3, 3, padding=1), True),
        (nn.Conv2d(3, 3, 3, padding="same"), True),
        (nn.Conv2d(3, 3, 3, padding=2, dilation=2), True),
        (nn.Conv2d(3, 3, 3), False),
        (nn.Conv2d(3, 3, 3, padding="valid"), False),
        (nn.Conv2d(3, 3, 3, padding=1, stride=2), False),
        (nn.Conv2d(3, 4, 1), False),
        (nn.ConvTranspose2d(3, 3, 1), False),
        (nn.Linear(6, 5), False),
    ],
)
def test_what_changes_the_shape_is_no_block(layer, is_one):
    net = nn.Sequential(layer)
    assert len(list(surgery.blocks(net))) == is_one
    if is_one:
        assert net(torch.randn(2, 3, 6, 6)).shape == (2, 3, 6, 6)
    else:
        with pytest.raises(UsageError, match="no block of the model"):
            surgery.residual(net)


def test_a_gradient_passes_through_residual_blocks():
    torch.manual_seed(0)
    net, ratios = mlp(depth=12), []
    for _ in range(2):
        first, *_, last = torch.autograd.grad(loss(net, BATCHES[0]), list(net.parameters()))
        ratios.append(float(first.norm() / last.norm()))
        if len(ratios) == 1:
            surgery.residual(net)
    assert ratios[0] < 1e-5
    assert ratios[1] > 0.1


class Shares(nn.Module):
    """Probabilities, from a softmax that is no module."""

    def __init__(self):
        super().__init__()
        self.net = mlp(nn.ReLU, 3)

    def forward(self, x):
        return self.net(x).softmax(1)


def test_the_logarithm_of_probabilities_is_what_cross_entropy_wants():
    torch.manual_seed(0)
    net = Shares()
    subject = Subject(lambda: Shares(), BATCHES, loss, sgd, 60)
    (log,) = [c for c in subject.candidates([finding("loss_interface")]) if "log" in c.name]
    right = cross_entropy(net.net(BATCHES[0][0]), BATCHES[0][1]).detach()
    assert abs(loss(net, BATCHES[0]).item() - right) > 0.01  # the softmax of a softmax
    exec(log.change, {"model": net})
    assert loss(net, BATCHES[0]).item() == pytest.approx(float(right), rel=1e-6)
    with torch.no_grad():
        net.net[-1].bias[0] = 500.0  # all other shares are 0
    loss(net, BATCHES[0]).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    logits = Subject(lambda: mlp(nn.ReLU, 3), BATCHES, loss, sgd, 60).candidates([finding("loss_interface")])
    assert not any("log" in c.name for c in logits)


def test_a_slow_model_gets_fewer_steps_and_that_is_said(monkeypatch):
    subject = Subject(mlp, BATCHES, loss, sgd, 200)
    clock = itertools.count(step=0.1)  # of seconds: a step takes 0.1
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert subject.affordable(200, 80.0) == 100
    assert subject.notes == ["100 steps a trial, not 200: one takes 0.1 s, and 80 s are there"]
    assert subject.affordable(200, 1.0) == 50
    subject.notes.clear()
    assert subject.affordable(200, 1000.0) == 200
    assert subject.notes == []


class Everything(nn.Module):
    """Has whatever a candidate could change."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(20, 2, 16, dropout=0.1, batch_first=True)
        self.spare, self.bend, self.head, self.end = [nn.Linear(20, 20)], nn.Sigmoid(), nn.Linear(20, 4), nn.ReLU()
        self.more = nn.Sequential(nn.Linear(20, 20), nn.Tanh())

    def forward(self, x):
        return self.end(self.head(self.more(self.bend(self.block(x[:, None])[:, 0]))))


def test_every_candidate_is_three_lines_or_fewer_and_runs():
    def make_optimizer(model):
        return torch.optim.AdamW([{"params": [p]} for p in model.parameters()], eps=1e-3, weight_decay=0.5)

    subject = Subject(Everything, BATCHES, loss, make_optimizer, 60)
    found = subject.candidates([finding(kind) for kind in candidate.GROUPS])
    found += snippets.candidates(mlp().bfloat16(), sgd(mlp()), BATCHES[0], None, [finding("precision")])
    assert {c.level for c in found} == set(candidate.LEVELS)
    for c in [*found, *candidate.pairs(found[:3], found[-3:])]:
        assert len(c.change.splitlines()) <= 3, c
        training = subject.start(c, 0)
        training.step(lambda lost: lost)
        training.step(lambda lost: lost)


# ---- nothing of the caller's is touched ----------------------------------------------------------------------------


def randomness():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


def test_model_data_and_random_numbers_of_the_caller_are_untouched():
    torch.manual_seed(3)
    net = mlp()
    optimizer, before, x = sgd(net), bits(net), X.clone()
    loss(net, BATCHES[0]).backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    state = randomness()
    given = cure(net)
    assert "seeds differ in the order of the data alone" in given.notes[0]
    shared = cure(lambda: net, findings=[finding("linear_stack")])
    assert "the same model each time" in shared.notes[0]
    after = randomness()
    assert torch.equal(state[0], after[0])
    assert state[1:] == after[1:]
    assert same(before, bits(net))
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert not optimizer.state
    assert torch.equal(X, x)
    assert not any(m._forward_hooks or m._backward_hooks for m in net.modules())


def test_the_comparison_can_fail():
    net = mlp()
    before, state = bits(net), randomness()
    torch.rand(1)
    with torch.no_grad():
        net[0].weight[0, 0] += 1e-6
    assert not same(before, bits(net))
    assert not torch.equal(state[0], randomness()[0])


def test_a_stream_goes_on_where_it_stopped():
    with seeded(4):
        whole = torch.rand(4), [random.random() for _ in range(4)], np.random.rand(4)
    stream, parts = Randomness(4), []
    for _ in range(2):
        with stream.going_on():
            parts.append((torch.rand(2), [random.random() for _ in range(2)], np.random.rand(2)))
        torch.rand(7)
    assert torch.equal(torch.cat([p[0] for p in parts]), whole[0])
    assert parts[0][1] + parts[1][1] == whole[1]
    assert np.concatenate([p[2] for p in parts]).tolist() == whole[2].tolist()


def test_trials_of_one_seed_are_equal_to_the_bit():
    def make():
        return nn.Sequential(nn.Linear(20, 8), nn.Dropout(0.5), nn.Linear(8, 4))

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 32, shuffle=True)
    subject = Subject(make, loader, loss, sgd, 60)
    one, other = subject.start(None, 1), subject.start(None, 1)
    for _ in range(7):  # taking turns, over the end of the data
        one.step(lambda lost: lost)
        other.step(lambda lost: lost)
    assert same(bits(one.model), bits(other.model))
    different = subject.start(None, 2)
    for _ in range(7):
        different.step(lambda lost: lost)
    assert not same(bits(one.model), bits(different.model))


# ---- bad input -------------------------------------------------------------------------------------------------------


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle 'generator' object")


def strangers(model):
    return torch.optim.SGD(mlp().parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"make": 3}, "make_model: a function that makes a model, or a model; got int"),
        ({"make": lambda: 3}, "make_model gives a int"),
        ({"make": Uncopied(20, 4)}, "the model cannot be copied .cannot pickle 'generator' object.; give a make_model"),
        ({"data": 3}, "data: it must be batches to go through; got int"),
        ({"data": []}, "data: there is no batch in it"),
        ({"data": BATCHES[0]}, r"this is one batch; write \[batch\]"),
        ({"data": X}, r"this is one batch; write \[batch\]"),
        ({"loss": lambda model, batch: model(batch[0])}, "it must give one number that has a gradient"),
        ({"make_optimizer": lambda model: 3}, "make_optimizer gives a int"),
        (
            {"make": lambda: mlp().requires_grad_(False)},
            "nothing to train: of its 16 parameters none asks for a gradient",
        ),
        ({"make_optimizer": strangers}, "holds no parameter of the model that it is given"),
        ({"steps": 49}, "steps=49: too few"),
        ({"seconds": 0}, "seconds=0: no time to try anything"),
    ],
)
def test_bad_input_gets_one_line(given, message):
    with pytest.raises(UsageError, match=message) as caught:
        cure(**given)
    assert "\n" not in str(caught.value)


def test_a_model_made_otherwise_each_time_is_made_once_and_that_is_said():
    secret = torch.Generator().manual_seed(0)

    def make():
        net = mlp()
        with torch.no_grad():
            net[0].weight.normal_(generator=secret)
        return net

    assert "other weights from the same seed" in cure(make, findings=[finding("linear_stack")]).notes[0]
    assert not any("other weights" in note for note in cure(findings=[finding("linear_stack")]).notes)


def test_data_that_cannot_be_read_twice_are_kept():
    told = cure(data=(batch for batch in BATCHES * 40))
    assert "their first 60 batches were kept" in told.notes[0]
    assert told.recommended


def test_a_change_that_the_model_refuses_stops_no_other():
    class Proud(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.bend, self.head = nn.Linear(20, 20), nn.Sigmoid(), nn.Linear(20, 4)

        def forward(self, x):
            assert self.layer.weight.shape == (20, 20)
            return self.head(self.bend(self.layer(x)))

    told = cure(Proud, findings=[finding("vanishing")])
    assert any("norms behind the layers could not be tried: AttributeError" in note for note in told.notes)
    assert len(told.remedies) > 8


def test_no_time_is_said():
    told = cure(seconds=1e-9, findings=[finding("vanishing")])
    assert "no time left" in told.notes[-1]
    assert told.recommended is None


def test_an_accuracy_is_counted_where_there_are_answers():
    subject = Subject(lambda: mlp(nn.ReLU, 3), BATCHES, loss, sgd, 60)
    training = subject.start(None, 0)
    assert math.isnan(training.accuracy())
    for _ in range(40):
        training.step(lambda lost: lost)
    last = training.model(BATCHES[1][0]).argmax(-1)
    assert training.accuracy() == pytest.approx(float((last == BATCHES[1][1]).float().mean()), abs=0.05)

    def square(model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square().mean()

    real = Subject(lambda: mlp(nn.ReLU, 3), [(X, X[:, 0])], square, sgd, 60).start(None, 0)
    real.step(lambda lost: lost)
    assert math.isnan(real.accuracy())
