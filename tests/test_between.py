"""Functions between modules: named, and what they pass on, against autograd asked at both ends in a second run."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_sums import TOKENS, Net, PreNorm, X, norms, rows, step
from torch import nn
from torch.nn import functional as F

from bpdiag import Trace, diagnosis, watch
from bpdiag.diagnosis import between

torch.set_num_threads(1)


def named(trace):
    """(reader, parent) -> the functions between them."""
    return {
        (la.short, trace.layers[p].short): way
        for la in trace.layers
        for p, way in zip(la.parents, la.gap, strict=bool(la.gap))
        if way
    }


def gains(trace):
    return {(trace.layers[r].short, trace.layers[p].short): gain for (r, p), gain in trace.gaps(0).items()}


def attended(net, x, note):
    """Queries, keys and values by layers of their own; a sequence of the batch's samples, two heads."""
    q, k, v = (note(name, layer(x)) for name, layer in (("a", net.a), ("b", net.b), ("c", net.c)))
    q, k, v = (t.view(5, 2, 3).transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    return net.head(note("out", F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).reshape(5, 6)))


def test_attention_is_a_gap_with_a_gain_for_each_of_its_sources():
    model = Net(attended)
    true, trace = norms(model), step(model)
    told = gains(trace)
    assert set(told) == {("head", source) for source in "abc"}
    for source in "abc":
        assert told["head", source] == pytest.approx(true[source] / true["out"], rel=1e-12)
        names = named(trace)["head", source]
        assert "scaled_dot_product_attention" in names
        assert names[:2] == ("view", "transpose")


def handmade(net, x, note):
    """What lies below the functions is read elsewhere too."""
    x = net.a(x)
    y = note("out", note("into", x * 1).softmax(1).cumsum(1))
    return net.head(y) + net.b(x)[:, :2]


GAPS = {
    "several": (lambda net, x, note: net.head(note("out", note("a", net.a(x)).exp() * 2)), ("exp", "mul")),
    "before a norm": (lambda net, x, note: net.head(net.norm(note("out", note("a", net.a(x)).sin()))), ("sin",)),
    "views": (
        lambda net, x, note: net.head(note("out", note("a", net.a(x)).flip(0).t().cos().t())),
        ("flip", "t", "cos"),
    ),
}


@pytest.mark.parametrize("name", GAPS)
def test_a_gap_has_its_names_and_its_gain(name):
    put, names = GAPS[name]
    model = Net(put)
    true, trace = norms(model), step(model)
    reader = "norm" if name == "before a norm" else "head"
    assert named(trace)[reader, "a"] == names
    assert gains(trace) == {(reader, "a"): pytest.approx(true["a"] / true["out"], rel=1e-12)}


def test_where_the_way_is_one_of_several_what_it_alone_carries_counts():
    model = Net(handmade)
    true, trace = norms(model), step(model)
    assert gains(trace)["head", "a"] == pytest.approx(true["into"] / true["out"], rel=1e-12)


def test_what_moves_numbers_about_is_named_and_not_measured():
    model = Net(lambda net, x, note: net.head(net.a(x).view(5, 2, 3).transpose(1, 2).transpose(1, 2).view(5, 6)))
    trace = step(model)
    assert named(trace)["head", "a"] == ("view", "transpose")
    assert gains(trace) == {}


def test_a_chain_of_modules_has_no_gap():
    model = Net(lambda net, x, note: net.head(net.norm(net.a(x))))
    assert named(step(model)) == {}


def test_an_activation_that_is_a_function_stands_on_the_row_below_as_ever():
    trace = step(Net(lambda net, x, note: net.head(F.relu(net.a(x)))))
    assert named(trace) == {}
    assert trace.layers[0].activation == "relu"


def test_on_the_ways_to_a_sum_each_has_its_own():
    model = Net(lambda net, x, note: net.head(note("sum", (y := net.a(x)) + 0.5 * note("b", net.b(y)).sin())))
    true, trace = norms(model), step(model)
    assert named(trace) == {("b+", "b"): ("sin", "mul")}
    assert gains(trace) == {("b+", "b"): pytest.approx(true["b"] / true["sum"], rel=1e-12)}


class Both(nn.Module):
    def forward(self, x, y):
        return x * y


def test_of_a_reader_of_several_it_is_not_known():
    model = Net(lambda net, x, note: net.head(net.both(net.a(x).exp(), net.b(x))))
    model.both = Both()
    trace = step(model)
    assert gains(trace) == {}
    (reason,) = [m.reason for m in trace.missing if m.column == "gap_gain"]
    assert reason == "it has several inputs, or works in place: what it sends is not known"


def test_what_stands_inside_a_module_is_no_gap():
    """Squeeze, say: a module with functions in it, and one with modules in it too."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(())), nn.Linear(6, 6)

        def forward(self, x):
            return self.inner(x).exp() * self.scale

    model = Net(lambda net, x, note: net.head(net.own(net.both(y := net.a(x), y))))
    model.both, model.own = Both(), Scaled().double()
    assert named(step(model)) == {}


# ---- shown ------------------------------------------------------------------------------------------------


def test_the_words():
    trace = step(PreNorm(), TOKENS)
    words = between.in_words(trace, 0)
    assert words.startswith("functions between layers pass on, of what comes to them: ")
    assert "scaled_dot_product_attention" in words
    assert " in 3 places" in words
    assert f"at step 0 {words}" in diagnosis.notes(trace)
    assert between.in_words(step(Net(lambda net, x, note: net.head(net.a(x)))), 0) == ""


def test_of_one_kind_median_and_span_are_told():
    model = Net(lambda net, x, note: net.head(2 * net.c(0.5 * net.b(0.5 * net.a(x)))))
    assert between.in_words(step(model), 0).endswith(": mul 0.5 (0.5 to 2) in 3 places")


def test_they_survive_the_disk_and_are_on_the_dashboard(tmp_path):
    model = Net(attended)
    model.noted = None
    with watch(model, log=tmp_path / "run") as watching:
        model(X).square().sum().backward()
        watching.step()
    loaded = Trace.load(tmp_path / "run")
    assert loaded.layers == watching.trace.layers
    assert loaded.gaps(0) == watching.trace.gaps(0) != {}
    board = EventAccumulator(str(tmp_path / "run")).Reload()
    shown = {tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"] if tag.startswith("gain/gap/")}
    assert shown == pytest.approx({f"gain/gap/{r}_from_{p}": gain for (r, p), gain in gains(loaded).items()})


def test_the_twin_without_the_way_in_between():
    """Against the reader's own cotangent, as an edge's is, a gap's gain would hold the reader's weights."""
    model = Net(GAPS["several"][0])
    true, trace = norms(model), step(model)
    assert rows(trace)["head"]["g_z_norm"] != pytest.approx(true["out"], rel=1e-3)
