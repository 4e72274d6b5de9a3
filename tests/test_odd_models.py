"""Models and loops that are not the usual chain: each once misread, each with its truth beside it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bpdiag
from bpdiag.diagnosis import profile


@pytest.fixture(autouse=True)
def _one_seed_one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def watched(model, x, loss, steps=1, lr=0.1, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with bpdiag.watch(model, optimizer, **options) as watch:
        for _ in range(steps):
            value = watch.loss(loss(model(x)))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return watch.trace


def row(trace, name, step=0, call=0):
    table = trace.to_pandas()
    return table[(table.layer == name) & (table.step == step) & (table.call == call)].iloc[0]


def reasons(trace, name):
    return {m.column: m.reason for m in trace.missing if m.layer == name}


def deep(activation, depth=20, width=64):
    layers = [nn.Linear(width, width), activation()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def guess(out):
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1])


class Swish(nn.Module):
    def forward(self, z):
        return z * torch.sigmoid(z)


@pytest.mark.parametrize(
    "activation", [lambda: nn.GELU(), lambda: nn.CELU(0.5), lambda: nn.Threshold(0.01, 0.0), Swish]
)
def test_an_activation_without_a_rule_is_blamed_on_its_slopes(activation):
    trace = watched(deep(activation), torch.randn(32, 64), guess)
    (finding,) = bpdiag.diagnose(trace)
    assert finding.cause in ("weights", "slopes")
    assert finding.evidence["share_other"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("activation", [lambda: nn.LeakyReLU(0.2), nn.ReLU6])
def test_a_relative_of_relu_is_blamed_on_its_weights(activation):
    trace = watched(deep(activation, depth=24), torch.randn(32, 64), guess)
    assert bpdiag.diagnose(trace)[0].evidence["share_other"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (nn.GELU, F.gelu),
        (lambda: nn.SiLU(inplace=True), F.silu),
        (lambda: nn.ELU(inplace=True), lambda z: F.elu(z, inplace=True)),
        (nn.Softplus, F.softplus),
        (lambda: nn.Hardswish(inplace=True), F.hardswish),
    ],
    ids=["gelu", "silu", "elu", "softplus", "hardswish"],
)
def test_slopes_of_a_function_of_z_are_read_from_z(module, function):
    """Also where z is overwritten, and where the activation is a function call: against autograd's own slope."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(function(self.a(x)))

    x = torch.randn(7, 6)
    functional, chain = Functional(), nn.Sequential(nn.Linear(6, 5), module(), nn.Linear(5, 3))
    chain[0].load_state_dict(functional.a.state_dict())
    chain[2].load_state_dict(functional.b.state_dict())
    z = functional.a(x).detach().requires_grad_()
    function(z.clone()).sum().backward()
    overwrites = function(z.detach()).data_ptr() == z.data_ptr()
    truth = z.grad.square().mean().sqrt().item()
    by_module, by_function = row(watched(chain, x, guess), "1"), row(watched(functional, x, guess), "a")
    assert by_module.slope_rms == pytest.approx(truth, rel=1e-6)
    if not overwrites:  # in place nothing is left to read it from
        assert by_function.slope_rms == pytest.approx(truth, rel=1e-6)
        assert by_function.a_norm == pytest.approx(by_module.a_norm, rel=1e-6)


def test_luck_is_no_explosion():
    trace = watched(deep(nn.Tanh, depth=4), torch.randn(32, 64), guess, planned_steps=1)
    assert bpdiag.diagnose(trace) == []


def test_an_evaluation_under_grad_is_no_training_pass():
    model, x = deep(nn.ReLU, depth=4), torch.randn(16, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bpdiag.watch(model, optimizer) as watch:
        for _ in range(2):
            guess(model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
            model(x)  # somebody looks at the logits
    table = watch.trace.to_pandas()
    assert set(table.backward) == {0}
    assert table.g_z_norm.notna().sum() == 2 * 4


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.pi, self.value = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        return self.pi(h), self.value(h)


def test_decades_are_held_against_all_heads():
    trace = watched(Heads(), torch.randn(8, 8), lambda out: guess(out[0]) + 1e-4 * out[1].square().mean())
    pi, value = row(trace, "pi"), row(trace, "value")
    top = math.hypot(pi.g_z_norm, value.g_z_norm)
    assert row(trace, "stem").decades == pytest.approx(math.log10(row(trace, "stem").g_z_norm / top))
    assert pi.decades == pytest.approx(0, abs=1e-6)
    assert value.decades < -3


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda out: guess(out) - 5, id="negative"),
        pytest.param(lambda out: 0.05 * out.square().mean(), id="small from the start"),
    ],
)
def test_a_dying_net_is_not_taken_for_a_converged_one(loss):
    trace = watched(deep(nn.Sigmoid, depth=16), torch.randn(32, 64), loss, steps=3)
    assert not profile(trace).converged.any()
    assert bpdiag.diagnose(trace)[0].kind == "vanishing"


def test_a_loss_told_as_a_number_is_a_loss():
    model = nn.Linear(4, 2)
    with bpdiag.watch(model) as watch:
        assert watch.loss(0.25) == 0.25
        model(torch.ones(3, 4)).sum().backward()
        watch.step()
    assert watch.trace.losses[1].tolist() == [0.25]


def test_a_normalization_is_no_weight_layer_whatever_its_shape():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LayerNorm([4, 6, 6]), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    trace = watched(model, torch.randn(4, 1, 8, 8), guess)
    assert [trace.layers[i].name for i in trace.weight_layers()] == ["0", "4"]


def test_a_computed_weight_still_counts_as_a_layer():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))
    trace = watched(model, torch.randn(4, 6), guess)
    assert trace.layers[trace.weight_layers()[0]].fan_in == 6
    assert row(trace, "0").backward_gain > 0
    assert reasons(trace, "0")["g_W_norm"] == "its weight is computed from others"


def test_two_backwards_through_one_pass_are_missing_with_that_reason():
    model, x = deep(nn.Tanh, depth=3), torch.randn(8, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bpdiag.watch(model, optimizer) as watch:
        out = model(x)
        guess(out).backward(retain_graph=True)
        (1e-6 * out.square().mean()).backward()
        optimizer.step()
    assert math.isnan(row(watch.trace, "0").g_z_norm)
    assert reasons(watch.trace, "0")["g_z_norm"] == "several backwards went through it"
    assert row(watch.trace, "0").g_W_norm > 0


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Linear(6, 8)

    def forward(self, x):
        h = self.both(x)
        return {"aux": x.detach(), "mu": h[:, :4] * 2, "lv": h[:, 4:] * 3}


def sequence(inplace):
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace), nn.Linear(5, 5), nn.Dropout(0.3, inplace), nn.Linear(5, 3))


def normalized(inplace):
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(inplace), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize(("make", "shape"), [(sequence, (4, 7, 6)), (normalized, (4, 2, 6, 6))])
@pytest.mark.parametrize("backwards", [1, 2])
def test_a_view_that_is_overwritten_is_measured_as_it_was(make, shape, backwards):
    """A linear layer's output of a sequence, an instance norm's output: views.  Oracle: the model not in place."""

    def loss(out):
        if backwards == 2:
            out.square().mean().backward(retain_graph=True)
        return out.flatten(0, -2).sum() if out.dim() > 2 else out.sum()

    traces = []
    for inplace in (False, True):
        torch.manual_seed(0)
        traces.append(watched(make(inplace), torch.randn(shape), loss, steps=2))
    plain, overwritten = traces
    assert plain.layers == overwritten.layers
    assert plain.missing == overwritten.missing
    told = [trace.to_arrow().to_pylist() for trace in traces]
    assert told[0] == told[1]
    assert (told[1][0]["g_z_norm"] is None) == (backwards == 2)


class Spoiled(torch.autograd.Function):
    """Its input; the gradient of one sample's is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        g[2, 1, 0] = math.inf
        return g


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_sample_below_a_view_that_is_overwritten_is_the_batchs(batch_first):
    """Oracle: the same not in place.  Attention gives a transposed view; its first dimension is what is told."""

    class Net(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.inner, self.relu = nn.MultiheadAttention(6, 2, batch_first=batch_first), nn.ReLU(inplace)

        def forward(self, x):
            return Spoiled.apply(self.relu(self.inner(x, x, x)[0]))

    told = []
    for inplace in (False, True):
        torch.manual_seed(0)
        told.append(row(watched(Net(inplace), torch.randn(4, 5, 6), lambda out: out.sum()), "inner"))
    assert [inner.nonfinite_sample for inner in told] == [2, 2]


class BothWays(nn.Module):
    """Gives out a tensor and its transpose, which is a view of it."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(())), nn.Linear(6, 4)

    def forward(self, x):
        h = self.inner(x) * self.scale
        return h, h.t()


@pytest.mark.parametrize(("loss", "g"), [((3, 0), [3]), ((0, 1), [1, 1]), ((3, 1), [4, 1])])
def test_an_output_and_a_view_of_it_are_two(loss, g):
    """The gradient of the first holds that of its view."""
    trace = watched(
        BothWays(), torch.randn(4, 6), lambda out: sum(c * t.sum() for c, t in zip(loss, out, strict=True) if c)
    )
    assert row(trace, "").g_z_norm == pytest.approx(math.sqrt(16 * sum(x**2 for x in g)))


class AllStates(nn.Module):
    """Gives its last state out twice, alone and among all."""

    def __init__(self):
        super().__init__()
        self.scale, self.low, self.high = nn.Parameter(torch.ones(4)), nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        low = self.low(x) * self.scale
        high = self.high(low)
        return {"last": high, "all": (low, high)}


class WithoutGradient(torch.autograd.Function):
    """Twice its input; says that its input has no gradient."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return None


class Quantizing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(WithoutGradient.apply(torch.relu(self.a(x))) + self.b(x))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.cell(x)[1][0])  # the last state, not the sequence


def test_an_output_of_several_tensors_is_measured_by_those_that_are_trained():
    trace = watched(Wrapped(), torch.randn(4, 7, 6), guess)
    assert row(trace, "cell").g_z_norm > 0
    assert row(trace, "head").decades == 0
    trace = watched(Several(), torch.randn(4, 6), lambda out: out["mu"].sum() + out["lv"].sum())
    assert row(trace, "both").g_z_norm == pytest.approx(math.sqrt(16 * 4 + 16 * 9))


def test_a_tensor_given_out_twice_is_one_output():
    model = nn.ModuleDict({"body": AllStates()})
    model.forward = lambda x: model["body"](x)["last"]
    of_low = model["body"].high.weight.detach().sum(0).norm()  # for each sample the sum of the rows
    trace = watched(model, torch.randn(3, 6), lambda out: out.sum())
    assert row(trace, "body").g_z_norm == pytest.approx(math.sqrt(3 * 4 + 3 * of_low**2), rel=1e-5)


def test_a_function_that_gives_no_gradient_stops_no_training():
    trace = watched(Quantizing(), torch.randn(3, 6), guess)
    assert math.isnan(row(trace, "a").g_z_norm)
    assert reasons(trace, "a")["g_z_norm"] == "no gradient came back"
    assert row(trace, "b").g_z_norm > 0


@pytest.mark.parametrize(
    ("layers", "shape", "units"),
    [
        ([lambda: nn.Linear(6, 8), nn.ReLU], (3, 4, 5, 6), 8),
        ([lambda: nn.Conv1d(2, 8, 3), nn.Dropout, nn.ReLU], (3, 2, 9), 8),
        ([lambda: nn.Conv2d(2, 8, 3), nn.ReLU], (2, 9, 9), 8),
        ([lambda: nn.Conv2d(2, 8, 3), lambda: nn.BatchNorm2d(8), nn.ReLU], (3, 2, 9, 9), 8),
    ],
    ids=["channels last", "Conv1d and dropout", "no batch", "BatchNorm"],
)
def test_units_lie_where_the_layer_puts_them(layers, shape, units):
    model = nn.Sequential(*(make() for make in layers))
    with torch.no_grad():  # half the units are dead: their bias is far below
        model[0].bias[: units // 2] = -1e3
        if len(model) == 3 and isinstance(model[1], nn.BatchNorm2d):
            model[1].bias[: units // 2] = -1e3
    trace = watched(model, torch.randn(shape), lambda out: out.sum(), steps=3, lr=1e-9)
    assert trace.layers[0].units == units
    assert row(trace, str(len(layers) - 1), step=2).a_dead_fraction == pytest.approx(0.5)


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.h, self.calls = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), 0

    def forward(self, x):
        self.calls += 1
        z = torch.tanh(self.a(x))
        return self.h(z if self.calls == 1 else torch.tanh(self.b(z)))


def test_a_way_that_changes_is_not_held_against_the_wrong_weights():
    trace = watched(Skipping(), torch.randn(4, 6), guess, steps=2)
    assert row(trace, "a").backward_gain > 0
    assert math.isnan(row(trace, "a", step=1).backward_gain)
    assert "elsewhere" in reasons(trace, "a")["backward_gain"]


def test_all_weights_zero_is_blamed_on_their_beginning():
    model = deep(nn.ReLU, depth=4)
    for p in model.parameters():
        nn.init.zeros_(p)
    trace = watched(model, torch.randn(16, 64), guess, steps=4)
    (finding,) = bpdiag.diagnose(trace)
    assert (finding.kind, finding.cause) == ("symmetric_initialization", "weights at 0")
    assert "nan" not in str(finding)
    assert "inf" not in str(finding)


def test_momentum_that_has_built_up_is_not_corrected_again():
    model, x = deep(nn.Tanh, depth=4), torch.randn(16, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    taus = []
    for _ in range(2):
        with bpdiag.watch(model, optimizer) as watch:
            for _ in range(30):
                optimizer.zero_grad()
                guess(model(x)).backward()
                optimizer.step()
        taus.append(profile(watch.trace).travel)
    assert taus[1][0, 0] == pytest.approx(taus[0][-1, 0], rel=0.3)


def test_a_lazy_model_is_watched_from_its_first_pass():
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(3))
    with bpdiag.watch(model) as watch:
        guess(model(torch.randn(4, 6))).backward()
        watch.step()
    assert [layer.fan_in for layer in watch.trace.layers] == [6, None, 5]


def test_a_scripted_model_is_refused_in_words():
    scripted = nn.Linear(3, 2)
    scripted.register_forward_pre_hook = lambda hook: (_ for _ in ()).throw(RuntimeError("no hooks here"))
    with pytest.raises(bpdiag.config.UsageError, match="cannot be watched: no hooks here"), bpdiag.watch(scripted):
        pass


def test_nothing_that_came_back_is_not_called_life():
    model = deep(nn.ReLU, depth=3)
    trace = watched(model, torch.randn(4, 64), lambda out: (out * 0).sum())
    assert "Nothing to judge" in bpdiag.diagnosis.summarize(trace, [])["sentence"]
