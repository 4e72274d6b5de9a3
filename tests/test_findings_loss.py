"""What forward ends with, several losses, broadcasts and labels: each fault in the loss and its mended twin."""

import pytest
import torch
from test_findings import Case, T, X, Y, classify, findings, fit, mlp, sgd, silent, told_apart
from torch import Tensor, nn
from torch.nn import functional as F

import bpdiag
from bpdiag import watch

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")


def labelled(out):
    """Yes or no, as logits (B,) or (B, 1)."""
    return F.binary_cross_entropy_with_logits(out.flatten(), (Y > 2).float())


class Ending(nn.Module):
    """A net whose forward pass ends with functions."""

    def __init__(self, end, n_out=5):
        super().__init__()
        self.net, self.end = mlp(n_out=n_out), end

    def forward(self, x):
        return self.end(self.net(x))


def squeezed():
    return Ending(lambda out: out.squeeze(-1), n_out=1)


class OwnWeight(nn.Module):
    """A layer of its own making, which ends with a function."""

    def __init__(self, end):
        super().__init__()
        self.first, self.head = nn.Linear(20, 32), _Product(end)

    def forward(self, x):
        return self.head(self.first(x).relu())


class _Product(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.weight, self.end = nn.Parameter(torch.randn(32, 5) / 6), end

    def forward(self, x):
        return self.end(x @ self.weight, 1)


CASES = {
    "a softmax at the end of forward": Case(
        ("loss_interface", "softmax before the softmax"),
        fit(lambda: Ending(lambda out: F.softmax(out, dim=1))),
        fit(lambda: Ending(lambda out: F.log_softmax(out, dim=1))),
    ),
    "a softmax at the end of a layer": Case(
        ("loss_interface", "softmax before the softmax"),
        fit(lambda: OwnWeight(Tensor.softmax)),
        fit(lambda: OwnWeight(Tensor.log_softmax)),
    ),
    "a relu at the end of forward": Case(
        ("loss_interface", "dead logits: relu"), fit(lambda: Ending(F.relu)), fit(lambda: Ending(F.softplus))
    ),
    "a clamp at the end of forward": Case(
        ("loss_interface", "dead logits: relu"),
        fit(lambda: Ending(lambda out: out.clamp(min=0))),
        fit(lambda: Ending(lambda out: out.clamp(min=-30))),
    ),
    "a sigmoid at the end of forward": Case(
        ("loss_interface", "sigmoid before the sigmoid"),
        fit(lambda: Ending(torch.sigmoid, n_out=1), labelled),
        fit(lambda: Ending(torch.sigmoid, n_out=1), lambda out: F.binary_cross_entropy(out[:, 0], (Y > 2).float())),
    ),
    "nll of a softmax at the end of forward": Case(
        ("loss_interface", "nll_loss without log_softmax"),
        fit(lambda: Ending(lambda out: out.softmax(1)), lambda out: F.nll_loss(out, Y)),
        fit(lambda: Ending(lambda out: out.log_softmax(1)), lambda out: F.nll_loss(out, Y)),
    ),
    "nll of a softmax whose log is taken": Case(
        ("loss_interface", "nll_loss without log_softmax"),
        fit(lambda: Ending(lambda out: out.softmax(1)), lambda out: F.nll_loss(out * 1, Y)),
        fit(lambda: Ending(lambda out: out.softmax(1)), lambda out: F.nll_loss(out.log(), Y)),
    ),
    "a softmax over the batch at the end of forward": Case(
        ("loss_interface", "softmax over the batch"),
        fit(lambda: Ending(lambda out: out.log_softmax(0)), lambda out: F.nll_loss(out, Y)),
        fit(lambda: Ending(lambda out: out.log_softmax(1)), lambda out: F.nll_loss(out, Y)),
    ),
    "a broadcast target of a squeezed output": Case(
        ("loss_interface", "broadcast"),
        fit(lambda: mlp(n_out=1), lambda out: F.mse_loss(out.squeeze(-1), T[:, None])),
        fit(lambda: mlp(n_out=1), lambda out: F.mse_loss(out.squeeze(-1), T)),
    ),
    "a broadcast target of a flat output": Case(
        ("loss_interface", "broadcast"),
        fit(squeezed, lambda out: F.smooth_l1_loss(out, T[:, None])),
        fit(squeezed, lambda out: F.smooth_l1_loss(out, T)),
    ),
    "a broadcast target of a flat output, by hand": Case(
        ("loss_interface", "broadcast"),
        fit(squeezed, lambda out: (out - T[:, None]).pow(2).mean()),
        fit(squeezed, lambda out: (out - T).pow(2).mean()),
    ),
    "labels of -1 and 1": Case(
        ("targets", "out of range"),
        fit(squeezed, lambda out: F.binary_cross_entropy_with_logits(out, torch.sign(T))),
        fit(squeezed, lambda out: F.binary_cross_entropy_with_logits(out, (torch.sign(T) + 1) / 2)),
    ),
    "a few labels of 2": Case(
        ("targets", "out of range"),
        fit(squeezed, lambda out: F.binary_cross_entropy_with_logits(out, (T > 0) + 1.0 * (T > 1.5))),
        fit(squeezed, lambda out: F.binary_cross_entropy_with_logits(out, (T > 0) * 1.0)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fault_is_named_and_its_twin_is_silent(name):
    told_apart(CASES[name])


class Heads(nn.Module):
    """Two heads on one body."""

    def __init__(self, end):
        super().__init__()
        self.body, self.one, self.other = mlp(n_out=32), nn.Linear(32, 5), nn.Sequential(nn.Linear(32, 5), *end)

    def forward(self, x):
        h = self.body(x).relu()
        return self.one(h), self.other(h)


def told_each(losses, model):
    """Findings of a run that tells several losses in each step."""
    torch.manual_seed(1)
    model = model()
    optimizer = sgd(model)
    with watch(model, optimizer, planned_steps=1000) as watching:
        for _ in range(40):
            optimizer.zero_grad()
            out = model(X)
            torch.stack([watching.loss(loss(model, out)) for loss in losses]).sum().backward()
            optimizer.step()
    return [(f.kind, f.severity, f.layers) for f in bpdiag.diagnose(watching.trace)]


TWICE = {
    "the second of two": ([lambda m, out: classify(out[0]), lambda m, out: classify(out[1].softmax(1))], ()),
    "the first of two": ([lambda m, out: classify(out[1].softmax(1)), lambda m, out: classify(out[0])], ()),
    "after a penalty": (
        [lambda m, out: 1e-4 * m.one.weight.square().sum(), lambda m, out: classify(out[1].softmax(1))],
        (),
    ),
    "a module's, the second": ([lambda m, out: classify(out[0]), lambda m, out: classify(out[1])], [nn.Softmax(1)]),
    "a module's, of the sum": ([lambda m, out: classify(out[0]) + classify(out[1])], [nn.Softmax(1)]),
}


@pytest.mark.parametrize("name", TWICE)
def test_every_loss_told_is_judged(name):
    losses, end = TWICE[name]
    found = told_each(losses, lambda: Heads(end))
    assert found == [("loss_interface", "harm", ("other.1#0",) if end else ("other.0#0",))]
    both = [lambda m, out: classify(out[0]), lambda m, out: classify(out[1])]
    assert told_each(both, lambda: Heads([])) == []


def test_one_fault_in_several_passes_is_one_finding():
    def in_parts(out):
        return sum(F.cross_entropy(part.softmax(1), y) for part, y in zip(out.split(16), Y.split(16), strict=True)) / 4

    assert [f.kind for f in findings(fit(mlp, in_parts), 30)] == ["loss_interface"]


def test_every_pair_of_outputs_compared_on_purpose():
    """A ranking loss, and one of distances."""
    silent(fit(squeezed, lambda out: F.softplus((out[:, None] - out) * torch.sign(T[:, None] - T)).mean()))
    silent(fit(squeezed, lambda out: F.mse_loss((out[:, None] - out).abs(), (T[:, None] - T).abs())))


def test_an_ensemble_of_log_softmaxes():
    silent(
        fit(
            lambda: Ending(lambda out: torch.stack([out.log_softmax(1), (2 * out).log_softmax(1)]).logsumexp(0) - 0.69),
            lambda out: F.nll_loss(out, Y),
        )
    )


def test_an_attention_over_the_first_dimension_is_no_softmax_over_the_batch():
    """Positions come first; each is weighed against the others, and the answer is one for all."""

    def attend(out):
        out = out.view(8, 8, 5)
        return (out.softmax(0) * out).sum(0)

    silent(fit(lambda: Ending(attend), lambda out: F.cross_entropy(out, Y[:8])))
