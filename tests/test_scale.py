"""The scale of a loss is divided out, whoever put it there; a skipped step is a step.  Oracle: the unscaled run."""

import copy
import pickle

import pytest
import torch
from torch import nn

from bpdiag import Trace, diagnose, diagnosis, watch
from bpdiag.config import UsageError

torch.set_num_threads(1)

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
COTANGENTS = ("g_z_norm", "g_a_norm", "g_z_rms", "backward_gain", "weight_factor", "decades")


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def loss_of(model, x=X):
    return model(x).square().mean()


def plain(steps=1):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as watching:
        for _ in range(steps):
            watching.loss(loss_of(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return watching.trace


def scaled(told, init_scale=2.0**16, steps=1, give=True, overflow=(), **options):
    """A run under GradScaler; ``told``: when the loss is told.  Overflow: steps whose gradient is made infinite."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, backoff_factor=0.5)
    with watch(model, optimizer, scaler=scaler if give else None, **options) as watching:
        for step in range(steps):
            loss = loss_of(model)
            loss = watching.loss(loss) if told == "before" else loss
            scaler.scale(loss * torch.inf if step in overflow else loss).backward()
            if told == "after":
                watching.loss(loss)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return watching, model


def columns(trace, at=0):
    """Cotangents as they were measured, by layer."""
    return {name: trace.column(name)[0][at][trace.column(name)[1][at]].tolist() for name in COTANGENTS}


def scales(trace):
    return trace.steps_table["loss_scale"].to_pylist()


def test_a_scalers_scale_is_divided_out_and_kept():
    """2^16 is exact in binary: the last bit is right."""
    watching, _ = scaled("before")
    assert columns(watching.trace) == columns(plain())
    assert scales(watching.trace) == [2.0**16]


def test_an_untold_scale_is_unknown_and_left_in():
    """The twin: what the division does is seen where it cannot be done."""
    watching, _ = scaled("after")
    one, other = columns(watching.trace)["g_z_norm"], columns(plain())["g_z_norm"]
    assert one == pytest.approx([2.0**16 * g for g in other])
    assert scales(watching.trace) == [None]
    assert "scale is unknown" in watching.trace.meta["provenance"]["cotangents"]
    assert columns(watching.trace)["decades"] == pytest.approx(columns(plain())["decades"])


def test_micro_batches_have_each_its_own():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as watching:
        for part in X.split(4):
            (watching.loss(loss_of(model, part)) / 4).backward()
        optimizer.step()
    trace = watching.trace
    for number, part in enumerate(X.split(4)):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer) as alone:
            loss_of(model, part).backward()
            optimizer.step()
        told = [r["g_z_norm"] for r in trace.to_arrow().to_pylist() if r["backward"] == number]
        assert told == [r["g_z_norm"] for r in alone.trace.to_arrow().to_pylist()]
    assert scales(trace) == [0.25]


def test_two_losses_of_one_pass_with_two_scales_have_none():
    model = net()
    with watch(model) as watching:
        out = model(X)
        (2 * watching.loss(out.square().mean()) + 3 * watching.loss(out.mean())).backward()
        watching.step()
    assert scales(watching.trace) == [None]


def test_two_losses_of_one_scale_have_it():
    model = net()
    with watch(model) as watching:
        out = model(X)
        (8 * (watching.loss(out.square().mean()) + watching.loss(out.mean()))).backward()
        watching.step()
    assert scales(watching.trace) == [8.0]


@pytest.mark.parametrize("factor", [0.0, torch.inf])
def test_a_scale_that_cannot_be_divided_by_is_unknown(factor):
    model = net()
    with watch(model) as watching:
        (watching.loss(loss_of(model)) * factor).backward()
        watching.step()
    assert scales(watching.trace) == [None]


def test_edges_are_divided_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.first, self.inner, self.join = nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh()

        def forward(self, x):
            x = self.first(x)
            return self.join(x + self.inner(x))

    told = []
    for factor in (1, 1024):
        model = Block()
        with watch(model) as watching:
            (watching.loss(loss_of(model)) * factor).backward()
            watching.step()
        told.append(watching.trace.edges(0))
    assert told[0] == told[1]
    assert len(told[0]) == 3


# ---- skipped steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
def test_a_skipped_step_is_a_step_of_its_own_and_no_fault(every, tmp_path):
    watching, _ = scaled("before", steps=6, overflow=(2,), every=every, log=tmp_path / "run")
    trace = watching.trace
    assert watching.steps == 6
    assert list(trace.sampled_steps) == list(range(0, 6, every))
    assert [r["step"] for r in trace.steps_table.to_pylist() if r["skipped"]] == [2]
    assert list(trace.skipped) == [step == 2 for step in trace.sampled_steps]
    assert diagnose(trace) == []
    reasons = {m.reason for m in trace.missing if m.column == "update_ratio" and m.from_step == 2}
    assert reasons == {"the gradient scaler skipped this step"}
    assert list(Trace.load(tmp_path / "run").skipped) == list(trace.skipped)


def test_without_the_scaler_a_skipped_step_merges_with_the_next():
    """The twin: only the scaler knows."""
    watching, _ = scaled("before", steps=6, overflow=(2,), give=False)
    assert watching.steps == 5
    assert [f.kind for f in diagnose(watching.trace)] == ["non_finite"]


def test_numbers_that_stay_infinite_are_a_fault():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as watching:
        for factor in (1, torch.inf, torch.inf):
            (loss_of(model) * factor).backward()
            optimizer.step()
    assert [f.kind for f in diagnose(watching.trace)] == ["non_finite"]


def test_watching_a_scaled_run_changes_no_bit():
    _, watched = scaled("before", steps=5, overflow=(1,))
    model = net()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step in range(5):
        loss = loss_of(model)
        scaler.scale(loss * torch.inf if step == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all(map(torch.equal, watched.parameters(), model.parameters()))


def test_a_scaler_is_given_back_and_copies_of_it_tell_nobody():
    model = net()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    with watch(model, optimizer, scaler=scaler) as watching:
        for copied in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
            scaler.scale(loss_of(model)).backward()
            copied.scale(loss_of(model)).backward()
            copied.step(optimizer)
            before = copied.get_scale()
            copied.update(before * 2)
            assert copied.get_scale() == before * 2
            assert scaler.get_scale() == before
        assert watching.steps == 0
    assert "update" not in vars(scaler)


def test_what_is_no_scaler_is_refused():
    with pytest.raises(UsageError, match=r"scaler: a torch\.amp\.GradScaler or None; got float"):
        watch(net(), scaler=65536.0)


def test_the_notes_say_that_the_scale_is_unknown():
    model = net()
    with watch(model) as watching:
        loss_of(model).backward()
        watching.step()
    assert any("and its scale, are unknown" in note for note in diagnosis.notes(watching.trace))
