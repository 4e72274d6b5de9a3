"""A weight's gradient before and after what is done to it between backward and step.  Oracle: a run left alone."""

import pytest
import torch
from torch import nn

from bpdiag import diagnosis, watch

torch.set_num_threads(1)

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def run(change=lambda model: None, steps=2, scaler=None, lr=0.0, **options):
    """Steps that leave the weights as they are, so that every step has the same gradients."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with watch(model, optimizer, scaler=scaler, **options) as watching:
        for _ in range(steps):
            loss = watching.loss(model(X).square().mean())
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.unscale_(optimizer)
            change(model)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad()
    return watching.trace


def norms(trace, at, name):
    values, there = trace.column(name)
    return values[at][there[at]].tolist()


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def replaced(model):
    for p in model.parameters():
        p.grad = p.grad / 3


@pytest.mark.parametrize("change", [clip, replaced])
def test_both_are_kept(change):
    untouched, trace = run(), run(change)
    for at in (0, 1):
        assert norms(trace, at, "g_W_raw_norm") == norms(untouched, at, "g_W_norm")
        after = norms(trace, at, "g_W_norm")
        assert all(a < 0.9 * b for a, b in zip(after, norms(untouched, at, "g_W_norm"), strict=True))
    assert not [m for m in trace.missing if m.column == "g_W_raw_norm"]


def test_gradients_whose_backward_was_not_watched_are_told_without_it():
    model = net()
    model(X).square().mean().backward()
    with watch(model) as watching:
        with torch.enable_grad():
            model(X)
        watching.step()
    assert norms(watching.trace, 0, "g_W_raw_norm") == []
    assert len(norms(watching.trace, 0, "g_W_norm")) == 2
    reasons = {(m.column, m.reason) for m in watching.trace.missing if m.column == "g_W_raw_norm"}
    assert reasons == {("g_W_raw_norm", "the backward that left it was not watched")}


def test_without_clipping_they_are_one():
    trace = run()
    for at in (0, 1):
        assert norms(trace, at, "g_W_raw_norm") == norms(trace, at, "g_W_norm")
        assert len(norms(trace, at, "g_W_norm")) == 2


def test_the_notes_tell_how_much():
    trace = run(replaced)
    (note,) = [note for note in diagnosis.notes(trace) if "between backward and step" in note]
    assert "at step 1 to 0.33 of their norm" in note
    assert not any("between backward" in note for note in diagnosis.notes(run()))


def test_a_scalers_factor_is_divided_out_of_both():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    trace, untouched = run(clip, scaler=scaler), run()
    assert norms(trace, 1, "g_W_raw_norm") == norms(untouched, 1, "g_W_norm")
    assert norms(trace, 1, "g_W_norm") == norms(run(clip), 1, "g_W_norm")


def test_micro_batches_are_added_up_before():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer) as watching:
        for _ in range(2):
            for part in X.split(2):
                (watching.loss(model(part).square().mean()) / 4).backward()
            clip(model)
            optimizer.step()
            optimizer.zero_grad()
    assert norms(watching.trace, 1, "g_W_raw_norm") == pytest.approx(norms(run(), 1, "g_W_norm"), rel=1e-6)
    assert norms(watching.trace, 1, "g_W_norm") == pytest.approx(norms(run(clip), 1, "g_W_norm"), rel=1e-6)


def test_what_comes_to_a_weight_after_its_step_is_not_its_gradient():
    """A GAN: the generator's loss goes through the discriminator, which has stepped."""
    torch.manual_seed(1)
    both = nn.ModuleDict({"G": nn.Linear(6, 6), "D": nn.Linear(6, 1)})
    og, od = (torch.optim.SGD(both[name].parameters(), lr=0.1) for name in "GD")
    right = []
    with watch(both, [od, og]) as watching:
        for _ in range(2):
            fake = both["G"](X)
            od.zero_grad()
            (both["D"](X).square() - both["D"](fake.detach())).mean().backward()
            right.append(both["D"].weight.grad.norm().item())
            od.step()
            og.zero_grad()
            both["D"](fake).mean().backward()
            assert abs(both["D"].weight.grad.norm().item() / right[-1] - 1) > 0.05  # the twin: what is there in the end
            og.step()
    trace = watching.trace
    i = next(i for i, layer in enumerate(trace.layers) if layer.key == "D#0")
    for column in ("g_W_norm", "g_W_raw_norm"):
        assert trace.column(column)[0][:, i].tolist() == pytest.approx(right, rel=1e-6), column
    assert not any("between backward" in note for note in diagnosis.notes(trace))


def test_no_hook_is_left_on_a_weight():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, every=2):
        assert all(p._post_accumulate_grad_hooks for p in (model[0].weight, model[2].weight))
        model(X).sum().backward()
        optimizer.step()
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def critic_and_generator(clear):
    """A critic watched alone, whose gradient the generator's loss goes through between its steps."""
    torch.manual_seed(1)
    G, D = nn.Linear(6, 6), nn.Linear(6, 1)
    og, od = (torch.optim.SGD(net.parameters(), lr=0.01) for net in (G, D))
    with watch(D, od) as watching:
        for _ in range(12):
            fake = G(X)
            if clear:
                od.zero_grad(set_to_none=clear == "none")
            watching.loss((D(X).square() - D(fake.detach())).mean()).backward()
            od.step()
            og.zero_grad()
            D(fake).mean().backward()
            og.step()
    return watching.trace


@pytest.mark.parametrize("clear", ["none", "zeros"])
def test_a_critics_gradient_that_is_cleared_before_its_own_backward_is_not_stale(clear):
    trace = critic_and_generator(clear)
    assert [f.kind for f in diagnosis.diagnose(trace) if f.kind == "stale_gradient"] == []
    assert norms(trace, 5, "g_W_stale_norm") == [0.0]


def test_the_twin_that_is_never_cleared_is():
    trace = critic_and_generator("")
    assert [f.kind for f in diagnosis.diagnose(trace) if f.kind == "stale_gradient"] == ["stale_gradient"]


def test_of_two_optimizers_the_one_that_never_clears_is_named():
    torch.manual_seed(1)
    both = nn.ModuleDict({"G": nn.Linear(6, 6), "D": nn.Linear(6, 1)})
    og, od = (torch.optim.SGD(both[name].parameters(), lr=0.001) for name in "GD")
    with watch(both, [od, og]) as watching:
        for _ in range(20):
            fake = both["G"](X)
            od.zero_grad()
            (both["D"](X).square() - both["D"](fake.detach())).mean().backward()
            od.step()
            watching.loss(both["D"](fake).mean()).backward()
            og.step()
    (found,) = [f for f in diagnosis.diagnose(watching.trace) if f.kind == "stale_gradient"]
    assert found.layers == ("G#0",)
