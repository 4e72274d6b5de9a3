"""What is expected of a run: against real first steps, against published outcomes, and as its users meet it."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

import bpdiag
from bpdiag import diagnosis, prediction, terminal
from bpdiag.__main__ import main
from bpdiag.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig, UsageError, WatchConfig
from bpdiag.data import load
from bpdiag.model import build
from bpdiag.prediction import DIGITS, deepest, expect, plan, predict
from bpdiag.trace import Trace
from bpdiag.training import train


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    yield
    GlobalHydra.instance().clear()


def asked(steps: int = 0, optimizer: dict | None = None, **model) -> Config:
    training, watching = TrainingConfig(steps=steps), WatchConfig(every=1)
    return Config(
        model=ModelConfig(**model), optimizer=OptimizerConfig(**optimizer or {}), training=training, watch=watching
    )


def test_the_digits_are_as_they_are_said_to_be():
    x = load(DataConfig()).train.x.double()
    assert x.square().mean().item() == pytest.approx(1, abs=1e-3)
    assert torch.quantile(x.square().mean(1), prediction.QUANTILES).tolist() == pytest.approx(
        DIGITS.mean_squares, abs=1e-3
    )
    assert x.var(0).mean().item() == pytest.approx(DIGITS.variance, abs=1e-4)
    measured = prediction.source(load(DataConfig()))
    assert (measured.samples, measured.inputs, measured.classes) == (len(x), x.shape[1], 10)
    assert measured.mean_squares == pytest.approx(DIGITS.mean_squares, rel=0.03)
    assert measured.variance == pytest.approx(DIGITS.variance, rel=0.02)


NETS = [
    {"activation": "tanh", "weight_variance": "torch"},
    {"activation": "sigmoid", "weight_variance": "1"},
    {"activation": "gelu", "normalization": "batch", "weight_variance": "torch"},
    {"activation": "relu", "normalization": "layer", "weight_variance": "torch"},
    {"activation": "tanh", "residual": "identity", "weight_variance": "torch"},
    {"activation": "relu", "residual": "identity", "normalization": "layer", "branch_scale": "1/sqrt(blocks)"},
]


@pytest.mark.parametrize("model", NETS, ids=lambda m: "-".join(m.values()))
def test_a_real_first_step_is_as_expected(model):
    """Decades of every layer within three standard deviations, each factor within a few percent."""
    config = asked(steps=1, depth=12, width=256, **model)
    real, told = train(config).trace, predict(config)
    measured, expected = diagnosis.profile(real), diagnosis.profile(told)
    assert [layer.name for layer in told.layers] == [layer.name for layer in real.layers]
    assert [(a.next, a.via) for a in told.layers] == [(a.next, a.via) for a in real.layers]
    band = np.array(told.meta["predicted"]["decades_band"])
    assert (np.abs(measured.decades[0] - expected.decades[0]) <= 3 * band + 0.02).all()
    for owner in ("weights", "slopes", "other"):
        one, other = measured.ledger[owner][0][1:-1], expected.ledger[owner][0][1:-1]
        assert one == pytest.approx(other, abs=0.05, nan_ok=True)
    assert measured.hidden_gain(0) == pytest.approx(expected.hidden_gain(0), rel=0.03)
    for at, layer in enumerate(real.layers):
        if layer.activation:
            share = [trace.value("a_saturated_fraction", at, 0) for trace in (real, told)]
            assert share[0] == pytest.approx(share[1], abs=0.03)
    assert real.losses[1][0] == pytest.approx(told.losses[1][0], rel=0.1)
    updates = [p.trace.column("update_ratio")[0][0][p.lines] for p in (measured, expected)]
    seen = measured.decades[0] > -5  # below, a step is lost in the weights' rounding
    assert (np.abs(np.log10(updates[0] / updates[1]))[seen] < 0.7).all()  # samples agree a little
    assert not [note for note in diagnosis.notes(real) if "theory" in note]


def test_another_net_is_not_as_expected():
    """The twin: a weight variance of a third, told as 0.4, is seen."""
    config = asked(steps=1, depth=12, width=256, activation="tanh", weight_variance="torch")
    real = train(config).trace
    assert diagnosis.expected_gain(real)[0] == pytest.approx(0.560, abs=0.001)
    config.model.weight_variance = "0.4"
    real.meta["predicted"] = expect(config)
    (note,) = [note for note in diagnosis.notes(real) if "theory" in note]
    assert note.endswith("theory expects 0.61 ± 0.02: more than the draw of the weights explains")


def test_where_the_theory_falls_short_it_says_so():
    config = asked(steps=1, depth=20, residual="identity", weight_variance="torch")
    (note,) = [note for note in diagnosis.notes(train(config).trace) if "theory" in note]
    assert "gradients grow faster than told" in note
    assert expect(asked(depth=20, residual="identity", activation="tanh"))["caveat"] == ""
    assert expect(asked(depth=20, residual="identity", normalization="layer"))["caveat"] == ""


@pytest.mark.parametrize(
    ("activation", "depth", "weights", "verdict", "cause"),
    [
        ("sigmoid", 20, "torch", "dies", "slopes"),
        ("tanh", 20, "torch", "dies", "weights"),
        ("relu", 20, "torch", "dies", "weights"),
        ("relu", 20, "he", "lives", None),
        ("sigmoid", 10, "torch", "dies", "slopes"),
        ("tanh", 5, "torch", "lives", None),
        ("relu", 5, "torch", "lives", None),
        ("relu", 30, "6", "blows up", "weights"),
    ],
)
def test_verdicts_as_runs_had_them(activation, depth, weights, verdict, cause):
    """Of 860 steps each, trained and judged (README)."""
    trace = predict(asked(activation=activation, depth=depth, weight_variance=weights))
    findings = diagnosis.diagnose(trace)
    assert diagnosis.verdict(findings) == trace.meta["predicted"]["verdict"] == verdict
    assert (findings[0].cause if findings else None) == cause


@pytest.mark.parametrize(
    ("depth", "optimizer", "verdict"),
    [
        (20, {"name": "sgd", "lr": 0.1, "momentum": 0.0}, "dies"),  # stays at 2.3025
        (20, {"name": "adam", "lr": 1e-3}, "lives"),  # reaches 0.66
        (20, {"name": "adam", "lr": 1e-3, "eps": 1e-5}, "dies"),  # 2.30
        (30, {"name": "adam", "lr": 1e-3}, "dies"),  # 2.30
    ],
)
def test_an_optimizer_that_divides_scale_out_lives_until_its_eps(depth, optimizer, verdict):
    """Torch-default relu, width 128, 600 steps: the losses that were reached."""
    assert expect(asked(600, optimizer, depth=depth, weight_variance="torch"))["verdict"] == verdict


SIGMOID, BLOCKS = {"activation": "sigmoid", "depth": 5}, {"residual": "identity", "depth": 50}


@pytest.mark.parametrize(
    ("sick", "kind", "healthy"),
    [
        (SIGMOID | {"weight_variance": "100"}, "saturated", SIGMOID | {"weight_variance": "1"}),
        (
            BLOCKS | {"weight_variance": "torch"},
            "forward_scale",
            BLOCKS | {"branch_scale": "1/sqrt(blocks)", "weight_variance": "torch"},
        ),
    ],
)
def test_beginnings_are_judged_too(sick, kind, healthy):
    assert [(f.kind, f.cause) for f in diagnosis.diagnose(predict(asked(**sick)))] == [(kind, "initialization")]
    assert kind not in [f.kind for f in diagnosis.diagnose(predict(asked(**healthy)))]


def test_how_deep():
    """(L - 1) log10(1 / .4082) <= log10 860 up to L = 8; at the critical variance without end."""
    assert 7 * -math.log10(6**-0.5) < math.log10(860) < 8 * -math.log10(6**-0.5)
    assert deepest(asked(weight_variance="torch")) == 8
    assert deepest(asked(weight_variance="he")) == prediction.DEEPEST
    assert deepest(asked(weight_variance="0")) == 1
    scaled = asked(depth=10, residual="identity", branch_scale="1/sqrt(blocks)")
    assert deepest(scaled) == prediction.DEEPEST
    for depth, bears in ((8, True), (9, False)):
        decades = expect(asked(depth=depth, weight_variance="torch"))["decades"][0]
        assert (decades >= -math.log10(860)) == bears


def test_what_would_mend_it():
    told = predict(asked(depth=20, activation="tanh", weight_variance="torch")).meta["predicted"]
    assert (told["critical"]["weight_variance"], told["critical"]["bias_variance"]) == (1.0, 0.0)
    assert told["critical"]["gain_per_layer"] == pytest.approx(0.916, abs=0.002)
    assert told["critical"]["verdict"] == "lives"
    told = predict(asked(depth=20, activation="tanh", bias_variance="0.05")).meta["predicted"]
    assert told["critical"]["weight_variance"] == pytest.approx(1.7610, abs=1e-4)  # of the bias that was asked for
    for none in ({"activation": "softplus"}, {"normalization": "batch"}, {"residual": "identity"}):
        assert predict(asked(depth=20, **none)).meta["predicted"]["critical"] is None


@pytest.mark.parametrize("model", [{"depth": 1}, {"depth": 2}, {"weight_variance": "0"}, {"width": 1}])
def test_small_nets_are_told_too(model, capsys):
    assert main(["predict", *(f"model.{key}={value}" for key, value in model.items())]) == 0
    assert "how deep" in capsys.readouterr().out


def test_numbers_beyond_the_format_are_not_finite():
    trace = predict(asked(depth=200, weight_variance="16"))
    (finding,) = diagnosis.diagnose(trace)
    assert (finding.kind, finding.cause) == ("non_finite", "exploding forward")
    assert finding.layers == ("linear86#0",)  # 8^86 is the first above the square of 3.4e38, times 2/16
    assert trace.meta["predicted"]["critical"]["verdict"] == "lives"


def test_a_cnn_is_refused_and_its_runs_expect_nothing():
    with pytest.raises(UsageError, match=r"model\.name=cnn: the theory covers mlp only"):
        plan(ModelConfig(name="cnn"), DIGITS)
    config = asked(steps=1, name="cnn", width=8)
    assert "predicted" not in train(config).trace.meta


def test_the_plan_is_the_net():
    config = ModelConfig(depth=4, width=300, weight_variance="glorot", bias_variance="torch", activation="selu")
    net, told = build(config, 784, 10, seed=0), plan(config, DIGITS)
    for layer, (w2, b2) in enumerate(zip(told.weights, told.biases, strict=True), 1):
        module = net.get_submodule(f"linear{layer}")
        assert module.weight.square().mean().item() * module.in_features == pytest.approx(w2, rel=0.05)
        assert module.bias.square().mean().item() == pytest.approx(b2, rel=0.9)
    assert told.widths == (784, 300, 300, 300, 10)


# ---- as its users meet it -------------------------------------------------------------------------------------


def test_the_command_says_it_in_words_and_reads_and_writes_nothing(capsys, monkeypatch):
    monkeypatch.setattr("bpdiag.data._arrays", None)  # no digit is read
    assert main(["predict", "model.activation=tanh", "model.depth=30", "model.weight_variance=torch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "▼ The gradient dies on its way down: linear1 receives 10^−7.1 of what the output sends."
    assert lines[1].strip() == "vanishing by weights (harm), from step 0, 21 layers from linear1 to linear21."
    told = "\n".join(lines)
    for words in ("step 0, expected", "linear30 ", "gain per hidden layer: 0.57 ± 0.02", "how deep   12 layers",
                  "sigma_w^2 = 1, sigma_b^2 = 0", "gain 0.569 -> 0.938", "● lives"):  # fmt: skip
        assert words in told, words
    assert list(Path().iterdir()) == []


def test_the_command_as_json(capsys):
    assert main(["predict", "--json", "model.activation=relu", "model.depth=20"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "lives"
    assert told["first"]["backward_gain"][:19] == pytest.approx([1.0] * 19)
    assert told["predicted"]["decades_band"][0] == pytest.approx(0.217 * math.sqrt(5 * 19 / 128), rel=1e-2)
    assert told["predicted"]["critical"]["weight_variance"] == 2
    assert told["findings"] == []


@pytest.mark.parametrize("columns", ["40", "60", "80", "100", "130"])
def test_no_number_is_cut_in_a_narrow_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["predict", "model.activation=sigmoid", "model.depth=12", "model.weight_variance=torch"]) == 0
    table = capsys.readouterr().out.partition("gain per hidden")[0]
    assert "linear1 " in table
    assert "…" not in table


def test_an_experiment_can_be_asked_too(capsys):
    assert main(["predict", "experiment=vanishing", "model.depth=5"]) == 0
    assert "linear5" in capsys.readouterr().out


def test_in_a_run_expected_stands_beside_measured(tmp_path, capsys):
    deep = ["model.activation=tanh", "model.depth=8", "model.weight_variance=1"]
    assert main([*deep, "training.steps=2", "hydra.run.dir=run"]) == 0
    assert "at step 0 (theory 0.84 ± 0.06), " in capsys.readouterr().out
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["predicted"]["gain_per_layer"] == pytest.approx(summary["first"]["gain_per_layer"], rel=0.07)
    assert summary["predicted"] == json.loads(Path("run/trace/meta.json").read_text())["predicted"]
    probe = (
        "import sys; from bpdiag.__main__ import main; "
        "code = main(['diagnose', 'run']); sys.exit(code or 3 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "(theory 0.84 ± 0.06)" in done.stdout


def test_a_run_without_a_prediction_says_nothing_of_theory():
    trace = train(asked(steps=2, depth=3, width=8)).trace
    bare = dataclasses.replace(trace, meta={k: v for k, v in trace.meta.items() if k != "predicted"})
    out = terminal.console()
    with out.capture() as said:
        terminal.report(bare, [], None, out)
    assert "theory" not in said.get()
    assert diagnosis.expected_gain(bare) is None


@pytest.mark.parametrize("told", [None, {}, {"gain_per_layer": None, "within": 0.1}, {"gain_per_layer": 1.0}])
def test_what_cannot_be_used_of_a_stored_prediction_is_left(told):
    trace = Trace.build([], [], {"predicted": told})
    assert diagnosis.expected_gain(trace) is None


def test_in_python():
    trace = bpdiag.predict(asked(activation="sigmoid", depth=10, weight_variance="torch"))
    assert [(f.kind, f.cause) for f in bpdiag.diagnose(trace)] == [("vanishing", "slopes")]
