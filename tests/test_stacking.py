"""A run trained in a stack leaves what it leaves alone."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bpdiag import model, stacking, training
from bpdiag.backprop import Optimizer, Stack
from bpdiag.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RemedyConfig,
    TrainingConfig,
    UsageError,
    WatchConfig,
)
from bpdiag.data import Split
from bpdiag.rules import ACTIVATIONS
from bpdiag.trace import COLUMNS, Trace, plain

RTOL, ATOL = 1e-10, 1e-13
TIMES = {"seconds", "processor_seconds_planned", "stack"}


def config(activation="tanh", seed=0, steps=33, dtype="float64", optimizer=None, watch=None, **model: Any) -> Config:
    return Config(
        seed=seed,
        model=ModelConfig(**{"depth": 5, "width": 16, "activation": activation, **model}),
        data=DataConfig(batch_size=32),
        optimizer=OptimizerConfig(**(optimizer or {})),
        training=TrainingConfig(steps=steps, dtype=dtype),
        remedy=RemedyConfig(steps=20),
        watch=WatchConfig(**{"pictures": False, **(watch or {})}),
    )


def together(configs: Sequence[Config], folder: Path) -> list[training.Result]:
    assert len({stacking.group(one) for one in configs}) == 1
    found: dict[int, Any] = {}
    stacking.train_stack(configs, [folder / str(i) for i in range(len(configs))], told=found.__setitem__)
    return [found[i] for i in range(len(configs))]


def assert_alike(here: Trace, there: Trace) -> None:
    """Every number, every gap and its reason, every fact."""
    assert here.layers == there.layers
    assert set(here.missing) == set(there.missing)
    for name in COLUMNS:
        (x, known), (y, told) = here.column(name), there.column(name)
        np.testing.assert_array_equal(known, told, err_msg=name)
        np.testing.assert_allclose(x[known], y[known], RTOL, ATOL, err_msg=name)
    for at in range(len(here.sampled_steps)):
        assert here.edges(at) == pytest.approx(there.edges(at), rel=RTOL)
    mine, own = here.steps_table.to_pydict(), there.steps_table.to_pydict()
    for name, told in mine.items():
        if name in ("loss", "learning_rate"):
            np.testing.assert_allclose(np.array(told, float), np.array(own[name], float), RTOL)
        else:
            assert told == own[name]
    assert plain(here.meta) == plain(there.meta)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix().partition("tfevents")[0] for path in folder.rglob("*"))


SWEEPS = {
    "activations and seeds": [config("tanh"), config("relu", 1), config("sigmoid", 1), config("gelu", 1)],
    "how they begin": [config(weight_variance="torch"), config(weight_variance="0.5", bias_variance="0.1")],
    "batch norm in blocks": [
        config(a, s, normalization="batch", residual="identity") for a in ("relu", "silu") for s in (0, 1)
    ],
    "layer norm in blocks": [
        config(a, normalization="layer", residual="identity", branch_scale="0.5") for a in ("relu", "tanh")
    ],
    "adam": [config(a, optimizer={"name": "adam", "lr": 0.001}) for a in ("relu", "tanh")],
    "adamw": [config(optimizer={"name": "adamw", "lr": lr, "weight_decay": 0.1}) for lr in (0.001, 0.002)],
    "warm-up, clipping, nesterov, decay": [
        config(optimizer={"warmup": 15, "clip": clip, "nesterov": True, "weight_decay": 0.01}) for clip in (0.3, 2.0)
    ],
    "one of them not finite": [config("identity", weight_variance="1e130"), config()],
    "a loss that grows without end": [config("relu", optimizer={"lr": 1e6}, steps=65), config(steps=65)],
    "an activation with a number in its name": [config("relu6"), config("leaky_relu")],
    "dead units": [config("relu", weight_variance="2", bias_variance="9", steps=95), config("relu", 1, steps=95)],
    "alike rows": [config(weight_variance="0"), config(weight_variance="1")],
}


PICTURES = {
    "cnn, batch norm": [config(a, s, name="cnn", steps=13) for a, s in (("relu", 0), ("tanh", 1), ("gelu", 1))],
    "cnn, layer norm": [config(a, name="cnn", normalization="layer", steps=13) for a in ("relu", "silu")],
    "cnn, no norm": [config(a, name="cnn", depth=3, normalization="none", steps=13) for a in ("sigmoid", "relu")],
    "cnn, adam, dead units": [
        config("relu", s, name="cnn", depth=4, normalization="none", steps=95, optimizer={"name": "adam", "lr": lr})
        for s, lr in ((0, 0.03), (1, 0.001))
    ],
}


@pytest.fixture
def few(monkeypatch):
    """Fewer pictures: a convolution in float64 takes its time."""
    whole = training.load_data(config())

    def some(split: Split) -> Split:
        return Split(split.x[:300], split.y[:300])

    small = replace(whole, train=some(whole.train), validation=some(whole.validation), test=some(whole.test))
    monkeypatch.setattr(training, "load_data", lambda config: small)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_member_s_folder_is_the_one_it_would_have_left_alone(name, tmp_path):
    assert_alike_folders(SWEEPS[name], tmp_path)


@pytest.mark.parametrize("name", PICTURES)
def test_so_is_that_of_a_net_of_convolutions(name, tmp_path, few):
    assert_alike_folders(PICTURES[name], tmp_path)


def assert_alike_folders(configs: Sequence[Config], tmp_path: Path) -> None:
    for i, result in enumerate(together(configs, tmp_path / "stack")):
        alone = training.train(configs[i], tmp_path / "alone")
        assert_alike(result.trace, alone.trace)
        assert_alike(Trace.load(tmp_path / "stack" / str(i)), alone.trace)
        assert [(f.kind, f.cause, f.layers, f.onset_step) for f in result.findings] == [
            (f.kind, f.cause, f.layers, f.onset_step) for f in alone.findings
        ]
        assert files(tmp_path / "stack" / str(i)) == files(tmp_path / "alone")
        for key in alone.metrics.keys() - TIMES:
            assert result.metrics[key] == pytest.approx(alone.metrics[key], nan_ok=True), key
        for path in sorted((tmp_path / "alone").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()


def test_another_number_would_be_seen(tmp_path):
    """The twin."""
    result = together([config()], tmp_path)[0]
    other = training.train(config(optimizer={"lr": 0.010001}))
    with pytest.raises(AssertionError):
        assert_alike(result.trace, other.trace)


def test_a_trace_in_parts_is_the_trace_in_one(tmp_path, monkeypatch):
    configs = [config("tanh"), config("relu", 1)]
    monkeypatch.setattr(stacking, "PART", 2)
    parts = together(configs, tmp_path)
    assert len(list((tmp_path / "0" / "trace").glob("part-*.parquet"))) > 1
    assert_alike(parts[0].trace, training.train(configs[0]).trace)


def test_results_come_when_they_are_there_and_a_fault_is_its_member_s_own(tmp_path):
    (tmp_path / "1" / "trace").mkdir(parents=True)
    told: list[tuple[int, Any]] = []
    configs = [config(), config(seed=1), config("identity", weight_variance="1e130")]
    folders = [tmp_path / str(i) for i in range(3)]
    stacking.train_stack(configs, folders, told=lambda i, what: told.append((i, what)))
    assert [i for i, _ in told] == [1, 2, 0]
    assert isinstance(told[0][1], UsageError)
    assert "already holds a run" in str(told[0][1])
    assert told[1][1].metrics["stopped"].startswith("the loss was not finite at step")
    assert told[2][1].metrics["stopped"] is None
    assert not any((tmp_path / "1" / "trace").iterdir())


def test_interrupted_it_keeps_what_there_is(tmp_path, monkeypatch):
    before = stacking.Stack.step
    steps = iter(range(12))

    def step(self, *given: Any) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        before(self, *given)

    monkeypatch.setattr(stacking.Stack, "step", step)
    told: dict[int, Any] = {}
    with pytest.raises(KeyboardInterrupt):
        stacking.train_stack([config(), config("relu")], [tmp_path / "0", tmp_path / "1"], told=told.__setitem__)
    assert [told[i].metrics["stopped"] for i in (0, 1)] == ["interrupted"] * 2
    assert Trace.load(tmp_path / "0").sampled_steps.tolist() == [0, 10]
    assert json.loads((tmp_path / "1" / "metrics.json").read_text())["steps"] == 12


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (config(), config(depth=6)),
        (config(), config(width=8)),
        (config(), config(normalization="layer")),
        (config(), config(residual="identity")),
        (config(), config(steps=7)),
        (config(), config(dtype="float32")),
        (config(), config(optimizer={"name": "adam"})),
        (config(), config(optimizer={"momentum": 0.5})),
        (config(), config(optimizer={"clip": 0.5})),
        (config(), config(watch={"every": 3})),
    ],
)
def test_what_no_stack_can_share_makes_two_groups(one, other):
    assert stacking.group(one) != stacking.group(other)
    assert stacking.group(one) == stacking.group(replace(one, seed=5))


@pytest.mark.parametrize(
    "alone",
    [
        config("prelu"),
        config(name="rnn", depth=2),
        config("prelu", name="cnn"),
        config(backward="autograd"),
        config(watch={"histograms": True}),
    ],
)
def test_what_no_stack_takes_is_trained_alone(alone):
    assert stacking.group(alone) is None


def test_more_than_memory_holds_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(stacking, "available", lambda: 1_000_000)
    with pytest.raises(UsageError, match=r"a stack of 3 networks needs .* GB of memory, 0.0 GB are free: \d+ fit"):
        together([config(seed=s, width=512) for s in range(3)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_look_is_what_the_first_step_measures(few):
    looked_at = [config("tanh", 1), config("sigmoid", weight_variance="torch"), config(name="cnn", depth=3)]
    told = stacking.look([*looked_at, config("prelu")])
    for one, look in zip(looked_at, told, strict=False):
        trace = training.train(replace(one, training=TrainingConfig(steps=1, dtype="float64"))).trace
        first = next(row for row, layer in enumerate(trace.layers) if layer.is_weight_layer)
        assert look.measured == pytest.approx(trace.value("decades", first, 0), rel=1e-10)
        assert look.predicted == trace.meta.get("predicted", {"decades": [None]})["decades"][0]
    assert told[2].predicted is None
    assert math.isnan(told[3].measured)


@pytest.mark.parametrize(
    "one",
    [
        Config(model=ModelConfig(depth=10, width=64)),
        Config(model=ModelConfig(depth=10, width=64, activation="gelu", normalization="layer", residual="identity")),
        Config(model=ModelConfig(depth=4, width=128), optimizer=OptimizerConfig(name="adam", clip=1.0)),
        Config(model=ModelConfig(name="cnn", depth=3)),
    ],
    ids=["plain", "normalized blocks", "adam clipped", "cnn"],
)
def test_the_memory_told_is_that_of_what_a_stack_makes(one):
    one.data.batch_size = 64
    K, rule = 1, ACTIVATIONS[one.model.activation]
    nets = [model.build(one.model, (1, 28, 28), 10, seed) for seed in range(K)]
    clip = [1.0] * K if one.optimizer.clip else ()
    stack = Stack(nets, [rule] * K, Optimizer([0.1] * K, one.optimizer.name, clip=clip))
    stack.step([torch.randn(64, 784)], [torch.zeros(64, dtype=torch.int64)])
    made = [*stack._buffers.values()]
    for p in [p for layer in stack.layers for p in layer.parameters()]:
        made += [p.W, *p.states]
    bytes_made = 4 * (sum(x.numel() for x in made) / K + sum(p.numel() for p in nets[0].parameters()))
    assert stacking.bytes_of(one, (1, 28, 28), 10) == pytest.approx(bytes_made, rel=0.25)


def test_a_member_whose_folder_goes_ends_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(stacking, "PART", 2)
    told: dict[int, Any] = {}
    before = stacking.Stack.step
    steps = iter(range(100))

    def step(self, *given: Any) -> None:
        if next(steps) == 15:
            shutil.rmtree(tmp_path / "1" / "trace")
        before(self, *given)

    monkeypatch.setattr(stacking.Stack, "step", step)
    configs = [config(), config(seed=1), config("relu")]
    stacking.train_stack(configs, [tmp_path / str(i) for i in range(3)], told=told.__setitem__)
    assert isinstance(told[1], OSError)
    assert [len(told[i].trace.sampled_steps) for i in (0, 2)] == [4, 4]


def test_an_interrupt_while_members_end_costs_nobody_anything(tmp_path):
    told: dict[int, Any] = {}

    def tell(i: int, what: Any) -> None:
        told[i] = what
        if len(told) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stacking.train_stack([config(), config("relu")], [tmp_path / "0", tmp_path / "1"], told=tell)
    assert [told[i].metrics["stopped"] for i in (0, 1)] == [None, None]
    assert all((tmp_path / str(i) / "model.pt").is_file() for i in (0, 1))


def test_what_others_do_at_their_end_is_not_this_one_s_time():
    told: dict[int, Any] = {}

    def tell(i: int, what: Any) -> None:
        told[i] = what
        time.sleep(0.5)

    stacking.train_stack([config(seed=seed) for seed in range(4)], [None] * 4, told=tell)
    assert told[3].metrics["seconds"] < told[0].metrics["seconds"] + 0.5


def test_the_event_file_has_every_loss(tmp_path):
    together([config(steps=25)], tmp_path)
    events = EventAccumulator(str(tmp_path / "0"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(25))


def test_a_member_that_cannot_be_used_is_told_and_the_others_train(tmp_path):
    told: dict[int, Any] = {}
    stacking.train_stack([config(), config(optimizer={"lr": -1.0})], [tmp_path / "0", None], told=told.__setitem__)
    assert isinstance(told[1], UsageError)
    assert told[0].metrics["steps"] == 33
