"""What a run leaves on disk: TensorBoard's event file, read back with TensorBoard; the trace, the findings."""

import copy
import io
import json
import math
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.hparams import metadata as hparams
from torch import nn
from torch.nn.functional import cross_entropy

from bpdiag import Trace, watch
from bpdiag.config import Config, ModelConfig, TrainingConfig
from bpdiag.dashboard import summaries
from bpdiag.dashboard.writer import TAGS, TensorBoardWriter
from bpdiag.model import build
from bpdiag.trace import Layer, Sample, TraceError
from bpdiag.training import train as train_config

torch.set_num_threads(1)


def data(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, watching, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        watching.loss(model(data((6, 4))).square().mean()).backward()
        optimizer.step()


def run(folder, depth=4, steps=7, every=3):
    model = build(ModelConfig(depth=depth, width=5, activation="tanh"), 4, 2, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with watch(model, optimizer, every=every, log=folder) as watching:
        train(model, optimizer, watching, steps)
    return watching.trace


def accumulate(folder):
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    return board


def events(folder):
    (path,) = folder.glob("events.out.tfevents.*")
    return [e for e in EventFileLoader(str(path)).Load() if e.HasField("summary")]


def tags(event):
    return [value.tag for value in event.summary.value]


def float32(x):
    return float(np.float32(x))


def test_every_value_of_the_trace_is_shown_where_its_tag_says(tmp_path):
    trace, board = run(tmp_path), accumulate(tmp_path)
    labels, number = {}, 0
    for layer in trace.layers:
        number += layer.is_weight_layer
        labels[layer.name] = f"{number:02d}_{layer.kind}"
    expected = {}
    for row in trace.to_arrow().to_pylist():
        for column, tag in TAGS.items():
            if row[column] is not None:
                expected[f"{tag}/{labels[row['layer']]}", row["step"]] = float32(row[column])
    shown = {
        (tag, event.step): event.value
        for tag in board.Tags()["scalars"]
        if tag.startswith(("gradient/", "gain/", "signal/", "update/update_ratio"))
        for event in board.Scalars(tag)
    }
    assert shown == expected
    assert {step for _, step in shown} == {0, 3, 6}
    assert {tag.rpartition("/")[0] for tag, _ in shown} == set(TAGS.values())
    assert ("gradient/cotangent_norm/02_linear", 3) in shown
    assert ("signal/saturated/02_tanh", 3) in shown


@pytest.mark.parametrize("depth", [12, 101])
def test_sorted_tags_are_in_execution_order(tmp_path, depth):
    run(tmp_path, depth=depth, steps=1)
    names = sorted(t for t in accumulate(tmp_path).Tags()["scalars"] if t.startswith("gradient/cotangent_norm/"))
    digits = 3 if depth > 99 else 2
    assert names == [f"gradient/cotangent_norm/{i:0{digits}d}_linear" for i in range(1, depth + 1)]


def test_one_event_per_sampled_step_and_the_loss_of_every_step(tmp_path):
    trace = run(tmp_path, steps=8)
    board, written = accumulate(tmp_path), events(tmp_path)
    assert [e.step for e in written if any(t.startswith("gradient/") for t in tags(e))] == [0, 3, 6]
    steps, losses = trace.losses
    assert list(steps) == list(range(8))
    told = sorted((e.step, e.value) for e in board.Scalars("loss/train"))
    assert told == [(int(s), float32(v)) for s, v in zip(steps, losses, strict=True)]
    assert [(e.step, e.value) for e in board.Scalars("update/learning_rate")] == [(0, 0.25), (3, 0.25), (6, 0.25)]
    assert [e.step for e in written if "loss/train" in tags(e)] == [
        e.step for e in written if not {"findings", "custom_scalars__config__"} & set(tags(e))
    ]


def test_the_findings_stand_as_text(tmp_path):
    run(tmp_path / "healthy")
    model = build(ModelConfig(depth=25, width=16, activation="sigmoid", weight_variance="torch"), 4, 2, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer, log=tmp_path / "sick") as watching:
        for _ in range(2):
            optimizer.zero_grad()
            watching.loss(cross_entropy(model(data((6, 4))), torch.arange(6) % 2)).backward()
            optimizer.step()
    for name, steps in (("healthy", 7), ("sick", 2)):
        (event,) = accumulate(tmp_path / name).Tensors("findings")
        text = event.tensor_proto.string_val[0].decode()
        findings = json.loads((tmp_path / name / "findings.json").read_text())["findings"]
        assert event.step == steps
        assert bool(findings) == (name == "sick")
        assert all(f"{f['kind']} by {f['cause']}" in text and f["remedy"] in text for f in findings)
        assert findings or "No fault found" in text
        board = accumulate(tmp_path / name)
        assert board.SummaryMetadata("findings").plugin_data.plugin_name == "text"


def test_numbers_that_are_not_finite_survive(tmp_path):
    layers = [Layer("a", 0, "linear", fan_in=2), Layer("b", 0, "linear", fan_in=2)]
    values = [math.nan, math.inf, -math.inf, 1e300, 1e-42]
    writer = TensorBoardWriter(tmp_path)
    for step, value in enumerate(values):
        rows = [(0, 0, {"decades": value}), (0, 1, {"g_z_norm": 1.0}), (1, 0, {"decades": 7.0})]
        writer.write(Sample(step, layers, rows, [(step, value)], None))
    writer.close()
    board = accumulate(tmp_path)
    for tag in ("gain/decades/01_linear", "loss/train"):
        got = [event.value for event in board.Scalars(tag)]
        assert math.isnan(got[0])
        # too large for the file's float32 is shown as infinite, the smallest denormals as they are
        assert got[1:] == [math.inf, -math.inf, math.inf, float32(1e-42)]
    assert len(board.Scalars("gradient/cotangent_norm/02_linear")) == 5


def test_only_a_layer_with_something_to_show_has_a_tag(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, 2))
    torch.manual_seed(0)
    with watch(model, log=tmp_path) as watching:
        watching.loss(model(data((5, 4))).mean()).backward()
        watching.step()
    labels = {tag.rpartition("/")[2] for tag in accumulate(tmp_path).Tags()["scalars"]}
    assert labels == {"train", "01_linear", "01_tanh", "02_linear"}


def test_numbers_of_ones_own(tmp_path):
    model, optimizer = mlp()
    with watch(model, optimizer, log=tmp_path) as watching:
        train(model, optimizer, watching, 1)
        watching.scalars({"accuracy/test": 0.5}, step=9)
    assert [(e.step, e.value) for e in accumulate(tmp_path).Scalars("accuracy/test")] == [(9, 0.5)]


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def hooks(model, optimizer):
    of_modules = [table for m in model.modules() for table in (m._forward_hooks, m._forward_pre_hooks)]
    return sum(map(len, [*of_modules, optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]))


def test_a_log_folder_holds_the_run_and_is_not_used_twice(tmp_path):
    model, optimizer = mlp()
    with watch(model, optimizer, every=2, planned_steps=50, log=tmp_path / "run") as watching:
        train(model, optimizer, watching, 4)
        watching.note(data="random")
        assert list(watching.trace.sampled_steps) == [0, 2]
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names[0].startswith("events.out.tfevents.")
    assert names[1:] == ["findings.json", "summary.json", "trace"]
    loaded = Trace.load(tmp_path / "run")
    assert loaded.to_arrow().equals(watching.trace.to_arrow())
    assert (loaded.layers, loaded.missing) == (watching.trace.layers, watching.trace.missing)
    assert (loaded.meta["every"], loaded.meta["planned_steps"], loaded.meta["data"]) == (2, 50, "random")
    assert list(loaded.losses[0]) == [0, 1, 2, 3]
    assert json.loads((tmp_path / "run/findings.json").read_text()).keys() == {"schema", "findings", "notes"}
    assert json.loads((tmp_path / "run/summary.json").read_text())["verdict"] == "lives"
    again = watch(model, optimizer, log=tmp_path / "run")
    with pytest.raises(TraceError, match="already holds a run"), again:
        pass
    assert hooks(model, optimizer) == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    assert Trace.load(tmp_path / "run").to_arrow().equals(loaded.to_arrow())


@pytest.mark.parametrize("steps", [0, 2])
def test_an_interrupted_run_is_written_and_the_interruption_passed_on(tmp_path, steps):
    model, optimizer = mlp()

    def interrupted():
        with watch(model, optimizer, log=tmp_path) as watching:
            train(model, optimizer, watching, steps)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hooks(model, optimizer) == 0
    assert list(Trace.load(tmp_path).sampled_steps) == list(range(steps))
    assert json.loads((tmp_path / "findings.json").read_text())["findings"] == []
    assert (tmp_path / "summary.json").is_file()


def test_an_empty_block_is_no_error(tmp_path):
    with watch(*mlp(), log=tmp_path) as watching:
        pass
    assert len(watching.trace.sampled_steps) == 0
    assert (tmp_path / "summary.json").is_file()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_the_model_can_be_copied_inside_the_block_and_the_copy_is_not_watched(tmp_path, duplicate):
    """As loops do that keep the best model, or an average of it."""

    def told(copies):
        model, optimizer = mlp()
        with watch(model, optimizer, log=tmp_path / str(copies)) as watching:
            for _ in range(2):
                train(model, optimizer, watching, 1)
                if copies:
                    twin = duplicate(model)
                    twin(data((3, 4), 2)).mean().backward()
        if copies:
            twin(data((3, 4), 2)).mean().backward()
        return watching.trace.to_arrow().to_pylist()

    assert told(True) == told(False)


def test_a_run_of_ours_stands_in_the_hparams_tab_without_a_run_of_its_own(tmp_path):
    training = TrainingConfig(steps=4)
    result = train_config(Config(model=ModelConfig(depth=3, width=8), training=training), tmp_path / "run")
    assert [p.parent.name for p in tmp_path.rglob("events.out*")] == ["run"]
    values = {v.tag: v for e in events(tmp_path / "run") for v in e.summary.value}
    parts = [hparams.parse_session_start_info_plugin_data, hparams.parse_experiment_plugin_data]
    tags_of = (hparams.SESSION_START_INFO_TAG, hparams.EXPERIMENT_TAG)
    start, experiment = (p(values[t].metadata.plugin_data.content) for p, t in zip(parts, tags_of, strict=True))
    assert start.hparams["depth"].number_value == 3
    assert start.hparams["activation"].string_value == "relu"
    assert {i.name for i in experiment.hparam_infos} == set(start.hparams)
    shown = [info.name.tag for info in experiment.metric_infos]
    assert shown == ["accuracy/test", "summary/decades_layer_1", "summary/findings"]
    assert values["accuracy/test"].tensor.float_val[0] == float32(result.metrics["test_accuracy"])
    assert values["summary/findings"].tensor.float_val[0] == len(result.findings)


def test_a_model_of_somebody_elses_has_no_settings_to_show(tmp_path):
    run(tmp_path)
    assert not any("hparams" in t for e in events(tmp_path) for t in tags(e))


def test_every_statistic_has_one_chart_with_all_layers(tmp_path):
    run(tmp_path)
    (value,) = [v for e in events(tmp_path) for v in e.summary.value if v.tag == custom_scalar.CONFIG_SUMMARY_TAG]
    layout = layout_pb2.Layout.FromString(value.tensor.string_val[0])
    patterns = [tag for c in layout.category for chart in c.chart for tag in chart.multiline.tag]
    written = {t for e in events(tmp_path) for t in tags(e) if t.count("/") == 2}
    assert len(patterns) == len(TAGS)
    assert all(sum(bool(re.match(p, tag)) for p in patterns) == 1 for tag in written)


def test_histograms_are_shown_where_asked_for_and_survive_nan(tmp_path):
    def told(folder, **asked):
        model = build(ModelConfig(depth=3, width=5, activation="tanh"), 4, 2, seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer, log=folder, **asked) as watching:
            train(model, optimizer, watching, 1)
            with torch.no_grad():
                model[0].weight[0, 0] = math.nan
            train(model, optimizer, watching, 1)
        return accumulate(folder)

    assert not [tag for tag in told(tmp_path / "plain").Tags()["tensors"] if tag.startswith("histogram")]
    board = told(tmp_path / "asked", histograms=True)
    shown = {tag: board.Tensors(tag) for tag in board.Tags()["tensors"] if tag.startswith("histogram/")}
    layers = {"01_linear", "02_linear", "03_linear"}
    assert {tag for tag in shown if tag.startswith("histogram/z/")} == {f"histogram/z/{name}" for name in layers}
    for tensor in ("a", "g_a", "g_z", "W", "g_W"):
        assert f"histogram/{tensor}/02_{'tanh' if 'a' in tensor else 'linear'}" in shown
    (first, *_) = shown["histogram/z/01_linear"]
    bins = np.array(first.tensor_proto.double_val).reshape(-1, 3)
    assert bins[:, 2].sum() == 6 * 5
    assert np.isfinite(bins).all()
    strangers = {tag: board.Scalars(tag)[0] for tag in board.Tags()["scalars"] if tag.startswith("nonfinite/")}
    assert strangers["nonfinite/z/01_linear"].step == 1
    assert strangers["nonfinite/z/01_linear"].value == 6  # one unit of each of the six samples
    # the finite ones are still shown
    assert [event.step for event in shown["histogram/z/01_linear"]] == [0, 1]


def test_histograms_change_nothing(tmp_path):
    def losses(**asked):
        model = build(ModelConfig(depth=3, width=5, activation="prelu"), 4, 2, seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer, log=tmp_path / str(asked), **asked) as watching:
            train(model, optimizer, watching, 5)
        return watching.trace.losses[1].tolist()

    assert losses(histograms=True) == losses()


def test_a_trained_classifier_shows_its_digits_and_its_errors(tmp_path):
    config = Config(model=ModelConfig(depth=2), training=TrainingConfig(steps=30))
    train_config(config, tmp_path / "run")
    board = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0})
    board.Reload()
    assert board.Tags()["images"] == ["profile", "test/samples", "test/confusion"]
    for tag in board.Tags()["images"]:
        (shown,) = board.Images(tag)
        assert shown.step == 30
        assert Image.open(io.BytesIO(shown.encoded_image_string)).size == (shown.width, shown.height)
    config.watch.pictures = False
    train_config(config, tmp_path / "plain")
    assert accumulate(tmp_path / "plain").Tags()["images"] == []


@pytest.mark.parametrize(("low", "high"), [(-1.7e308, 1.7e308), (2.0, 2.0), (0.0, 5e-324), (-3.0, 1.0)])
def test_the_edges_of_a_histogram_are_finite_and_in_order(low, high):
    value = summaries.histogram("h", low, high, [1.0, 2.0, 3.0])
    bins = np.array(value.tensor.double_val).reshape(-1, 3)
    assert np.isfinite(bins).all()
    assert (bins[:, 0] <= bins[:, 1]).all()
    assert bins[0, 0] <= low <= high <= bins[-1, 1] * (1 + 1e-15)
    assert bins[:, 2].sum() == 6
