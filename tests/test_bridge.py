"""dC/dW of a trained net as a product: each factor against torch's own tensors, the whole against the measured norm."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn
from torch.nn import functional as F

from bpdiag import watch
from bpdiag.__main__ import main
from bpdiag.bridge import Product, render, to_data, weight_gradient
from bpdiag.config import UsageError
from bpdiag.trace import Layer, Sample, Trace


def net(*widths, activation=nn.Tanh):
    torch.manual_seed(0)
    layers = [nn.Linear(n, m) for n, m in itertools.pairwise(widths)]
    modules = [module for layer in layers for module in (layer, activation())]
    return nn.Sequential(*modules[:-1])


def watched(model, x, passes=1, after_backward=lambda: None):
    """The trace of one step on sum of squares."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as watching:
        for _ in range(passes):
            model(x).square().sum().backward()
        after_backward()
        optimizer.step()
    return watching.trace


def batch(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def by_torch(model, x):
    """Per weight layer what it read, and the cotangent of what it gave out."""
    read, given = [], []
    for module in model:
        if isinstance(module, nn.Linear):
            read.append(x)
        x = module(x)
        if isinstance(module, nn.Linear):
            x.retain_grad()
            given.append(x)
    x.square().sum().backward()
    return [a.detach() for a in read], [z.grad for z in given]


def closes(product):
    """Whether the factors multiply to what was measured."""
    return product.value == pytest.approx(product.measured, rel=1e-12)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Sigmoid])
def test_every_factor_is_the_ratio_that_its_name_says(activation):
    x = batch(16, 4)
    read, g = by_torch(net(4, 7, 6, 5, 3, activation=activation), x)
    trace = watched(net(4, 7, 6, 5, 3, activation=activation), x)
    for layer in range(4):
        product = weight_gradient(trace, f"{2 * layer}")
        cotangent, *gains, entering, agreement = product.terms
        assert cotangent.value == pytest.approx(float(g[3].norm()), rel=1e-6)
        above = [float(g[k].norm() / g[k + 1].norm()) for k in range(2, layer - 1, -1)]
        assert [gain.value for gain in gains] == pytest.approx(above, rel=1e-6)
        assert all(gain.weights * gain.slopes == pytest.approx(gain.value, rel=1e-12) for gain in gains)
        assert entering.value == pytest.approx(float(read[layer].norm()), rel=1e-6)
        told = torch.einsum("bo,bi->oi", g[layer], read[layer]).norm() / (g[layer].norm() * read[layer].norm())
        assert agreement.value == pytest.approx(float(told), rel=1e-6)
        assert [term.kind for term in product.terms] == ["cotangent", *["gain"] * (3 - layer), "input", "agreement"]
        assert product.samples == 16
        assert closes(product)


def test_agreement_is_one_for_one_sample_and_for_equal_samples_and_a_root_for_strangers():
    for x in (batch(1, 4), batch(1, 4).expand(8, 4)):
        assert weight_gradient(watched(net(4, 6, 3), x), "0").terms[-1].value == pytest.approx(1.0, rel=1e-6)
    linear = nn.Linear(9, 9, bias=False)
    nn.init.eye_(linear.weight)
    product = weight_gradient(watched(nn.Sequential(linear), torch.eye(9)), "0")  # orthogonal in and out
    assert product.terms[-1].value == pytest.approx(1 / 3, rel=1e-6)
    assert "about 1/√9 = 0.3333 in unrelated ones" in " ".join(render(product).split())


class Calls(nn.Module):
    """Two linear layers, and a function call or two between them."""

    def __init__(self, between, n_in=4):
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high, self.between = nn.Linear(n_in, 6), nn.Linear(6, 6), between

    def forward(self, x):
        return self.high(self.between(self.low(x)))


def read_by_high(model, x):
    """What entered ``high``, by a hook of the test's own."""
    seen = []
    handle = model.high.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    return seen[-1]


class Forked(Calls):
    """What ``low`` gives is read by two: there is no gain to compare."""

    def forward(self, x):
        z = self.low(x)
        return self.high(3 * torch.sin(z)) + self.low.weight.sum() * z


@pytest.mark.parametrize(
    "between",
    [
        torch.tanh,
        F.relu,
        F.silu,
        lambda z: z,
        lambda z: torch.relu(z).flatten(1),
        torch.sin,
        lambda z: 3 * torch.relu(z),
        lambda z: z + 1,  # the cotangent passes unchanged: it does not betray this one
        lambda z: torch.relu(z + 1),
        lambda z: z.flip(0) * 2,
        lambda z: z.detach(),
    ],
    ids=["tanh", "relu", "silu", "nothing", "flatten", "sin", "scaled", "constant", "shifted", "flipped", "detached"],
)
def test_what_a_layer_read_is_what_entered_it(between):
    model = Calls(between)
    read = read_by_high(model, batch(8, 4))
    product = weight_gradient(watched(model, batch(8, 4)), "high")
    assert [term.kind for term in product.terms] == ["cotangent", "input", "agreement"]
    assert product.terms[1].value == pytest.approx(float(read.norm()), rel=1e-6)
    assert product.terms[2].value <= 1
    assert closes(product)


def test_what_a_layer_read_below_a_fork():
    model = Forked(None)
    read = read_by_high(model, batch(8, 4))
    product = weight_gradient(watched(model, batch(8, 4)), "high")
    assert product.terms[1].value == pytest.approx(float(read.norm()), rel=1e-6)


def test_the_second_output_of_a_layer_is_not_taken_for_the_first():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.low, self.high = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.high(self.low(x)[1].squeeze(0))  # the last state, not every step's output

    model = Recurrent()
    read = read_by_high(model, batch(8, 5, 4))
    product = weight_gradient(watched(model, batch(8, 5, 4)), "high")
    assert product.terms[1].value == pytest.approx(float(read.norm()), rel=1e-6)


def test_a_trace_without_the_input_has_one_factor_for_both():
    product = weight_gradient(typed(change={(0, "x_norm"): None}), "low")
    assert [term.kind for term in product.terms] == ["cotangent", "gain", "input and agreement"]
    assert closes(product)
    assert "stand as one factor" in render(product)


def test_sequences_count_positions_as_samples():
    product = weight_gradient(watched(Calls(torch.tanh), batch(2, 5, 4)), "low")
    assert product.samples == 10
    assert closes(product)
    assert product.terms[-2].value == pytest.approx(float(batch(2, 5, 4).norm()), rel=1e-6)


def test_a_short_last_batch_is_counted_as_it_was():
    model = net(4, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer) as watching:
        for x in (batch(8, 4), batch(3, 4)):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for step, n in ((0, 8), (1, 3)):
        product = weight_gradient(watching.trace, "0", step)
        assert product.samples == n
        assert product.terms[-2].value == pytest.approx(float(batch(n, 4).norm()), rel=1e-6)
        assert closes(product)


def test_a_convolution_reads_its_input_several_times():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    x = batch(4, 1, 8, 8)
    with torch.no_grad():
        read = [x, model[:2](x), model[:4](x)]
    trace = watched(model, x)
    for name, entered in zip(("0", "2", "4"), read, strict=True):
        product = weight_gradient(trace, name)
        assert product.terms[-2].value == pytest.approx(float(entered.norm()), rel=1e-6)
        assert closes(product)
        assert ("several times" in render(product)) == (name != "4")
    assert weight_gradient(trace, "2").samples == 4 * 16
    assert "unrelated" not in render(weight_gradient(trace, "2"))  # windows overlap: no simple chance
    assert "unrelated" in render(weight_gradient(trace, "4"))


def test_a_way_that_forks_is_refused_by_name():
    class Residual(Calls):
        def forward(self, x):
            z = self.low(x)
            return self.high(z) + self.high(torch.tanh(z))

    trace = watched(Residual(None), batch(8, 4))
    with pytest.raises(UsageError, match="low: its output is read by 2 layers: the way up forks; known: high, high#1"):
        weight_gradient(trace, "low")


def test_an_activation_above_the_last_layer_is_no_fork():
    trace = watched(nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()), batch(8, 4))
    assert closes(weight_gradient(trace, "0"))


def test_shared_weights_and_several_passes_are_said():
    class Twice(Calls):
        def forward(self, x):
            return self.low(torch.tanh(self.low(x)))

    product = weight_gradient(watched(Twice(None, n_in=6), batch(8, 6)), "low#1")
    assert closes(product)
    assert "W is shared by 2 calls" in render(product)
    product = weight_gradient(watched(net(4, 6, 3), batch(8, 4), passes=3), "0")
    assert closes(product)
    assert "The step had 3 forward passes" in render(product)


def test_clipping_is_in_the_agreement_alone():
    models = [net(4, 6, 3), net(4, 6, 3)]
    whole = weight_gradient(watched(models[0], batch(8, 4)), "0")
    clipped = watched(
        models[1], batch(8, 4), after_backward=lambda: [p.grad.mul_(0.25) for p in models[1].parameters()]
    )
    product = weight_gradient(clipped, "0")
    assert closes(product)
    assert product.terms[:-1] == whole.terms[:-1]
    assert product.terms[-1].value == pytest.approx(whole.terms[-1].value / 4, rel=1e-6)


def test_an_exact_zero_is_not_all_where_other_calls_or_passes_add():
    class Twice(Calls):
        def forward(self, x):
            return self.low(0 * x) + self.low(x)

    product = weight_gradient(watched(Twice(None, n_in=6), batch(8, 6)), "low")
    assert product.value == 0 < product.measured
    assert "theirs is what was measured" in " ".join(render(product).split())
    assert "the last factor holds" not in render(product)
    model = net(4, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as watching:
        for x in (0 * batch(8, 4), batch(8, 4)):
            model(x).square().sum().backward()
        optimizer.step()
    product = weight_gradient(watching.trace, "0")
    assert product.value == 0 < product.measured
    assert "what was measured came of the others" in " ".join(render(product).split())


def test_nothing_below_an_exact_zero():
    model = net(4, 6, 6, 3, activation=nn.ReLU)
    with torch.no_grad():
        model[2].bias.fill_(-1e3)  # every unit of the second layer is dead
    product = weight_gradient(watched(model, batch(8, 4)), "0")
    assert product.value == product.measured == 0
    assert [term.name for term in product.terms] == ["‖dC/dz‖ of 4 (linear)", "gain of 2 (linear)"]
    assert "gain of 2 (linear) is exactly 0" in render(product)
    assert "exactly 0" in render(product).splitlines()[4]


# ---- traces typed by hand -----------------------------------------------------------------------------------

LAYERS = [
    Layer("low", 0, "linear", (9, 4), (), 2, (1,), fan_in=16, units=4),
    Layer("act", 0, "relu", (9, 4), (0,), activation="relu"),
    Layer("high", 0, "linear", (9, 2), (1,), fan_in=4, units=2),
]


def typed(**changes):
    """Steps 0, 10, 20; ‖dC/dW_low‖ = 8 · 0.5 · 12 · 0.25 = 12."""
    low = {"x_norm": 12.0, "g_z_norm": 4.0, "backward_gain": 0.5, "weight_factor": 2.0, "slope_factor": 0.25}
    values = [low | {"g_W_norm": 12.0}, {"a_norm": 3.0, "g_a_norm": 16.0}, {"g_z_norm": 8.0, "g_W_norm": 6.0}]
    for (line, column), value in changes.get("change", {}).items():
        values[line][column] = value
    rows = [(0, i, {k: v for k, v in told.items() if v is not None}) for i, told in enumerate(values)]
    gaps = changes.get("missing", [])
    samples = [Sample(step, LAYERS, rows, [], missing=gaps) for step in changes.get("steps", (0, 10, 20))]
    if "last" in changes:
        samples[-1].rows = [(0, 0, rows[0][2] | changes["last"]), *rows[1:]]
    return Trace.build(LAYERS, samples)


def test_a_typed_trace_multiplies_as_typed():
    product = weight_gradient(typed(), "low", 10)
    assert [term.value for term in product.terms] == [8.0, 0.5, 12.0, 0.25]
    assert product.value == product.measured == 12
    assert product.step == 10
    lines = render(product).splitlines()
    assert lines[0].startswith("‖dC/dW‖ of low at step 10")
    assert lines[4].split() == ["·", "gain", "of", "low", "0.5", "=", "2", "·", "0.25", "4", "-0.30", "█" * 12]
    assert "‖dC/dW‖ = 8 · 0.5 · 12 · 0.25 = 12; as the optimizer met it: 12." in render(product)
    assert max(map(len, lines)) <= 100


def test_the_last_finite_step_is_taken():
    assert weight_gradient(typed(), "low").step == 20
    blown = typed(last={"g_W_norm": math.nan})
    assert weight_gradient(blown, "low").step == 10
    assert math.isnan(weight_gradient(blown, "low", 20).value)
    assert "nan" in render(weight_gradient(blown, "low", 20))


@pytest.mark.parametrize(
    ("name", "step", "changes", "message"),
    [
        (None, None, {}, "--layer NAME is missing; known: low, high"),
        ("hihg", None, {}, "--layer hihg: no such layer; known: low, high; did you mean 'high'"),
        ("", None, {}, "no such layer; known: low, high"),
        ("act", None, {}, "--layer act: relu has no weight matrix; known: low, high"),
        ("low", 7, {}, "--step 7: not sampled; 3 steps were, 0 to 20; nearest: 0 and 10"),
        ("low", -1, {}, "nearest: 0 and 10"),
        ("low", 10**30, {}, "nearest: 10 and 20"),
        ("low", None, {"steps": ()}, "nothing was measured"),
        (
            "low",
            10,
            {"change": {(0, "g_W_norm"): None}, "missing": [(0, "g_W_norm", "frozen")]},
            "low: no g_W_norm at step 10: frozen",
        ),
        ("low", 10, {"change": {(0, "g_z_norm"): None}}, "low: no g_z_norm at step 10: not measured"),
    ],
)
def test_what_cannot_be_told_is_refused_in_one_line(name, step, changes, message):
    with pytest.raises(UsageError) as refusal:
        weight_gradient(typed(**changes), name, step)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_gain_whose_split_is_missing_is_told_without_it():
    product = weight_gradient(typed(change={(0, "weight_factor"): None, (0, "slope_factor"): None}), "low")
    assert (product.terms[1].weights, product.terms[1].slopes) == (None, None)
    assert closes(product)
    assert render(product)


def test_as_data():
    told = to_data(weight_gradient(typed(), "low"))
    assert told["product"] == 12
    assert told.keys() == {field.name for field in dataclasses.fields(Product)} | {"product"}


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["model.depth=3", "model.width=8", "training.steps=4", "watch.every=2", "hydra.run.dir=run", "--quiet"])
        == 0
    )
    GlobalHydra.instance().clear()
    capsys.readouterr()
    assert main(["chain", "--run", "run", "--layer", "linear1", "--step", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("‖dC/dW‖ of linear1 at step 2: ")
    assert "· gain of linear1" in out
    assert main(["chain", "--run", "run", "--layer", "linear1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["product"] == pytest.approx(told["measured"], rel=1e-12)
    assert [term["kind"] for term in told["terms"]] == ["cotangent", "gain", "gain", "input", "agreement"]
    for arguments, message in (
        (["--run", "run"], "--layer NAME is missing; known: linear1, linear2, linear3"),
        (["--run", "run", "--layer", "linaer1"], "did you mean 'linear1'"),
        (["--run", "run", "--layer", "relu1"], "relu has no weight"),
        (["--run", "run", "--layer", "linear1", "--step", "1"], "--step 1: not sampled; 2 steps were, 0 to 2"),
        (["--run", "nowhere", "--layer", "linear1"], "nowhere: no such folder"),
        (["--run", "run", "w=2"], "w=2: a run has its own numbers"),
    ):
        assert main(["chain", *arguments]) == 2
        told = capsys.readouterr()
        assert message in told.err
        assert told.out == ""
        assert len(told.err.splitlines()) == 1
