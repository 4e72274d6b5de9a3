"""The recorder against autograd itself: who ran, what came back, what is missing and why."""

import dataclasses
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

from bpdiag import watch
from bpdiag.config import ModelConfig
from bpdiag.model import build

torch.set_num_threads(1)


def data(shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def row(trace, layer, call=0, step=0, backward=0):
    told = [
        r
        for r in trace.to_arrow().to_pylist()
        if (r["layer"], r["call"], r["step"], r["backward"]) == (layer, call, step, backward)
    ]
    assert len(told) == 1, f"{len(told)} rows of {layer}#{call} at step {step}, backward {backward}"
    return told[0]


def reasons(trace, layer, call=0):
    return {m.column: m.reason for m in trace.missing if (m.layer, m.call) == (layer, call)}


def close(value, expected, rel=1e-12):
    assert value == pytest.approx(float(expected), rel=rel, abs=0)


def one_step(model, *inputs, lr=0.1, loss=lambda out: out.square().mean()):
    """A watched SGD step; returns the trace."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with watch(model, optimizer) as watching:
        loss(model(*inputs)).backward()
        optimizer.step()
    return watching.trace


class Net(nn.Module):
    """Modules by name, and a function that says how they are put together."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.put_together = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.put_together(self, x)


def seeded(n_in, n_out):
    return nn.utils.skip_init(nn.Linear, n_in, n_out).apply(fill)


def fill(linear):
    with torch.no_grad():
        linear.weight.copy_(data(linear.weight.shape, 3) / linear.in_features**0.5)
        linear.bias.copy_(data(linear.bias.shape, 4) / 3)


# ---- who ran ----------------------------------------------------------------------------------------------


def test_every_leaf_of_resnet18_in_execution_order():
    torch.manual_seed(0)
    model, ran = resnet18(num_classes=5), []
    leaves = {m: n for n, m in model.named_modules() if not list(m.children())}
    handles = [m.register_forward_hook(lambda m, *_: ran.append(leaves[m])) for m in leaves]
    model(data((2, 3, 32, 32)))
    for handle in handles:
        handle.remove()
    trace = one_step(model, data((2, 3, 32, 32)))
    assert [layer.name for layer in trace.layers if layer.kind != "add"] == ran
    assert [layer.name for layer in trace.layers if layer.kind == "add"] == [
        f"layer{n}.{block}.{'downsample.1' if n > 1 and not block else 'bn2'}+" for n in range(1, 5) for block in (0, 1)
    ]
    assert set(leaves.values()) == set(ran)
    assert [layer.call for layer in trace.layers if layer.name == "layer1.0.relu"] == [0, 1]
    assert all(r["g_a_norm" if r["a_norm"] is not None else "g_z_norm"] > 0 for r in trace.to_arrow().to_pylist())


def test_a_shared_module_is_one_layer_per_call():
    def forward(net, x):
        h = torch.tanh(net.first(x))
        for _ in range(3):
            h = torch.tanh(net.middle(h))
        return net.last(h)

    trace = one_step(Net(forward, first=seeded(6, 5), middle=seeded(5, 5), last=seeded(5, 3)), data((4, 6)))
    assert [la.key for la in trace.layers] == ["first#0", "middle#0", "middle#1", "middle#2", "last#0"]
    assert len({row(trace, "middle", call)["g_z_norm"] for call in range(3)}) == 3


def test_two_forward_passes_of_a_step_are_kept_apart():
    model = nn.Sequential(seeded(4, 3), nn.Tanh(), seeded(3, 1)).double()
    losses = [lambda: model(data((5, 4)).double()).mean(), lambda: -3 * model(data((5, 4), 2).double()).square().mean()]

    def told(loss, model=model):
        with watch(model) as watching:
            loss().backward()
        return watching.trace

    both = told(lambda: losses[0]() + losses[1]())
    for backward, loss in enumerate(losses):
        alone = told(loss)
        for name in "012":
            for column in ("z_norm", "a_norm", "g_z_norm", "g_a_norm", "backward_gain", "decades"):
                got, expected = row(both, name, backward=backward)[column], row(alone, name)[column]
                assert got == (expected and pytest.approx(expected, rel=1e-12))
    assert [layer.key for layer in both.layers] == ["0#0", "1#0", "2#0"]
    square = nn.Sequential(seeded(3, 3))
    assert told(lambda: square(square(data((5, 3)))).mean(), square).layers[0].next is None  # not the other pass's


# ---- what came back ---------------------------------------------------------------------------------------


def cnn(inplace):
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.LeakyReLU(0.01, inplace),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).double()


def ours():
    return build(ModelConfig(depth=5, width=6, activation="sigmoid"), 7, 3, seed=4).double()


def retained(model, x, y, lr):
    """The oracle: a second run with every output kept, torch.autograd.grad, a step by hand."""
    outs, h = [], x
    for module in model:
        h = module(h)
        outs.append(h)
    loss = F.cross_entropy(h, y)
    weights = [m.weight if isinstance(getattr(m, "weight", None), nn.Parameter) else None for m in model]
    grads = torch.autograd.grad(loss, outs + [w for w in weights if w is not None])
    of_weights = iter(grads[len(outs) :])
    names = [name for name, _ in model.named_children()]
    table = {}
    for name, out, g, w in zip(names, outs, grads[: len(outs)], weights, strict=True):
        table[name] = {"out": out.detach(), "g": g.norm(), "rms": out.detach().square().mean().sqrt()}
        if w is not None:
            g_w = next(of_weights)
            after = w.detach() - lr * g_w
            table[name] |= {
                "g_W": g_w.norm(),
                "u": (after - w.detach()).square().mean().sqrt() / w.detach().square().mean().sqrt(),
                "matrix": w.dim() > 1,
            }
    return table


def cosine_by_pairs(z):
    z = z.flatten(1)
    pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if i != j]
    return sum(float(z[i] @ z[j] / (z[i].norm() * z[j].norm())) for i, j in pairs) / len(pairs)


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda inplace: ours(), (8, 7)), (cnn, (8, 2, 8, 8))], ids=["mlp", "in_place_cnn"]
)
def test_every_number_equals_autograds(make, shape):
    x, y = data(shape, dtype=torch.float64), torch.arange(8) % 3
    truth = retained(make(False), x, y, lr=0.3)
    trace = one_step(make(True), x, lr=0.3, loss=lambda out: F.cross_entropy(out, y))
    names = list(truth)
    assert [layer.key for layer in trace.layers] == [f"{name}#0" for name in names]
    matrices = [n for n in names if truth[n].get("matrix")]
    for name in names:
        got, true = row(trace, name), truth[name]
        tensor = "z" if got["z_norm"] is not None else "a"
        assert got[f"{'a' if tensor == 'z' else 'z'}_norm"] is None
        close(got[f"{tensor}_norm"], true["out"].norm())
        close(got[f"{tensor}_rms"], true["rms"])
        close(got[f"g_{tensor}_norm"], true["g"])
        close(got[f"g_{tensor}_rms"], true["g"] / math.sqrt(true["out"].numel()))
        if "g_W" in true:
            close(got["g_W_norm"], true["g_W"])
            close(got["update_ratio"], true["u"], rel=1e-9)  # W_after - W_before loses the digits that W has in front
    for number, name in enumerate(matrices):
        got, above = row(trace, name), matrices[number + 1 :]
        close(got["z_cosine"], cosine_by_pairs(truth[name]["out"]), rel=1e-10)
        below = truth[matrices[number - 1]]["rms"] if number else x.square().mean().sqrt()
        close(got["forward_gain"], truth[name]["rms"] / below)
        assert got["decades"] == pytest.approx(
            math.log10(truth[name]["g"] / truth[matrices[-1]]["g"]), abs=1e-12, rel=1e-12
        )
        if above:
            entering = names[names.index(above[0]) - 1]
            close(got["backward_gain"], truth[name]["g"] / truth[above[0]]["g"])
            close(got["weight_factor"], truth[entering]["g"] / truth[above[0]]["g"])
            close(got["slope_factor"], truth[name]["g"] / truth[entering]["g"])
            close(got["weight_factor"] * got["slope_factor"], got["backward_gain"])


@pytest.mark.parametrize(
    ("function", "module"),
    [
        (torch.relu, nn.ReLU()),
        (lambda z: F.relu(z, inplace=True), nn.ReLU()),
        (torch.tanh, nn.Tanh()),
        (torch.sigmoid, nn.Sigmoid()),
        (F.leaky_relu, nn.LeakyReLU()),
        (F.silu, nn.SiLU()),
        (lambda z: F.prelu(z, z.new_full((1,), -0.25)), nn.PReLU(init=-0.25).requires_grad_(False).double()),
    ],
    ids=["relu", "relu_in_place", "tanh", "sigmoid", "leaky_relu", "silu", "prelu"],
)
def test_a_function_call_is_read_as_the_module(function, module):
    def net(phi):
        a, b, c = (seeded(6, 6) for _ in range(3))
        with torch.no_grad():
            b.bias[0] = -50.0  # a unit that relu kills
        modules = {"phi": phi} if isinstance(phi, nn.Module) else {}
        return Net(lambda net, x: net.c(phi(net.b(phi(net.a(x))))), a=a, b=b, c=c, **modules).double()

    x = data((9, 6), dtype=torch.float64) * 3
    traces = []
    for phi in (function, module):
        model = net(phi)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer) as watching:
            for _ in range(2):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        traces.append(watching.trace)
    by_function, by_module = traces
    for step in (0, 1):
        for call, name in enumerate("ab"):
            f, m = row(by_function, name, step=step), row(by_module, name, step=step)
            a = row(by_module, "phi", call, step=step)
            for column in ("weight_factor", "slope_factor", "backward_gain", "g_z_norm", "decades", "z_norm"):
                close(f[column], m[column])
            for column in ("a_norm", "a_rms", "g_a_norm", "slope_rms", "a_saturated_fraction"):
                close(f[column], a[column])
            assert f["a_dead_fraction"] == a["a_dead_fraction"]
            assert (f["a_dead_fraction"] is None) == (step == 0)
    layers = {layer.key: layer for layer in by_function.layers}
    assert layers["a#0"].activation == next(la for la in by_module.layers if la.name == "phi").activation


def test_a_layer_called_by_keyword_is_read_as_any_other():
    x = data((9, 6), dtype=torch.float64)
    forwards = lambda net, x: net.b(input=torch.tanh(net.a(input=x))), lambda net, x: net.b(torch.tanh(net.a(x)))
    by_keyword, plain = (one_step(Net(f, a=seeded(6, 6), b=seeded(6, 6)).double(), x) for f in forwards)
    for name in "ab":
        assert row(by_keyword, name) == row(plain, name)


def test_cotangents_of_1e_30_are_read_in_float32():
    def net():
        return build(ModelConfig(depth=6, width=16, activation="tanh"), 8, 4, seed=1)

    x = data((8, 8))
    small, exact = (
        one_step(net(), x, lr=1e28, loss=lambda out: out.square().mean() * 1e-29),
        one_step(net().double(), x.double(), lr=1e28, loss=lambda out: out.square().mean() * 1e-29),
    )
    for layer in small.layers:
        got, true = row(small, layer.name), row(exact, layer.name)
        for column in ("g_z_norm", "g_z_rms", "g_a_norm", "g_W_norm", "backward_gain", "slope_factor", "update_ratio"):
            assert (got[column] is None) == (true[column] is None)
            if got[column] is not None:
                assert got[column] > 0
                close(got[column], true[column], rel=1e-3 if column == "update_ratio" else 1e-5)
        assert 0 < (got["g_z_rms"] or got["g_a_rms"]) < 1e-28


# ---- what is missing, and why -----------------------------------------------------------------------------


def test_frozen_layers_are_missing_with_a_reason():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model[4].requires_grad_(False)
    trace = one_step(model, data((5, 4)))
    assert [row(trace, "0")[column] for column in ("g_z_norm", "g_W_norm", "backward_gain")] == [None] * 3
    assert "outside the graph" in reasons(trace, "0")["g_z_norm"]
    assert reasons(trace, "1")["g_a_norm"] == reasons(trace, "0")["g_z_norm"]
    assert row(trace, "4")["g_W_norm"] is None
    assert reasons(trace, "0")["g_W_norm"] == reasons(trace, "4")["g_W_norm"] == "frozen"
    assert row(trace, "4")["g_z_norm"] > 0
    assert row(trace, "2")["backward_gain"] > 0


def test_a_layer_without_gradient_is_missing_and_not_zero():
    def forward(net, x):
        net.unused(x)
        return net.used(net.cut(x).detach())

    trace = one_step(Net(forward, used=seeded(4, 3), unused=seeded(4, 3), cut=seeded(4, 4)), data((5, 4)))
    for name in ("unused", "cut"):
        told = row(trace, name)
        assert [k for k, v in told.items() if k.startswith("g_") and v is not None] == []
        assert reasons(trace, name)["g_z_norm"] == "no gradient came back"
        assert reasons(trace, name)["g_W_norm"] == "no gradient arrived at this weight"
    assert row(trace, "used")["g_z_norm"] > 0
    assert row(trace, "used")["x_rms"] is not None  # what it reads is cut off: as good as data


def test_where_the_way_up_forks_there_is_no_gain_but_a_reason():
    def forward(net, x):
        h = net.stem(x)
        return net.head(h + torch.tanh(net.branch(h)))

    trace = one_step(Net(forward, stem=seeded(6, 5), branch=seeded(5, 5), head=seeded(5, 3)), data((5, 6)))
    stem, branch = row(trace, "stem"), row(trace, "branch")
    for column in ("backward_gain", "weight_factor", "slope_factor"):
        assert stem[column] is None
        assert reasons(trace, "stem")[column] == "its output is read by 2 layers: the way up forks"
        assert row(trace, "head")[column] is None
        assert reasons(trace, "head")[column] == "the last layer: nothing above it"
    close(branch["backward_gain"], branch["g_z_norm"] / row(trace, "head")["g_z_norm"])
    assert row(trace, "head")["forward_gain"] is None  # two layers feed it
    assert stem["decades"] is not None
    layers = {layer.name: i for i, layer in enumerate(trace.layers)}
    assert trace.layers[layers["branch+"]].parents == (layers["stem"], layers["branch"])
    assert trace.layers[layers["head"]].parents == (layers["branch+"],)


# ---- forms ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    number: int
    logits: torch.Tensor


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda t: {"mask": torch.ones(2, dtype=torch.long), "out": t}, lambda o: o["out"]),
        (lambda t: (torch.ones(2, dtype=torch.long), [t]), lambda o: o[1][0]),
        (lambda t: Output(3, t), lambda o: o.logits),
    ],
    ids=["dict", "tuple", "dataclass"],
)
def test_a_packed_output_is_read_as_the_tensor(pack, unpack):
    class Layer(nn.Linear):
        def forward(self, x):
            return pack(super().forward(x))

    def forward(net, x):
        h = net.a(x)
        return net.b(torch.tanh(h if isinstance(h, torch.Tensor) else unpack(h)))

    x = data((5, 4), dtype=torch.float64)
    packed, plain = (
        one_step(Net(forward, a=a, b=seeded(3, 2)).double(), x) for a in (Layer(4, 3).apply(fill), seeded(4, 3))
    )
    assert row(packed, "a") == row(plain, "a")


def test_a_sparse_embedding():
    tokens, table = torch.tensor([[1, 2, 2], [3, 1, 1]]), data((20, 4))

    def forward(net, tokens):
        return net.head(net.embed(tokens).mean(1))

    sparse, dense = (
        one_step(Net(forward, embed=nn.Embedding(20, 4, _weight=table.clone(), sparse=kind), head=seeded(4, 2)), tokens)
        for kind in (True, False)
    )
    for column in ("z_norm", "g_z_norm", "g_W_norm", "W_rms", "update_ratio"):
        assert row(sparse, "embed")[column] > 0
        close(row(sparse, "embed")[column], row(dense, "embed")[column], rel=1e-6)


class Skip(nn.Module):
    """x + f(x), then f's tanh."""

    def __init__(self):
        super().__init__()
        self.inner, self.squish = seeded(4, 4), nn.Tanh()

    def forward(self, x):
        return self.squish(x + self.inner(x))


def straight(block, x):
    return block(x)


def not_reentrant(block, x):
    return checkpoint(block, x, use_reentrant=False)


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


@pytest.mark.parametrize("mode", [not_reentrant, reentrant])
@pytest.mark.parametrize("every", [1, 2])
def test_a_checkpointed_block_is_counted_once(mode, every):
    """Oracle: the same net without checkpoints, to the last bit; dropout draws the same numbers."""
    traces = []
    for call in (straight, mode):

        def forward(net, x, call=call):
            return net.head(net.relu(call(net.block, call(net.other, net.first(x)))))

        block = nn.Sequential(seeded(4, 4), nn.Tanh(), nn.Dropout(0.5), seeded(4, 4))
        model = Net(forward, first=seeded(4, 4), other=nn.Sequential(seeded(4, 4), nn.Sigmoid()), block=block)
        model.head, model.relu = seeded(4, 2), nn.ReLU()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(0)
        with watch(model, optimizer, every=every) as watching:
            for _ in range(3):
                model(data((5, 4))).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        traces.append(watching.trace)
    assert traces[0].layers == traces[1].layers
    assert traces[0].to_arrow().to_pylist() == traces[1].to_arrow().to_pylist()
    assert traces[0].missing == traces[1].missing
    assert traces[1].meta["unseen"] == []


def test_a_residual_block_in_a_reentrant_checkpoint():
    """All that is measured at a tensor is the same; skip and branch are told apart only without the checkpoint."""
    traces = []
    for call in (straight, reentrant):
        net = Net(lambda net, x, call=call: net.head(call(net.block, net.first(x))), first=seeded(4, 4), block=Skip())
        net.head = seeded(4, 2)
        traces.append(one_step(net, data((5, 4))))
    assert traces[0].layers == traces[1].layers
    plain, again = (trace.to_arrow().drop_columns(["edge_gain"]).to_pylist() for trace in traces)
    for one, other in zip(plain, again, strict=True):
        assert one == other
    assert len(traces[0].edges(0)) == 3
    assert "edge_gain" in reasons(traces[1], "block.inner")


def test_no_hook_is_left_on_a_parameter_or_an_input_that_a_module_gives_out():
    class Query(nn.Linear):
        def forward(self):
            return self.weight

    def forward(net, x):
        return net.head(net.same(x) * net.query())

    model = Net(forward, same=nn.Identity(), query=Query(4, 3), head=seeded(4, 2))
    x = data((3, 4)).requires_grad_()
    trace = one_step(model, x)
    assert row(trace, "query")["g_z_norm"] > 0
    assert not model.query.weight._backward_hooks
    assert not x._backward_hooks


def test_an_expanded_activation_is_measured_once_per_element():
    def forward(net, x):
        return net.b(torch.tanh(net.a(x)).unsqueeze(1).expand(-1, 9, -1))

    model = Net(forward, a=seeded(4, 4), b=seeded(4, 2))
    true = torch.tanh(model.a(data((5, 4)))).detach().norm()
    told = row(one_step(model, data((5, 4))), "a")
    if told["a_norm"] is not None:  # not recognized is allowed, nine times counted is not
        close(told["a_norm"], true, rel=1e-6)


def test_an_output_that_the_loss_reads_too_has_no_gain():
    def forward(net, x):
        h = net.stem(x)
        return h + net.branch(h)

    trace = one_step(Net(forward, stem=seeded(4, 4), branch=seeded(4, 4)), data((5, 4)))
    # |g of stem| holds what came past the branch: over |g of branch| it is no gain of the branch
    assert row(trace, "stem")["backward_gain"] is None
    assert "backward_gain" in reasons(trace, "stem")


def test_a_reason_is_told_once_for_all_passes():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as watching:
        for _ in range(3):
            optimizer.zero_grad()
            (model(data((5, 4), 1)).mean() + model(data((5, 4), 2)).mean()).backward()
            optimizer.step()
    spans = [(m.from_step, m.to_step) for m in watching.trace.missing if m.column == "backward_gain"]
    assert spans == [(0, 2)]


# ---- a model that calls itself ----------------------------------------------------------------------------


class Descending(nn.Module):
    """Calls itself ``depth`` times; ``fails`` at the deepest call, which the one above it forgives."""

    def __init__(self, depth, fails=False):
        super().__init__()
        self.inner, self.depth, self.fails = seeded(4, 4), depth, fails

    def forward(self, x, level=0):
        x = self.inner(x)
        if level == self.depth:
            if self.fails:
                raise ValueError
            return x
        try:
            return self(x, level + 1)
        except ValueError:
            return x


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_calls_itself_is_in_one_pass(fails):
    """The truth: the same layer, written three times in a row."""
    model = Descending(2, fails)
    trace = one_step(model, data((3, 4)))
    if fails:  # the deepest call gave nothing out
        assert "g_z_norm" in reasons(trace, "inner", call=2)
    chain = Net(lambda self, x: self.inner(self.inner(x if fails else self.inner(x))), inner=seeded(4, 4))
    truth = one_step(chain, data((3, 4)))
    for call in range(2 if fails else 3):
        assert row(trace, "inner", call)["g_z_norm"] == row(truth, "inner", call)["g_z_norm"]


def test_a_pass_that_failed_leaves_the_next_one_its_place():
    model = Net(lambda self, x: self.low(x) if x.dim() == 2 else self.high(x), low=seeded(4, 4), high=seeded(3, 3))
    with watch(model) as watching:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="mat1"):
                model(data((1, 2, 2)))
            model(data((2, 4))).square().mean().backward()
        watching.step()
    told = [(r["layer"], r["call"], r["backward"]) for r in watching.trace.to_arrow().to_pylist()]
    assert told == [("low", 0, 0), ("low", 0, 1)]


def test_passes_of_an_unfinished_step_do_not_keep_their_graphs():
    """A validation loop with gradient; the twin: what is held while its output lives."""
    model, alive = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), []

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark = Mark()
            alive.append(weakref.ref(ctx.mark))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    class Mark:
        pass

    model.append(type("Noted", (nn.Module,), {"forward": lambda self, x: Note.apply(x)})())
    with watch(model):
        kept = [model(torch.ones(2, 4)) for _ in range(100)]
        assert sum(mark() is not None for mark in alive) == 100
        del kept
        gc.collect()
        assert sum(mark() is not None for mark in alive) <= 5
