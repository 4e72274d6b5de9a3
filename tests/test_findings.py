"""Real nets with one fault each and their mended twins: the right finding, and none."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bpdiag
from bpdiag import watch

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")

G = torch.Generator().manual_seed(0)
X = torch.randn(64, 20, generator=G)
Y = (X @ torch.randn(20, 5, generator=G)).argmax(1)
T = torch.randn(64, generator=G)


def mlp(*last, n_out=5, act=nn.ReLU):
    return nn.Sequential(nn.Linear(20, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, n_out), *last)


def classify(out):
    return F.cross_entropy(out, Y)


def sgd(model, lr=0.05):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def adam(model, lr, **options):
    return torch.optim.Adam(model.parameters(), lr=lr, **options)


@dataclass
class Case:
    """A sick net, its twin, and what is found in the sick one."""

    found: tuple[str, str]  # kind, words of the cause
    sick: Callable
    mended: Callable
    steps: int = 30


def fit(model, loss=classify, optimizer=sgd, clear=True, x=X, schedule=None, planned=1000):
    """All that a run needs, made in one order from one seed."""
    return lambda: (model, loss, optimizer, clear, x, schedule, planned)


def findings(make, steps):
    torch.manual_seed(1)
    model, loss, make_optimizer, clear, x, schedule, planned = make()
    model = model() if isinstance(model, type) or not isinstance(model, nn.Module) else model
    optimizer = make_optimizer(model)
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    with watch(model, optimizer, planned_steps=planned) as watching:
        for _ in range(steps):
            if clear:
                optimizer.zero_grad()
            watching.loss(loss(model(x))).backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
    return bpdiag.diagnose(watching.trace)


class Listed(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.first, self.head = nn.Linear(20, 32), nn.Linear(32, 5)
        self.hidden = keep([nn.Linear(32, 32), nn.Linear(32, 32)])

    def forward(self, x):
        x = self.first(x).relu()
        for layer in self.hidden:
            x = layer(x).relu()
        return self.head(x)


class Way(nn.Module):
    """Two layers, something on the way, a head."""

    def __init__(self, way, grad=True):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(20, 32), nn.Linear(32, 32), nn.Linear(32, 5)
        self.way, self.grad = way, grad

    def forward(self, x):
        with torch.set_grad_enabled(self.grad):
            h = self.second(self.first(x).relu())
        return self.head(self.way(h).relu())


class Blocks(nn.Module):
    """x + scale W relu(x), with He's weights."""

    def __init__(self, depth, scale):
        super().__init__()
        self.first, self.head = nn.Linear(20, 64), nn.Linear(64, 5)
        self.inner = large(nn.ModuleList(nn.Linear(64, 64) for _ in range(depth)), 2)
        self.sums, self.act, self.scale = nn.ModuleList(Sum() for _ in range(depth)), nn.ReLU(), scale

    def forward(self, x):
        x = self.first(x)
        for layer, total in zip(self.inner, self.sums, strict=True):
            x = total(x, self.scale * layer(self.act(x)))
        return self.head(x)


class Sum(nn.Module):
    def forward(self, skip, branch):
        return skip + branch


def replaced(when):
    """The head is replaced before or after the optimizer is made."""

    def optimizer(model):
        made = sgd(model)
        if when == "after":
            model[4] = nn.Linear(32, 5)
        return made

    return optimizer


def large(model, variance):
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, (variance / layer.in_features) ** 0.5)
            nn.init.zeros_(layer.bias)
    return model


def dark():
    """Pictures whose border is always black: weights there have no gradient."""
    return X * (torch.arange(20) > 4)


def scaled(loss, by):
    """Only its gradient."""
    return loss * by + (loss * (1 - by)).detach()


def filled(model, value, layers=(0, 2, 4)):
    for i in layers:
        nn.init.constant_(model[i].weight, value)
        nn.init.zeros_(model[i].bias)
    return model


def twice(model):
    """Every hidden unit has a twin, and the layer above treats the two alike."""
    with torch.no_grad():
        for below, above in ((model[0], model[2]), (model[2], model[4])):
            for p in below.parameters():
                p[16:] = p[:16]
            above.weight[:, 16:] = above.weight[:, :16]
    return model


CASES = {
    "softmax before cross-entropy": Case(
        ("loss_interface", "softmax before the softmax"), fit(lambda: mlp(nn.Softmax(1))), fit(mlp)
    ),
    "softmax before cross-entropy, in the loss": Case(
        ("loss_interface", "softmax before the softmax"), fit(mlp, lambda out: classify(out.softmax(1))), fit(mlp)
    ),
    "sigmoid before cross-entropy": Case(
        ("loss_interface", "sigmoid before the softmax"), fit(lambda: mlp(nn.Sigmoid())), fit(mlp)
    ),
    "relu on the logits": Case(("loss_interface", "dead logits: relu"), fit(lambda: mlp(nn.ReLU())), fit(mlp)),
    "sigmoid twice": Case(
        ("loss_interface", "sigmoid before the sigmoid"),
        fit(
            lambda: mlp(nn.Sigmoid(), n_out=1),
            lambda out: F.binary_cross_entropy_with_logits(out[:, 0], (Y > 2).float()),
        ),
        fit(lambda: mlp(n_out=1), lambda out: F.binary_cross_entropy_with_logits(out[:, 0], (Y > 2).float())),
    ),
    "nll of raw outputs": Case(
        ("loss_interface", "nll_loss without log_softmax"),
        fit(mlp, lambda out: F.nll_loss(out, Y)),
        fit(lambda: mlp(nn.LogSoftmax(1)), lambda out: F.nll_loss(out, Y)),
    ),
    "a broadcast target": Case(
        ("loss_interface", "broadcast"),
        fit(lambda: mlp(n_out=1), lambda out: F.mse_loss(out, T)),
        fit(lambda: mlp(n_out=1), lambda out: F.mse_loss(out, T[:, None])),
    ),
    "a broadcast target, by hand": Case(
        ("loss_interface", "broadcast"),
        fit(lambda: mlp(n_out=1), lambda out: (out - T).square().mean()),
        fit(lambda: mlp(n_out=1), lambda out: (out[:, 0] - T).square().mean()),
    ),
    "softmax over the batch": Case(
        ("loss_interface", "softmax over the batch"),
        fit(mlp, lambda out: -out.log_softmax(0)[range(64), Y].mean()),
        fit(mlp, lambda out: -out.log_softmax(1)[range(64), Y].mean()),
    ),
    "layers in a list": Case(
        ("disconnected", "unowned"), fit(lambda: Listed(list)), fit(lambda: Listed(nn.ModuleList))
    ),
    "a head replaced after the optimizer was made": Case(
        ("disconnected", "left out"), fit(mlp, optimizer=replaced("after")), fit(mlp, optimizer=replaced("before"))
    ),
    "gradients never cleared": Case(("stale_gradient", "never cleared"), fit(mlp, clear=False), fit(mlp)),
    "gradients never cleared under Adam": Case(
        ("stale_gradient", "never cleared"),
        fit(mlp, optimizer=lambda m: torch.optim.Adam(m.parameters(), 1e-3), clear=False),
        fit(mlp, optimizer=lambda m: torch.optim.Adam(m.parameters(), 1e-3)),
    ),
    "a schedule that stands at 0": Case(
        ("update_too_small", "learning rate 0"),
        fit(mlp, schedule=lambda step: step // 100),
        fit(mlp, schedule=lambda step: min(1, step / 10)),
    ),
    "a learning rate of a millionth": Case(
        ("update_too_small", "too small"), fit(mlp, optimizer=lambda m: sgd(m, 1e-7)), fit(mlp)
    ),
    "half precision eats every step": Case(
        ("precision", "rounded away"),
        fit(lambda: mlp().bfloat16(), lambda out: classify(out.float()), lambda m: sgd(m, 1e-5), x=X.bfloat16()),
        fit(mlp, optimizer=sgd),
    ),
    "constant weights": Case(("symmetric_initialization", "constant"), fit(lambda: filled(mlp(), 0.1)), fit(mlp)),
    "all weights 0": Case(("symmetric_initialization", "at 0"), fit(lambda: filled(mlp(), 0.0)), fit(mlp)),
    "a hidden layer at 0, whose relus never wake": Case(
        ("symmetric_initialization", "at 0"), fit(lambda: filled(mlp(), 0.0, [2])), fit(lambda: filled(mlp(), 0.0, [4]))
    ),
    "each unit twice": Case(("symmetric_initialization", "repeated"), fit(lambda: twice(mlp())), fit(mlp), steps=10),
    "bfloat16 eats most of each of Adam's steps": Case(
        ("precision", "rounded away"),
        fit(lambda: mlp().bfloat16(), lambda out: classify(out.float()), lambda m: adam(m, 1e-5), x=X.bfloat16()),
        fit(lambda: mlp().bfloat16(), lambda out: classify(out.float()), lambda m: adam(m, 3e-3), x=X.bfloat16()),
    ),
    "Adam's eps in float16": Case(
        ("precision", "eps"),
        fit(lambda: mlp().half(), lambda out: classify(out.float()), lambda m: adam(m, 1e-3), x=dark().half()),
        fit(lambda: mlp().half(), lambda out: classify(out.float()), lambda m: adam(m, 1e-3, eps=1e-4), x=X.half()),
    ),
    "a loss so small that float16 has no gradient of it": Case(
        ("precision", "underflow"),
        fit(lambda: mlp().half(), lambda out: scaled(classify(out.float()), 1e-6), x=X.half()),
        fit(lambda: mlp().half(), lambda out: classify(out.float()), x=X.half()),
    ),
    "a detach on the way": Case(
        ("disconnected", "cut"), fit(lambda: Way(Tensor.detach)), fit(lambda: Way(Tensor.clone))
    ),
    "numbers made anew": Case(
        ("disconnected", "cut"), fit(lambda: Way(lambda h: torch.tensor(h.tolist()))), fit(lambda: Way(Tensor.clone))
    ),
    "a choice of the largest on the way": Case(
        ("disconnected", "cut"),
        fit(lambda: Way(lambda h: F.one_hot(h.argmax(1), 32).float())),
        fit(lambda: Way(lambda h: h.softmax(1) * 32)),
    ),
    "a body left under no_grad": Case(
        ("disconnected", "cut"), fit(lambda: Way(Tensor.clone, grad=False)), fit(lambda: Way(Tensor.clone))
    ),
    "a loss made anew from its number": Case(
        ("disconnected", "no graph"),
        fit(mlp, lambda out: torch.tensor(classify(out).item(), requires_grad=True)),
        fit(mlp),
    ),
    "masks of 0 and 255": Case(
        ("targets", "out of range"),
        fit(lambda: mlp(n_out=1), lambda out: F.binary_cross_entropy_with_logits(out[:, 0], 255.0 * (Y > 2))),
        fit(lambda: mlp(n_out=1), lambda out: F.binary_cross_entropy_with_logits(out[:, 0], 1.0 * (Y > 2))),
    ),
    "a softmax of logits times a thousand": Case(
        ("logits_saturated", "temperature"),
        fit(mlp, lambda out: classify(1000 * out), lambda m: sgd(m, 1e-7)),
        fit(mlp, lambda out: classify(2 * out)),
    ),
    "a loss turned round": Case(
        ("loss_interface", "turned round"), fit(mlp, lambda out: -classify(out), lambda m: sgd(m, 0.5)), fit(mlp)
    ),
    "dropout that keeps one unit in fifty": Case(
        ("over_regularized", "dropout"),
        fit(lambda: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.98), nn.Linear(64, 5))),
        fit(lambda: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 5))),
        steps=60,
    ),
    "AdamW that decays all": Case(
        ("over_regularized", "weight decay"),
        fit(mlp, optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-3, weight_decay=300.0)),
        fit(mlp, optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-3, weight_decay=0.01)),
        steps=60,
    ),
    "tanh of weights far too large": Case(
        ("saturated", "initialization"),
        fit(lambda: large(mlp(act=nn.Tanh), 60)),
        fit(lambda: large(mlp(act=nn.Tanh), 1)),
    ),
    "tanh of pixels from 0 to 255": Case(
        ("input_scale", "too large"),
        fit(lambda: mlp(act=nn.Tanh), x=100 * X.abs()),
        fit(lambda: mlp(act=nn.Tanh), x=X.abs()),
    ),
    "relu of pixels from 0 to 255": Case(
        ("input_scale", "too large"),
        fit(lambda: large(mlp(), 2), x=100 * X.abs(), optimizer=lambda m: sgd(m, 1e-6)),
        fit(lambda: large(mlp(), 2), x=X.abs()),
    ),
    "inputs in the wrong unit": Case(("input_scale", "too small"), fit(mlp, x=X / 1e4), fit(mlp)),
    "one feature in thousands": Case(
        ("input_scale", "too large"), fit(mlp, x=X * torch.tensor([5000.0] + [1.0] * 19)), fit(mlp), steps=60
    ),
    "prices as targets": Case(
        ("targets", "out of scale"),
        fit(lambda: mlp(n_out=1), lambda out: F.mse_loss(out[:, 0], 2e5 + 5e4 * T), lambda m: sgd(m, 1e-8)),
        fit(lambda: mlp(n_out=1), lambda out: F.mse_loss(out[:, 0], T)),
    ),
    "years as targets, the loss by hand": Case(
        ("targets", "out of scale"),
        fit(lambda: mlp(n_out=1), lambda out: ((out[:, 0] - 2000 - 9 * T) ** 2).mean(), lambda m: adam(m, 1e-3)),
        fit(lambda: mlp(n_out=1), lambda out: ((out[:, 0] - T) ** 2).mean(), lambda m: adam(m, 1e-3)),
    ),
    "no activation at all": Case(
        ("linear_stack", "no activation"),
        fit(lambda: nn.Sequential(nn.Linear(20, 32), nn.Linear(32, 32), nn.Linear(32, 5))),
        fit(mlp),
    ),
    "sixteen blocks with branches at full size": Case(
        ("residual_mismatch", "branches too large"),
        fit(lambda: Blocks(16, 1.0), optimizer=lambda m: sgd(m, 1e-8), planned=90),
        fit(lambda: Blocks(16, 0.25), optimizer=lambda m: sgd(m, 1e-2), planned=90),
    ),
    "a decay that outweighs the loss": Case(
        ("over_regularized", "weight decay"),
        fit(mlp, optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.05, weight_decay=2.0)),
        fit(mlp, optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.05, weight_decay=1e-4)),
        steps=60,
    ),
    "relu of weights far too large": Case(
        ("forward_scale", "initialization"),
        fit(lambda: large(mlp(), 30), optimizer=lambda m: sgd(m, 1e-5)),
        fit(lambda: large(mlp(), 2)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fault_is_named_and_its_twin_is_silent(name):
    told_apart(CASES[name])


def told_apart(case):
    """The sick net has that one finding, a harm; its twin has none."""
    kind, cause = case.found
    found = findings(case.sick, case.steps)
    assert [f.kind for f in found] == [kind], found
    assert cause in found[0].cause
    assert found[0].severity == "harm"
    assert all((found[0].sentence, found[0].why, found[0].remedy, found[0].expected, found[0].source))
    assert findings(case.mended, case.steps) == []


def batches_in(order):
    """Findings of twenty batches of 16 from a table of five classes."""
    torch.manual_seed(0)
    y = torch.arange(5).repeat_interleave(64)
    x = torch.randn(5, 20)[y] + torch.randn(320, 20)
    model = mlp()
    optimizer = sgd(model)
    with watch(model, optimizer) as watching:
        for batch in order.split(16):
            optimizer.zero_grad()
            watching.loss(F.cross_entropy(model(x[batch]), y[batch])).backward()
            optimizer.step()
    return [(f.kind, f.severity) for f in bpdiag.diagnose(watching.trace)]


def test_classes_that_come_one_after_the_other():
    assert batches_in(torch.arange(320)) == [("data_order", "harm")]
    assert batches_in(torch.randperm(320, generator=torch.Generator().manual_seed(0))) == []


def frozen(layers):
    """All but the last bias, or less."""
    model = mlp()
    for i in layers:
        model[i].weight.requires_grad_(False)
    for i in layers[:2]:
        model[i].bias.requires_grad_(False)
    return model


def trained(model, lr=0.05):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)


def test_all_weights_frozen():
    (found,) = findings(fit(lambda: frozen([0, 2, 4]), optimizer=trained), 40)
    assert (found.kind, found.severity, found.cause) == ("disconnected", "warning", "frozen: no weight may change")
    assert found.layers == ("0#0", "2#0", "4#0")
    assert findings(fit(lambda: frozen([0, 2]), optimizer=lambda m: trained(m, 0.5)), 40) == []


def test_biases_trained_alone_that_learn():
    offset = nn.Parameter(torch.full((5,), 3.0))
    model = frozen([0, 2, 4])
    model[4].bias = offset
    assert findings(fit(lambda: model, lambda out: out.mean(0).square().mean(), lambda m: trained(m, 0.5)), 40) == []


def test_a_head_trained_on_features():
    """Under no_grad on purpose it learns; a detach that is in the way is harm, whatever the head can do alone."""

    def found(way, grad):
        told = findings(fit(lambda: Way(way, grad), optimizer=lambda m: sgd(m, 0.5)), 60)
        return [(f.kind, f.severity) for f in told]

    assert found(Tensor.clone, False) == [("disconnected", "warning")]
    assert found(Tensor.detach, True) == [("disconnected", "harm")]


# ---- what looks so and is none ----------------------------------------------------------------------------


def silent(make, steps=30):
    assert [f for f in findings(make, steps) if f.severity == "harm"] == []


def test_a_log_softmax_before_cross_entropy_changes_nothing():
    silent(fit(lambda: mlp(nn.LogSoftmax(1))))


def test_logits_squashed_and_stretched_again_are_meant_so():
    silent(fit(mlp, lambda out: classify(10 * out.tanh())))


def test_a_relu_before_a_loss_that_wants_one():
    silent(fit(lambda: mlp(nn.ReLU(), n_out=1), lambda out: F.mse_loss(out[:, 0], T.abs())))


def test_pairs_compared_on_purpose():
    """A contrastive loss holds every sample against every other."""
    silent(fit(mlp, lambda out: F.cross_entropy(F.normalize(out) @ F.normalize(out).t() * 5, torch.arange(64))))


def test_a_head_trained_alone_is_a_warning():
    found = findings(fit(mlp, optimizer=lambda m: torch.optim.SGD(m[4].parameters(), 0.5)), 30)
    assert [(f.kind, f.severity) for f in found] == [("disconnected", "warning")]


def test_a_critic_that_sees_what_a_generator_made_has_no_foreign_parameters():
    torch.manual_seed(0)
    generator, critic = nn.Linear(4, 20), mlp(n_out=1)
    optimizer = sgd(critic)
    with watch(critic, optimizer) as watching:
        for _ in range(3):
            F.softplus(critic(generator(torch.randn(8, 4)))).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not [line for line in watching.trace.meta["unseen"] if "in no module" in line["reason"]]


def test_micro_batches_are_not_stale():
    torch.manual_seed(0)
    model = mlp()
    optimizer = sgd(model)
    with watch(model, optimizer) as watching:
        for _ in range(10):
            for x, y in zip(X.split(16), Y.split(16), strict=True):
                (watching.loss(F.cross_entropy(model(x), y)) / 4).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert bpdiag.diagnose(watching.trace) == []
