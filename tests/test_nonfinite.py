"""Which sample of a batch spoils a step, told by the recorder; the oracle is where the test put it."""

import pytest
import torch
from torch import nn

from bpdiag import diagnose, watch

torch.set_num_threads(1)

INF, NAN = torch.inf, torch.nan


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * 9, 2))


def batch(*bad, value=NAN, shape=(6, 4)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for i in bad:
        x[i].view(-1)[1] = value
    return x


def told(model, x, loss=lambda out: out.square().mean(), steps=1):
    """name of a layer -> the sample it names, at step 0; and the trace."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as watching:
        for _ in range(steps):
            loss(model(x)).backward()
            optimizer.step()
    rows = watching.trace.to_arrow().to_pylist()
    return {r["layer"]: r["nonfinite_sample"] for r in rows if r["step"] == 0}, watching.trace


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(("make", "shape"), [(mlp, (6, 4)), (cnn, (6, 4, 3, 3))], ids=["mlp", "cnn"])
def test_one_bad_sample_is_named(make, shape, value):
    samples, trace = told(make(), batch(4, value=value, shape=shape))
    assert samples["0"] == 4
    (finding,) = [f for f in diagnose(trace) if f.kind == "non_finite"]
    assert "in the input of 0 (" in finding.sentence
    assert "in sample 4 of the batch alone" in finding.sentence


@pytest.mark.parametrize("bad", [(), (0, 5)], ids=["none", "two"])
def test_none_or_several_name_none(bad):
    samples, _ = told(mlp(), batch(*bad))
    assert samples == {"0": None, "1": None, "2": None}


def test_a_sample_that_overflows_in_the_forward_pass():
    x = batch()
    x[2] = 1e30
    model = mlp()
    with torch.no_grad():
        model[0].weight.mul_(1e20)
    samples, trace = told(model, x)
    assert samples["0"] == 2
    (finding,) = [f for f in diagnose(trace) if f.kind == "non_finite"]
    assert "in the output of 0 (linear), in sample 2 of the batch alone" in finding.sentence


def test_a_sample_that_breaks_on_the_way_back():
    def root(out):  # sqrt has an infinite slope at 0
        spoiled = torch.ones(6, 2)
        spoiled[3] = 0
        return (out * spoiled).abs().sqrt().sum()

    samples, trace = told(mlp(), batch(), root)
    assert samples["2"] == 3
    (finding,) = [f for f in diagnose(trace) if f.kind == "non_finite"]
    assert "in the cotangent of 2 (linear), in sample 3 of the batch alone" in finding.sentence


def test_a_finite_step_names_none_and_reads_once(monkeypatch):
    reads = []
    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t.shape) or read(t))
    told(mlp(), batch())
    assert len(reads) == 1
    reads.clear()
    told(mlp(), batch(4))
    assert len(reads) > 1  # where it is needed it is paid


def test_samples_with_a_nan_and_with_an_infinity_are_counted_apart():
    x = batch(1, 4)
    x[2], x[3, 0], x[5, 3] = INF, -INF, INF
    x[4, 2] = INF  # it holds a nan too
    trace = told(nn.Sequential(nn.Identity(), nn.Linear(4, 2, bias=False)), x)[1]
    (row,) = [row for row in trace.to_arrow().to_pylist() if row["layer"] == "1"]
    assert (row["nan_samples"], row["inf_samples"], row["nonfinite_sample"]) == (2.0, 3.0, None)
    (finding,) = [f for f in diagnose(trace) if f.kind == "non_finite"]
    assert (finding.evidence["nan_samples"], finding.evidence["inf_samples"]) == (2.0, 3.0)
    (row, *_) = told(mlp(), batch())[1].to_arrow().to_pylist()
    assert row["nan_samples"] is row["inf_samples"] is None  # the twin: missing is not 0
