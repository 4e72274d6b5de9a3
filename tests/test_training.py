from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from PIL import Image

from bpdiag import data, training
from bpdiag.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig, UsageError, WatchConfig
from bpdiag.trace import Trace, TraceError


def small(steps=12, **options):
    model = ModelConfig(**{"depth": 3, "width": 16, **options})
    return Config(model=model, training=TrainingConfig(steps=steps), watch=WatchConfig(every=4))


def weights(result):
    return torch.cat([p.detach().reshape(-1) for p in result.model.parameters()])


def test_the_seed_decides_everything():
    a, b = training.train(small()), training.train(small())
    assert torch.equal(weights(a), weights(b))
    assert a.trace.table.equals(b.trace.table)
    c = training.train(dataclasses.replace(small(), seed=1))
    assert not torch.equal(weights(a), weights(c))


def test_by_hand_and_by_torch_train_alike():
    a, b = training.train(small()), training.train(small(backward="autograd"))
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-4, atol=1e-6)


def test_it_is_a_plain_loop_over_the_same_batches():
    config = small(steps=3)
    result = training.train(config)
    split = data.load(config.data).train
    net = training.model.build(config.model, 784, 10, config.seed)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    for rows in training.batches(config, len(split), 3, torch.device("cpu")):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(split.x[rows]), split.y[rows]).backward()
        optimizer.step()
    plain = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    torch.testing.assert_close(weights(result), plain, rtol=1e-5, atol=1e-7)


WARM = torch.optim.lr_scheduler.LinearLR


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize(("warmup", "clip"), [(4, 0.0), (0, 0.5), (4, 0.5), (1, 0.0)])
def test_warm_up_and_clipping_are_torchs_own(name, warmup, clip):
    config = dataclasses.replace(
        small(steps=7, backward="autograd"), optimizer=OptimizerConfig(name=name, lr=0.05, warmup=warmup, clip=clip)
    )
    result = training.train(config)
    split = data.load(config.data).train
    net = training.model.build(config.model, 784, 10, config.seed)
    kinds = {"sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, 0.05)}
    optimizer = kinds[name](net.parameters())
    warm = WARM(optimizer, 1 / warmup, total_iters=warmup - 1) if warmup > 1 else None
    norms = []
    for rows in training.batches(config, len(split), 7, torch.device("cpu")):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(split.x[rows]), split.y[rows]).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), clip or math.inf))
        optimizer.step()
        if warm:
            warm.step()
    plain = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    assert min(norms) > 0.5  # every step was clipped
    torch.testing.assert_close(weights(result), plain, rtol=1e-4, atol=1e-6)
    bare = weights(training.train(dataclasses.replace(config, optimizer=OptimizerConfig(name=name, lr=0.05))))
    assert torch.allclose(weights(result), bare) is ((warmup, clip) == (1, 0.0))


def test_an_epoch_shows_every_sample_once():
    config = Config(data=DataConfig(batch_size=7_000), training=TrainingConfig(epochs=2))
    rows = list(training.batches(config, 55_000, math.inf, torch.device("cpu")))
    assert [len(r) for r in rows] == [7_000] * 7 + [6_000] + [7_000] * 7 + [6_000]
    first, second = torch.cat(rows[:8]), torch.cat(rows[8:])
    assert torch.equal(first.sort().values, torch.arange(55_000))
    assert not torch.equal(first, second)


def test_the_run_folder_holds_what_it_promises(tmp_path):
    result = training.train(small(), tmp_path / "run")
    names = {p.name.split(".")[0] for p in (tmp_path / "run").iterdir()}
    assert names == {"trace", "summary", "findings", "metrics", "model", "events"}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics.keys() >= {"test_accuracy", "train_loss", "steps", "seconds"}
    assert metrics["steps"] == 12
    assert Trace.load(tmp_path / "run").table.equals(result.trace.table)
    kept = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert all(torch.equal(v, result.model.state_dict()[k]) for k, v in kept["state_dict"].items())
    assert kept["config"]["model"]["depth"] == 3


def test_a_folder_is_used_once(tmp_path):
    training.train(small(steps=1), tmp_path)
    kept = (tmp_path / "metrics.json").read_bytes()
    with pytest.raises(TraceError, match="already holds a run"):
        training.train(small(steps=1), tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == kept


def test_it_learns():
    config = Config(training=TrainingConfig(steps=300))
    assert training.train(config).metrics["test_accuracy"] > 0.88


def test_adam_learns_too():
    config = Config(optimizer=OptimizerConfig(name="adam", lr=1e-3), training=TrainingConfig(steps=200))
    assert training.train(config).metrics["test_accuracy"] > 0.88


def test_a_run_that_goes_not_finite_is_stopped_kept_and_judged(tmp_path):
    config = dataclasses.replace(small(steps=100, activation="identity"), optimizer=OptimizerConfig(lr=1e3))
    result = training.train(config, tmp_path / "run")
    assert result.metrics["steps"] < 100
    assert "not finite" in result.metrics["stopped"]
    assert result.findings[0].kind == "non_finite"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["verdict"] == "not finite"


def test_an_interrupt_keeps_what_there_is(tmp_path):
    def stop(step, *_):
        if step > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(small(steps=50), tmp_path / "run", progress=stop)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["stopped"] == "interrupted"
    assert list(Trace.load(tmp_path / "run").sampled_steps) == [0, 4, 8]
    assert (tmp_path / "run" / "model.pt").exists()


def test_evaluation_does_not_depend_on_who_else_is_in_the_batch():
    """Running statistics, not the batch's; and the net goes on as it was."""
    config = Config(model=ModelConfig(depth=3, width=16, normalization="batch"), training=TrainingConfig(steps=20))
    result = training.train(config)
    net, split = result.model, data.load(config.data).test
    assert not net.training
    together, alone = training.logits(net, split), training.logits(net, split, chunk=7)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    net.train()
    with torch.no_grad():
        assert not torch.allclose(net(split.x[:7]), together[:7], rtol=0.1, atol=0.1)  # the twin
    before = net.batchnorm1.running_mean.clone()
    training.logits(net, split)
    assert net.training
    assert torch.equal(net.batchnorm1.running_mean, before)


@pytest.mark.parametrize("model", [ModelConfig(normalization="batch"), ModelConfig(name="cnn")], ids=["batch", "cnn"])
@pytest.mark.parametrize(("batch_size", "steps"), [(1, 1), (81, 0), (81, 680)])
def test_a_batch_of_one_is_refused_where_a_batch_is_normalized(batch_size, steps, model):
    """55,000 samples in batches of 81 leave one."""
    config = Config(data=DataConfig(batch_size=batch_size), training=TrainingConfig(steps=steps))
    training.check(config)
    config.model = model
    with pytest.raises(UsageError, match=f"data.batch_size={batch_size}: .*batch normalization needs two or more"):
        training.check(config)


@pytest.mark.parametrize(("batch_size", "steps"), [(2, 0), (81, 679), (64, 0)])
def test_a_batch_of_two_is_not_nor_one_that_is_never_reached(batch_size, steps):
    model = ModelConfig(normalization="batch")
    training.check(Config(model=model, data=DataConfig(batch_size=batch_size), training=TrainingConfig(steps=steps)))


@pytest.mark.parametrize("options", [{"name": "cnn"}, {"residual": "identity"}], ids=["cnn", "residual"])
def test_what_is_kept_of_any_net_is_what_was_trained(options, tmp_path):
    result = training.train(small(steps=6, **options), tmp_path / "run")
    kept, x = training.load(tmp_path / "run"), data.load(DataConfig()).test.x[:20]
    assert torch.equal(kept.model(x), result.model(x))


def test_a_cnn_learns_sooner_than_layers_do():
    model = ModelConfig(name="cnn", depth=3)
    assert training.train(Config(model=model, training=TrainingConfig(steps=150))).metrics["test_accuracy"] > 0.93


@pytest.mark.parametrize("before", [False, True])
def test_denormals_and_threads_are_restored(before):
    tiny = torch.full((1,), 1e-40)
    torch.set_flush_denormal(before)
    count = torch.get_num_threads()
    try:
        with training.flushed_denormals(), training.threads(1):
            assert (tiny * 1).item() == 0
            assert torch.get_num_threads() == 1
        assert ((tiny * 1).item() == 0) is before
        assert torch.get_num_threads() == count
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DataConfig(batch_size=60_000)}, "the training split has 55000 samples"),
        ({"training": TrainingConfig(device="abacus")}, "training.device=abacus"),
        ({"training": TrainingConfig(dtype="float3")}, "training.dtype=float3: unknown"),
        ({"optimizer": OptimizerConfig(name="sdg")}, "did you mean 'sgd'"),
        ({"optimizer": OptimizerConfig(lr=math.nan)}, "optimizer.lr=nan"),
        ({"training": TrainingConfig(epochs=0)}, "training.epochs=0: must be from 1"),
        ({"data": DataConfig(root="/nonsuch")}, "no such folder"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        training.train(Config(**change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_step_of_one_layer_is_judged_in_silence():
    result = training.train(small(steps=1, depth=1))
    assert result.metrics["steps"] == 1
    assert result.findings == []


@pytest.mark.parametrize(
    ("activation", "weight_variance", "depth", "gain", "cause"),
    [("sigmoid", "torch", 10, 0.141, "slopes"), ("relu", "torch", 20, 0.408, "weights"), ("relu", "he", 20, 1.0, None)],
)
def test_gain_and_cause_at_the_first_step_are_the_theorys(activation, weight_variance, depth, gain, cause):
    """Mean field at finite depth, maths of sigma_w^2 E phi'^2; and what the harm rule says of it after a few steps."""
    model = ModelConfig(activation=activation, weight_variance=weight_variance, depth=depth)
    result = training.train(Config(model=model, training=TrainingConfig(steps=3), watch=WatchConfig(every=1)))
    gains = result.trace.column("backward_gain")[0][0, result.trace.weight_layers()][:-2]
    assert math.exp(sum(map(math.log, gains)) / len(gains)) == pytest.approx(gain, rel=0.05)
    assert [f.cause for f in result.findings] == ([cause] if cause else [])


def test_what_is_kept_classifies_pictures(tmp_path):
    result = training.train(Config(training=TrainingConfig(steps=300)), tmp_path / "run")
    kept = training.load(tmp_path / "run")
    assert kept.config == result.config
    split = data.load(DataConfig()).test
    assert torch.equal(kept.model(split.x[:50]), result.model(split.x[:50]))
    right = 0
    for i in range(20):
        pixels = (split.x[i] * kept.std + kept.mean).mul(255).round().clamp(0, 255).byte().view(28, 28)
        pixels = 255 - pixels if i % 2 else pixels  # ink on paper
        Image.fromarray(pixels.numpy()).resize((112, 112)).save(tmp_path / "digit.png")
        right += kept.classify(tmp_path / "digit.png") == split.y[i]
    assert right >= 17


def test_a_transparent_picture_is_drawn_on_paper(tmp_path):
    """Black ink on nothing, as drawing programs export it, is black ink on white; white ink is white on black."""
    training.train(Config(training=TrainingConfig(steps=300)), tmp_path / "run")
    kept = training.load(tmp_path / "run")
    split, right = data.load(DataConfig()).test, 0
    for i in range(20):
        alpha = (split.x[i] * kept.std + kept.mean).mul(255).round().clamp(0, 255).byte().view(28, 28).numpy()
        picture = Image.new("RGBA", (28, 28), (255, 255, 255, 0) if i % 2 else (0, 0, 0, 0))
        picture.putalpha(Image.fromarray(alpha))
        right += kept.classify(picture) == split.y[i]
    assert right >= 17


def test_what_cannot_be_loaded_is_refused_in_words(tmp_path):
    with pytest.raises(UsageError, match="absent: no such folder"):
        training.load(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"no model\.pt here"):
        training.load(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="damaged, or of another version"):
        training.load(tmp_path)
    training.train(small(steps=1), tmp_path / "run")
    (tmp_path / "digit.png").write_text("no picture")
    with pytest.raises(UsageError, match="not a picture"):
        training.load(tmp_path / "run").classify(tmp_path / "digit.png")
    Image.new("L", (40, 40), 250).save(tmp_path / "digit.png")
    with pytest.raises(UsageError, match=r"digit\.png: nothing is drawn"):
        training.load(tmp_path / "run").classify(tmp_path / "digit.png")


def test_progress_tells_loss_accuracy_and_what_reaches_the_first_layer():
    told = []
    config = Config(
        model=ModelConfig(activation="sigmoid", depth=6, width=16),
        training=TrainingConfig(steps=9),
        watch=WatchConfig(every=4),
    )
    trace = training.train(config, progress=lambda *numbers: told.append(numbers)).trace
    assert [(step, planned) for step, planned, *_ in told] == [(1, 9), (5, 9), (9, 9)]
    assert [loss for _, _, loss, _, _ in told] == pytest.approx(trace.losses[1][[0, 4, 8]])
    assert all(0 <= right <= 1 and (right * 64) % 1 == pytest.approx(0) for _, _, _, right, _ in told)
    assert [decades for *_, decades in told] == [trace.value("decades", 0, at) for at in range(3)]
    assert told[0][4] < -1
