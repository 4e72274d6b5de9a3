"""What stands between output and loss, for losses whose faults a judge must see.  Oracle: how each was put together."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bpdiag import Trace, watch
from bpdiag.modules import Nonlinearity
from bpdiag.rules import ACTIVATIONS

torch.set_num_threads(1)

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1])
TARGET = torch.zeros(5)


def told(loss, *layers, n_out=3, output=lambda out: out):
    model = nn.Sequential(nn.Linear(4, n_out), *layers)
    with watch(model) as watching:
        watching.loss(loss(output(model(X)))).backward()
        watching.step()
    return watching.trace.meta["loss_path"]


def names(path):
    """Without the outputs that it begins with."""
    told = [step["op"] for step in path]
    begins = [op for op in told if op == "Output"]
    assert told[: len(begins)] == begins
    assert begins or not told
    return told[len(begins) :]


PATHS = {
    "cross-entropy": (lambda out: F.cross_entropy(out, Y), ["LogSoftmax", "NllLoss"]),
    "a softmax before it": (lambda out: F.cross_entropy(out.softmax(-1), Y), ["Softmax", "LogSoftmax", "NllLoss"]),
    "relu on logits": (lambda out: F.cross_entropy(out.relu(), Y), ["Relu", "LogSoftmax", "NllLoss"]),
    "scaled": (lambda out: F.cross_entropy(out, Y) / 4, ["LogSoftmax", "NllLoss", "Div"]),
    "by hand": (lambda out: -out.log_softmax(1)[range(5), Y].mean(), ["LogSoftmax", "Index", "Mean", "Neg"]),
    "the output itself": (lambda out: out.sum(), ["Sum"]),
}


@pytest.mark.parametrize("name", PATHS)
def test_operations_in_order(name):
    loss, expected = PATHS[name]
    assert names(told(loss)) == expected


def test_an_activation_at_the_end_of_the_model_is_the_models():
    """It stands in the layer table; what follows is the loss's."""
    assert names(told(lambda out: F.cross_entropy(out, Y), nn.Softmax(1))) == ["LogSoftmax", "NllLoss"]


class Ends(nn.Module):
    """Two layers, and what the forward pass does with the outputs of the last."""

    def __init__(self, end):
        super().__init__()
        self.body, self.head, self.end = nn.Linear(4, 4), nn.Linear(4, 3), end

    def forward(self, x):
        return self.end(self.head(self.body(x).relu()))


class OwnWeight(nn.Module):
    """A layer of its own making."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return (x @ self.weight).softmax(1)


def summed(out):
    for _ in range(70):
        out = out + 1
    return out


ENDS = {
    "a layer": (nn.Sequential(nn.Linear(4, 3)), [("Addmm", "0#0")]),
    "a function": (Ends(lambda z: F.softmax(z, 1)), [("Addmm", "head#0"), ("Softmax", None)]),
    "two functions": (Ends(lambda z: z.softmax(1).log()), [("Addmm", "head#0"), ("Softmax", None), ("Log", None)]),
    "a module": (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), [("Addmm", "0#0"), ("Softmax", "1#0")]),
    "a function inside a layer": (OwnWeight(), [("Mm", None), ("Softmax", "#0")]),
    "a clamp": (Ends(lambda z: z.clamp(min=0)), [("Addmm", "head#0"), ("Relu", None)]),
    "a clamp from both sides": (Ends(lambda z: z.clamp(0, 1)), [("Addmm", "head#0"), ("Clamp", None)]),
    "a relu6": (nn.Sequential(nn.Linear(4, 3), nn.ReLU6()), [("Addmm", "0#0"), ("Relu6", "1#0")]),
    "a relu of ours": (
        nn.Sequential(nn.Linear(4, 3), Nonlinearity(ACTIVATIONS["relu"])),
        [("Addmm", "0#0"), ("Relu", "1#0")],
    ),
    "too many to tell": (Ends(summed), [("Unknown", None)]),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_the_model_ends_with(name):
    model, expected = ENDS[name]
    with watch(model) as watching:
        watching.loss(model(X).sum()).backward()
        watching.step()
    output, _ = watching.trace.meta["loss_path"]
    assert [(step["op"], step.get("layer")) for step in output["made"]] == expected


def test_each_output_has_its_own_end():
    model = Ends(lambda z: (z, z.softmax(1)))
    with watch(model) as watching:
        logits, probabilities = model(X)
        watching.loss(F.cross_entropy(logits, Y) + F.cross_entropy(probabilities, Y)).backward()
        watching.step()
    path = watching.trace.meta["loss_path"]
    ends = [[step["op"] for step in output["made"]] for output in path[:2]]
    assert ends == [["Addmm"], ["Addmm", "Softmax"]]
    assert [path[n]["reads"] for n in (2, 4)] == [[0], [1]]  # each log-softmax its own


def test_every_loss_told_has_its_path_once():
    model = nn.Linear(4, 3)
    with watch(model) as watching:
        for batch in (X, X, X[:4]):
            watching.loss(model.weight.square().sum())
            watching.loss(F.cross_entropy(model(batch), Y[: len(batch)]))
            watching.loss(F.cross_entropy(model(batch).softmax(1), Y[: len(batch)])).backward()
            watching.step()
    path = watching.trace.meta["loss_path"]
    assert [step["op"] for step in path] == [
        "Output", "LogSoftmax", "NllLoss", "Output", "Softmax", "LogSoftmax", "NllLoss",
    ]  # fmt: skip
    assert [step["reads"] for step in path] == [[], [0], [1], [], [3], [4], [5]]


def test_a_target_that_is_broadcast_shows_in_the_shapes():
    with pytest.warns(UserWarning, match="target size"):
        path = told(lambda out: F.mse_loss(out, TARGET), n_out=1)
    assert [step | {"made": None} for step in path] == [
        {"op": "Output", "shape": [5, 1], "reads": [], "made": None},
        {"op": "Expand", "shape": [5, 5], "reads": [0], "made": None},
        {"op": "MseLoss", "shape": [], "reads": [1], "made": None},
    ]
    assert names(told(lambda out: F.mse_loss(out, TARGET[:, None]), n_out=1)) == ["MseLoss"]


@pytest.mark.parametrize(("dim", "front"), [(0, 0), (1, 1), (-1, 1)])
def test_the_dimension_that_it_worked_along(dim, front):
    path = told(lambda out: -out.log_softmax(dim)[range(5), Y].mean())
    assert path[1] == {"op": "LogSoftmax", "shape": [5, 3], "reads": [0], "dim": front}


def test_an_output_read_twice_and_two_outputs():
    path = told(lambda out: F.cross_entropy(out, Y) + 0.1 * out.square().mean())
    assert names(path) == ["LogSoftmax", "NllLoss", "Pow", "Mean", "Mul", "Add"]
    model = nn.GRU(4, 3, batch_first=True)
    with watch(model) as watching:
        out, last = model(X[None])
        watching.loss(out.mean() + last.mean()).backward()
        watching.step()
    assert names(watching.trace.meta["loss_path"])[-1] == "Add"


def test_a_loss_of_something_else_has_no_path():
    model = nn.Linear(4, 3)
    with watch(model) as watching:
        model(X).sum().backward()
        watching.loss(model.weight.square().sum()).backward()
        watching.step()
    assert watching.trace.meta["loss_path"] == []


def test_it_is_kept_with_the_trace(tmp_path):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log=tmp_path / "run", every=2) as watching:
        for _ in range(3):
            watching.loss(F.cross_entropy(model(X), Y)).backward()
            optimizer.step()
    assert names(Trace.load(tmp_path / "run").meta["loss_path"]) == ["LogSoftmax", "NllLoss"]
