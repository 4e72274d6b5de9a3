"""watch(): it changes nothing, leaves nothing, samples when it says, refuses what it cannot use."""

import math
import weakref
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18

from bpdiag import watch
from bpdiag.config import ModelConfig, UsageError
from bpdiag.model import build

torch.set_num_threads(1)


def data(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def train(model, optimizer, watching=None, steps=1, seed=1):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(data((6, 4), seed)).square().mean()
        (watching.loss(loss) if watching else loss).backward()
        optimizer.step()


def rows(trace, layer):
    return [r for r in trace.to_arrow().to_pylist() if r["layer"] == layer]


def hooks(model):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, table)) for m in model.modules() for table in tables)


def optimizer_hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def relative_change(after, before):
    return float((after.detach() - before).double().norm() / before.double().norm())


class Functional(nn.Module):
    """Function calls, in place and random; one layer called twice; a residual branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = F.dropout(F.relu(self.stem(x), inplace=True), 0.4)
        for _ in range(2):
            h = h + torch.tanh(self.branch(h))
        return self.head(h)


# ---- nothing changes --------------------------------------------------------------------------------------


def noisy_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4 * 6 * 6, 5),
    )


NETS = {
    "resnet18": (lambda: resnet18(num_classes=5), (8, 3, 32, 32)),
    "functional": (Functional, (8, 6)),
    "ours": (lambda: build(ModelConfig(depth=4, width=7, activation="sigmoid"), 6, 3, seed=3), (8, 6)),
    "dropout_batchnorm": (noisy_cnn, (8, 3, 8, 8)),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
}


@contextmanager
def no_watcher(model, optimizer, every):
    yield


def footprint(net, optimizer_name, watcher, every=1, steps=3):
    """Every bit of a training: losses, gradients, weights, buffers, optimizer state, random state, after each step."""
    make, shape = NETS[net]
    torch.manual_seed(0)
    model = make()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    x, bits = data(shape), []

    def note(name, tensor):
        bits.append((name, tensor.dtype, tuple(tensor.shape), tensor.detach().numpy().tobytes()))

    with watcher(model, optimizer, every=every):
        for step in range(steps):
            optimizer.zero_grad()
            out = model(x)
            loss = F.cross_entropy(out, torch.arange(8) % out.shape[1])
            loss.backward()
            note(f"{step} loss", loss)
            for name, p in model.named_parameters():
                note(f"{step} gradient of {name}", p.grad)
            optimizer.step()
            for name, tensor in model.state_dict().items():
                note(f"{step} {name}", tensor)
            note(f"{step} random state", torch.get_rng_state())
    for i, state in enumerate(optimizer.state.values()):
        for name, tensor in state.items():
            note(f"optimizer {name} {i}", tensor)
    return bits


def changed(bits, twin):
    assert [b[0] for b in bits] == [b[0] for b in twin]
    return [a[0] for a, b in zip(bits, twin, strict=True) if a != b]


@pytest.mark.parametrize(("net", "optimizer"), [p for p in product(NETS, OPTIMIZERS) if p != ("resnet18", "sgd")])
def test_watching_changes_no_bit(net, optimizer):
    alone = footprint(net, optimizer, no_watcher)
    for every in (1, 2):
        assert changed(alone, footprint(net, optimizer, watch, every)) == []


@contextmanager
def bad_watcher(model, hook):
    for module in model.modules():
        module.register_forward_hook(hook)
    yield


def draws(module, args, out):
    torch.rand(())


def scales_a_cotangent(module, args, out):
    out.register_hook(lambda g: g * (1 + 2**-20))


def counts_a_batch_twice(module, args, out):
    if isinstance(module, nn.BatchNorm2d):
        module.num_batches_tracked += 1


def nudges_a_weight(module, args, out):
    for p in module.parameters():
        p.data[(0,) * p.dim()] += 1e-6  # .data: autograd does not notice


@pytest.mark.parametrize("hook", [draws, scales_a_cotangent, counts_a_batch_twice, nudges_a_weight])
def test_a_bad_watcher_is_caught(hook):
    alone = footprint("dropout_batchnorm", "sgd", no_watcher, steps=2)
    assert changed(alone, footprint("dropout_batchnorm", "sgd", no_watcher, steps=2)) == []
    assert changed(alone, footprint("dropout_batchnorm", "sgd", lambda m, o, every: bad_watcher(m, hook), steps=2))


# ---- life -------------------------------------------------------------------------------------------------


def test_no_hook_on_an_unsampled_step():
    model, seen = mlp(), []
    optimizer = sgd(model)
    with watch(model, optimizer, every=3) as watching:
        for _ in range(7):
            seen.append(hooks(model))
            train(model, optimizer, watching)
    assert [count > 0 for count in seen] == [True, False, False, True, False, False, True]
    assert list(watching.trace.sampled_steps) == [0, 3, 6]
    assert list(watching.trace.losses[0]) == list(range(7))
    assert watching.steps == 7


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "forward", "backward", "step", "after"])
def test_nothing_is_left_whatever_happens(when, error):
    class Last(nn.Linear):
        broken = False

        def forward(self, x):
            if self.broken:
                raise error("inside the model")
            out = super().forward(x)
            if when == "backward":
                out.register_hook(self.cry)
            return out

        @staticmethod
        def cry(g):
            raise error("inside the backward")

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Last(5, 2))
    optimizer = sgd(model)
    weights, watching = [p.detach().clone() for p in model.parameters()], watch(model, optimizer)

    def run():
        with watching:
            assert optimizer_hooks(optimizer) == 2
            model[2].broken = when == "forward"
            if when == "before":
                raise error
            watching.loss(model(data((6, 4))).square().mean()).backward()
            if when == "step":
                raise error
            optimizer.step()
            raise error

    with pytest.raises(error):
        run()
    assert hooks(model) == optimizer_hooks(optimizer) == 0
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True)) == (when != "after")
    assert len(watching.trace.sampled_steps) == (when in ("step", "after"))


def test_the_users_own_hooks_survive():
    model, ran = mlp(), []
    optimizer = sgd(model)
    model[0].register_forward_hook(lambda *_: ran.append("outer"))
    optimizer.register_step_post_hook(lambda *_: ran.append("optimizer"))
    with watch(model, optimizer):
        model[0].register_forward_hook(lambda *_: ran.append("inner"))
        model[2].weight.register_hook(lambda g: ran.append("weight"))
        train(model, optimizer)
    ran.clear()
    train(model, optimizer)
    assert ran == ["outer", "inner", "weight", "optimizer"]
    assert (hooks(model), optimizer_hooks(optimizer)) == (2, 1)


def test_a_block_left_before_the_update_keeps_the_gradients_and_says_so():
    model = mlp()
    with watch(model, sgd(model)) as watching:
        watching.loss(model(data((6, 4))).square().mean()).backward()
    (told,) = rows(watching.trace, "0")
    assert told["g_z_norm"] > 0
    assert told["g_W_norm"] == pytest.approx(float(model[0].weight.grad.norm()), rel=1e-6)
    assert told["update_ratio"] is told["dW_rms"] is None
    why = {(m.layer, m.column): m.reason for m in watching.trace.missing}
    assert why["0", "update_ratio"] == why["0", "dW_rms"] == "the watching ended before the update"
    assert len(watching.trace.losses[0]) == 1


def test_without_an_optimizer_step_ends_the_step():
    model = mlp()
    with watch(model, every=2) as watching:
        for step in range(3):
            model.zero_grad()
            watching.loss(model(data((6, 4))).square().mean()).backward()
            before, norm = model[0].weight.detach().clone(), float(model[0].weight.grad.norm())
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            watching.step()
            assert watching.steps == step + 1
            assert (hooks(model) > 0) == (step == 1)
    assert list(watching.trace.sampled_steps) == [0, 2]
    last = rows(watching.trace, "0")[-1]
    assert last["update_ratio"] == pytest.approx(relative_change(model[0].weight, before), rel=1e-6)
    assert last["g_W_norm"] == pytest.approx(norm, rel=1e-6)
    assert watching.trace.meta["optimizer"] == {}


def test_of_several_optimizers_the_last_ends_the_step_and_each_update_is_its_own():
    model = mlp()
    first, last = sgd(model[0], lr=0.3), sgd(model[2])
    before = {name: model[int(name)].weight.detach().clone() for name in "02"}
    with watch(model, [first, last]) as watching:
        model(data((6, 4))).square().mean().backward()
        met = float(model[0].weight.grad.norm())
        first.step()
        assert watching.steps == 0
        model(data((6, 4), 2)).mean().backward()  # as a GAN's generator also sends gradients to its discriminator
        last.step()
        assert watching.steps == 1
    for name in "02":
        expected = relative_change(model[int(name)].weight, before[name])
        assert rows(watching.trace, name)[0]["update_ratio"] == pytest.approx(expected, rel=1e-6), name
    assert rows(watching.trace, "0")[0]["g_W_norm"] == pytest.approx(met, rel=1e-6)
    assert optimizer_hooks(first) == optimizer_hooks(last) == 0


def test_a_step_with_a_closure_is_measured_as_any_other():
    def run(closed):
        model = mlp()
        optimizer = sgd(model)

        def closure():
            optimizer.zero_grad()
            loss = model(data((6, 4))).square().mean()
            loss.backward()
            return loss

        with watch(model, optimizer) as watching:
            for _ in range(2):
                if closed:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
        return watching.trace.to_arrow().to_pylist()

    assert run(True) == run(False)


def test_an_evaluation_without_grad_is_not_recorded():
    def run(*contexts):
        model = mlp()
        optimizer = sgd(model)
        with watch(model, optimizer) as watching:
            for _ in range(2):
                for context in contexts:
                    with context():
                        model(data((9, 4), 5))
                train(model, optimizer)
        return watching.trace.to_arrow().to_pylist()

    assert run(torch.no_grad, torch.inference_mode) == run()


def grown(model):
    model.append(nn.Linear(2, 3))


def replaced(model):
    model[2] = nn.Linear(5, 2)


def new_weight(model):
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)


def thawed(model):
    model[0].weight.requires_grad_()


@pytest.mark.parametrize("change", [grown, replaced, new_weight, thawed])
def test_a_model_changed_between_two_sampled_steps_is_watched_as_it_is(change):
    """Hooks stand while every step is sampled; the oracle is a watch begun after the change."""

    def run(begun_before):
        model = mlp()
        model[0].weight.requires_grad_(change is not thawed)
        if not begun_before:
            torch.manual_seed(7)
            change(model)
        with watch(model, planned_steps=9) as watching:
            if begun_before:
                train(model, watching, steps=1)
                torch.manual_seed(7)
                change(model)
            train(model, watching, steps=2)  # a step is armed when the one before it ends: the second has seen it
        count = hooks(model)
        rows = watching.trace.to_arrow().to_pylist()
        told = [{k: v for k, v in r.items() if k != "step"} for r in rows if r["step"] == rows[-1]["step"]]
        return told, count, sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())

    def train(model, watching, steps):
        for _ in range(steps):
            model.zero_grad()
            model(data((6, 4))).square().mean().backward()
            watching.step()

    before, after = run(True), run(False)
    columns = ("z_norm", "g_z_norm", "g_W_norm", "g_W_raw_norm", "W_rms", "a_norm", "slope_rms")
    assert [[r["layer"], *(r[c] and pytest.approx(r[c], rel=1e-6) for c in columns)] for r in after[0]] == [
        [r["layer"], *(r[c] for c in columns)] for r in before[0]
    ]
    assert before[1:] == after[1:] == (0, 0)


# ---- the face ---------------------------------------------------------------------------------------------


def test_wrong_arguments():
    model = mlp()
    for wrong in ({"every": 0}, {"every": -1}, {"every": "2"}, {"every": 1.5}, {"planned_steps": 0}):
        with pytest.raises(UsageError, match="must be a whole number, 1 or more"):
            watch(model, **wrong)
    for wrong in ("adam", model.parameters(), [sgd(model), None], torch.optim.SGD):
        with pytest.raises(UsageError, match=r"torch\.optim\.Optimizer"):
            watch(model, wrong)
    with pytest.raises(UsageError, match=r"torch\.nn\.Module"):
        watch(model.forward)
    one = sgd(model)
    with pytest.raises(UsageError, match="given twice"):
        watch(model, [one, one])
    with pytest.raises(UsageError, match="log: a folder's path or None; got int"):
        watch(model, log=3)
    with pytest.raises(UsageError, match="is no folder"), watch(model, log=__file__):
        pass


def test_a_watch_is_used_once_and_inside_with():
    model = mlp()
    watching = watch(model)
    for use in (lambda: watching.trace, lambda: watching.loss(torch.ones(())), watching.step, lambda: watching.steps):
        with pytest.raises(UsageError, match=r"with bpdiag\.watch"):
            use()
    assert hooks(model) == 0
    with watching:
        assert len(watching.trace.sampled_steps) == 0
    with pytest.raises(UsageError, match="has been used"), watching:
        pass
    assert hooks(model) == len(watching.trace.sampled_steps) == 0


def test_loss_returns_the_very_tensor_and_notes_what_it_was():
    model = mlp()
    optimizer = sgd(model)
    with watch(model, optimizer) as watching:
        assert math.isnan(watching.last_loss)
        loss = model(data((6, 4))).square().mean()
        value = loss.item()
        assert watching.loss(loss) is loss
        loss /= 4  # as loops that accumulate gradients do
        loss.backward()
        optimizer.step()
        assert watching.last_loss == watching.trace.losses[1][0]
    assert watching.last_loss == value


def test_a_report_in_words_inside_and_after(capsys, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(20, 20), nn.Sigmoid())], nn.Linear(20, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log=tmp_path / "mine") as watching:
        watching.report()
        assert "Nothing was measured" in capsys.readouterr().out
        for _ in range(30):
            optimizer.zero_grad()
            watching.loss(nn.functional.cross_entropy(model(torch.randn(16, 20)), torch.arange(16) % 3)).backward()
            optimizer.step()
        watching.report()
        inside = capsys.readouterr().out
    watching.report()
    after = capsys.readouterr().out
    for told in (inside, after):
        assert "▼ The gradient dies on its way down: 0 (linear) receives" in told
        assert "24 (linear)" in told.splitlines()[2]  # the output on top
    assert f"tensorboard --logdir {tmp_path / 'mine'}" in after


def test_the_trace_inside_the_block_is_a_snapshot():
    model = mlp()
    optimizer = sgd(model)
    with watch(model, optimizer) as watching:
        train(model, optimizer, watching, 2)
        early = watching.trace
        kept = early.to_arrow().to_pylist()
        train(model, optimizer, watching, 2)
        assert list(early.sampled_steps) == [0, 1]
    assert early.to_arrow().to_pylist() == kept == watching.trace.to_arrow().to_pylist()[: len(kept)]
    assert list(watching.trace.sampled_steps) == [0, 1, 2, 3]


# ---- what it costs ----------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts how often numbers get from a tensor to Python: item, float, bool, int; tolist; numpy."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("tolist", "numpy", "cpu"):  # no operators on the CPU
            monkeypatch.setattr(torch.Tensor, name, self.counting(getattr(torch.Tensor, name)))

    def counting(self, read):
        def counted(*args, **kwargs):
            self.count += 1
            return read(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten._local_scalar_dense.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("depth", [3, 12])
def test_one_host_read_per_sampled_step(depth, monkeypatch):
    model = build(ModelConfig(depth=depth, width=4), 4, 2, seed=0)
    optimizer, x, counts = torch.optim.SGD(model.parameters(), lr=0.1), data((3, 4)), []
    with HostReads(monkeypatch) as reads, watch(model, optimizer, every=2) as watching:
        for _ in range(5):
            before = reads.count
            watching.loss(model(x).square().mean()).backward()
            optimizer.step()
            counts.append(reads.count - before)
        float(x[0, 0])
        assert reads.count == sum(counts) + 1  # the counter counts
    assert counts == [1, 0, 1, 0, 1]


def test_no_tensor_is_kept():
    model = nn.Sequential(nn.Linear(4, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 1))
    optimizer, kept = torch.optim.SGD(model.parameters(), lr=0.1), []
    for module in model:
        module.register_forward_hook(lambda m, args, out: kept.append(weakref.ref(out)))
    with watch(model, optimizer):
        loss = model(data((50, 4))).square().mean()
        assert any(ref() is not None for ref in kept)
        loss.backward()
        del loss
        assert [ref() for ref in kept] == [None] * 5  # before the step already
        optimizer.step()
