"""The trace: what is written is what is read, in whatever state a kill or a reader meets the folder."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from bpdiag.trace import COLUMNS, KEYS, Layer, Missing, Sample, Trace, TraceError, TraceWriter, write_json

INF, NAN = math.inf, math.nan

LAYERS = [
    Layer("0", 0, "linear", (64, 8), next=2, via=(1,), fan_in=4, units=8),
    Layer("1", 0, "tanh", (64, 8), parents=(0,), activation="tanh", largest_slope=1.0, r=1.0, window=8),
    Layer("2", 0, "linear", (64, 3), parents=(1,), fan_in=8, units=3),
]


def sample(step: int, **values: float) -> Sample:
    """A sample with a number in every row, and ``values`` on the first."""
    rows = [(0, 0, {"z_norm": float(step), **values}), (0, 1, {"a_norm": 0.5}), (0, 2, {"z_norm": step + 0.25})]
    return Sample(step, LAYERS, rows, [(step, 1 / (step + 1))], 0.1)


def gap(step: int, index: int = 0, column: str = "g_W_norm", reason: str = "frozen") -> Sample:
    return replace(sample(step), missing=[(index, column, reason)])


META = {"optimizer": {"name": "SGD", "lr": 0.1, "sgd_like": True}, "planned_steps": 2345, "every": 10}


def assert_same(a: Trace, b: Trace) -> None:
    """Every value, null and reason; nan equals nan and differs from null."""
    assert a.layers == b.layers
    assert a.missing == b.missing
    assert a.meta == b.meta
    assert a.sampled_steps.tolist() == b.sampled_steps.tolist()
    for name in (*KEYS, *COLUMNS):
        for x, y in zip(a.table[name], b.table[name], strict=True):
            assert x.is_valid == y.is_valid, name
            assert repr(x.as_py()) == repr(y.as_py()), name
    assert [repr(line) for line in a.steps_table.to_pylist()] == [repr(line) for line in b.steps_table.to_pylist()]


def rows(folder: Path) -> list[float]:
    """The first layer's z_norm as a reader finds it now."""
    trace = Trace.load(folder)
    values, there = trace.column("z_norm")
    assert there[:, 0].all()
    return values[:, 0].tolist()


# ---- round trip --------------------------------------------------------------------------------------


def full() -> Trace:
    odd = {"g_z_norm": NAN, "decades": -INF, "backward_gain": INF, "W_rms": 5e-324, "z_rms": -0.0, "a_rms": 0.1 + 0.2}
    samples = [
        sample(0, **odd),
        gap(10),
        gap(20),
        replace(sample(30), learning_rate=None, losses=[(25, NAN), (30, INF)]),
    ]
    return Trace.build(LAYERS, samples, META)


def test_round_trip(tmp_path):
    here = full().save(tmp_path / "run")
    assert here == tmp_path / "run" / "trace"
    assert_same(Trace.load(tmp_path / "run"), full())
    assert_same(Trace.load(here), full())
    assert_same(Trace.load(str(here)), full())


def test_written_as_it_grows_equals_saved_at_the_end(tmp_path):
    writer = TraceWriter(tmp_path / "run", META, part_samples=2)
    memory = TraceWriter(meta=META, part_samples=2)
    for s in [sample(0, decades=NAN), gap(10), gap(20), sample(30), gap(40)]:
        writer.write(s)
        memory.write(s)
        assert_same(writer.snapshot(), memory.snapshot())
    writer.close()
    assert_same(Trace.load(tmp_path / "run"), memory.snapshot())


def test_saving_over_another_trace_never_mixes_them(tmp_path):
    writer = TraceWriter(tmp_path, META, part_samples=1)
    for s in [sample(0), gap(10), sample(20)]:
        writer.write(s)
    writer.close()
    before, other = Trace.load(tmp_path), Trace.build(LAYERS, [sample(5)], META)
    try:
        other.save(tmp_path)
    except TraceError:
        other = before  # a refusal keeps what was there
    assert_same(Trace.load(tmp_path), other)


def test_meta_says_numbers_that_json_has_none_for(tmp_path):
    trace = Trace.build(
        LAYERS, [sample(0)], {"optimizer": {"lr": INF, "eps": NAN, "momentum": -INF}, "x": np.float32(2)}
    )
    text = (trace.save(tmp_path) / "meta.json").read_text()
    told = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["optimizer"] == {"lr": "Infinity", "eps": "NaN", "momentum": "-Infinity"}
    assert told["schema"] == 1
    assert told["x"] == 2
    assert told["layers"][0]["shape"] == [64, 8]
    again = {k: float(v) for k, v in Trace.load(tmp_path).meta["optimizer"].items()}
    assert again == pytest.approx(trace.meta["optimizer"], nan_ok=True)


def test_json_is_whole_or_absent(tmp_path):
    write_json(tmp_path / "a.json", {"x": (1, NAN)})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, "NaN"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_null_is_not_nan(tmp_path):
    full().save(tmp_path)
    values, there = Trace.load(tmp_path).column("g_z_norm")
    assert np.isnan(values).all()
    assert there.tolist() == [[True, False, False]] + [[False] * 3] * 3
    assert Trace.load(tmp_path).column("z_rms")[0][0, 0] == 0  # a zero that was measured
    assert Trace.load(tmp_path).column("z_rms")[1][:, 0].tolist() == [True, False, False, False]


def test_losses_keep_nan_and_leave_out_what_was_not_told():
    steps, losses = full().losses
    assert steps.tolist() == [0, 10, 20, 25, 30]
    assert losses.tolist()[:3] == [1, 1 / 11, 1 / 21]
    assert np.isnan(losses[3])
    assert losses[4] == INF
    rate = Trace.build(LAYERS, [replace(sample(7), losses=[])])
    assert rate.losses[0].tolist() == []
    (line,) = rate.steps_table.to_pylist()
    assert {name: value for name, value in line.items() if value is not None} == {"step": 7, "learning_rate": 0.1}


# ---- layout ------------------------------------------------------------------------------------------


def test_column_is_samples_by_layers_in_the_order_of_the_table():
    mixed = [
        Sample(4, LAYERS, [(0, 2, {"z_norm": 42.0}), (0, 0, {"z_norm": 40.0})], []),
        Sample(9, LAYERS, [(0, 0, {"z_norm": 90.0}), (0, 1, {"z_norm": 91.0}), (0, 2, {"W_rms": 1.0})], []),
    ]
    trace = Trace.build(LAYERS, mixed)
    values, there = trace.column("z_norm")
    assert values.dtype == np.float64
    assert there.dtype == bool
    np.testing.assert_array_equal(values, [[40, NAN, 42], [90, 91, NAN]])
    assert there.tolist() == [[True, False, True], [True, True, False]]
    assert trace.sampled_steps.tolist() == [4, 9]
    assert trace.weight_layers() == [0, 2]
    assert [layer.key for layer in trace.layers] == ["0#0", "1#0", "2#0"]


def test_calls_of_one_module_are_lines_of_their_own():
    layers = [Layer("cell", 0, "linear", fan_in=2), Layer("cell", 1, "linear", parents=(0,), fan_in=2)]
    trace = Trace.build(layers, [Sample(0, layers, [(0, 1, {"z_norm": 2.0}), (0, 0, {"z_norm": 1.0})], [])])
    assert trace.column("z_norm")[0].tolist() == [[1.0, 2.0]]


def test_of_several_backwards_the_first_is_taken():
    trace = Trace.build(
        LAYERS,
        [
            Sample(0, LAYERS, [(1, 0, {"z_norm": 2.0}), (0, 0, {"z_norm": 1.0}), (2, 0, {"z_norm": 3.0})], []),
            Sample(1, LAYERS, [(0, 0, {"z_norm": 4.0}), (1, 0, {"z_norm": 5.0}), (1, 1, {"a_norm": 6.0})], []),
        ],
    )
    assert trace.column("z_norm")[0][:, 0].tolist() == [1.0, 4.0]
    assert not trace.column("a_norm")[1].any()
    assert trace.to_arrow().num_rows == 6  # all are kept


def test_empty_trace(tmp_path):
    trace = Trace.build(LAYERS, [], META)
    assert trace.layers == LAYERS
    assert trace.column("z_norm")[0].shape == (0, 3)
    assert trace.losses[0].shape == (0,)
    trace.save(tmp_path)
    assert_same(Trace.load(tmp_path), trace)


# ---- missing -----------------------------------------------------------------------------------------


def test_spans_of_what_is_missing():
    ok = sample(30)
    trace = Trace.build(LAYERS, [gap(0), gap(10), gap(20), ok, gap(40), gap(50, reason="no gradient"), gap(60)])
    assert trace.missing == [
        Missing("0", 0, "g_W_norm", 0, 20, "frozen"),
        Missing("0", 0, "g_W_norm", 40, 40, "frozen"),
        Missing("0", 0, "g_W_norm", 60, 60, "frozen"),
        Missing("0", 0, "g_W_norm", 50, 50, "no gradient"),
    ]


def test_a_gap_told_for_each_of_several_passes_is_one_span():
    twice = [replace(gap(step), missing=[(0, "g_W_norm", "frozen")] * 2) for step in range(0, 50, 10)]
    assert Trace.build(LAYERS, twice).missing == [Missing("0", 0, "g_W_norm", 0, 40, "frozen")]


# ---- on disk -----------------------------------------------------------------------------------------


def test_a_kill_loses_the_unwritten_part_only(tmp_path):
    writer = TraceWriter(tmp_path, META, part_samples=3)
    for step in range(8):
        writer.write(gap(step))  # and never close
    assert rows(tmp_path) == [0, 1, 2, 3, 4, 5]
    trace = Trace.load(tmp_path)
    assert trace.losses[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert trace.missing == [Missing("0", 0, "g_W_norm", 0, 5, "frozen")]
    assert trace.layers == LAYERS
    writer.close()
    assert rows(tmp_path) == list(range(8))


def test_a_folder_without_a_part_is_an_empty_trace(tmp_path):
    TraceWriter(tmp_path, META)
    assert Trace.load(tmp_path).sampled_steps.tolist() == []
    assert Trace.load(tmp_path).layers == []


def test_a_reader_never_meets_a_torn_file(tmp_path, monkeypatch):
    """While each file is written, half of it on disk, a reader finds the state before."""
    seen, whole = [], pq.write_table

    def slowly(table, path, **options):
        Path(path).write_bytes(b"PAR1 and then half")
        seen.append(len(Trace.load(tmp_path).sampled_steps))
        whole(table, path, **options)

    monkeypatch.setattr("bpdiag.trace.pq.write_table", slowly)
    writer = TraceWriter(tmp_path, META, part_samples=2)
    for step in range(6):
        writer.write(gap(step))
    writer.close()
    assert seen == sorted(seen)
    assert set(seen) == {0, 2, 4, 6}
    assert rows(tmp_path) == list(range(6))
    assert not [p.name for p in (tmp_path / "trace").iterdir() if p.name.startswith(".")]


def test_a_failed_write_leaves_no_litter(tmp_path, monkeypatch):
    writer = TraceWriter(tmp_path, META, part_samples=1)
    writer.write(sample(0))
    before = sorted((tmp_path / "trace").iterdir())

    def full_disk(table, path, **options):
        Path(path).write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("bpdiag.trace.pq.write_table", full_disk)
        with pytest.raises(OSError, match="No space left"):
            writer.write(sample(1))
    assert sorted((tmp_path / "trace").iterdir()) == before
    assert rows(tmp_path) == [0]


def test_a_layer_that_comes_while_a_reader_reads(tmp_path, monkeypatch):
    """The reader has seen the old layer table; a part with a new layer must not break it."""
    writer = TraceWriter(tmp_path, META, part_samples=1)
    writer.write(replace(sample(0), layers=LAYERS[:2], rows=sample(0).rows[:2]))
    loads = json.loads

    def and_then_it_grows(text):
        told = loads(text)
        writer.write(sample(1))
        return told

    monkeypatch.setattr("bpdiag.trace.json.loads", and_then_it_grows)
    trace = Trace.load(tmp_path)
    assert trace.column("z_norm")[0][0, 0] == 0


def test_memory_stays_flat_with_a_folder(tmp_path):
    writer = TraceWriter(tmp_path, META, part_samples=4)
    pending = []
    for step in range(12):
        writer.write(sample(step))
        pending.append(len(writer._rows))
    assert pending == [3, 6, 9, 0] * 3
    assert sorted(p.name for p in (tmp_path / "trace").glob("part-*")) == [f"part-{i:05d}.parquet" for i in range(3)]
    assert all(len(kept) == 0 for kept in writer._kept)


def test_a_part_is_due_after_some_seconds(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("bpdiag.trace.time.monotonic", lambda: clock[0])
    writer = TraceWriter(tmp_path, META, part_seconds=15.0)
    for step, now in enumerate([101.0, 114.0, 115.5, 116.0]):
        clock[0] = now
        writer.write(sample(step))
    assert rows(tmp_path) == [0, 1, 2]


def test_two_runs_are_not_mixed(tmp_path):
    TraceWriter(tmp_path / "run", META).close()
    with pytest.raises(TraceError, match=r"run.*another folder"):
        TraceWriter(tmp_path / "run", META)


def test_parts_are_read_by_others(tmp_path):
    writer = TraceWriter(tmp_path, META, part_samples=2)
    for step in range(5):
        writer.write(sample(step))
    writer.close()
    parts = sorted((tmp_path / "trace").glob("part-*.parquet"))
    assert len(parts) == 3
    table = pa.dataset.dataset([str(p) for p in parts]).to_table()
    assert table.column_names == [*KEYS, *COLUMNS, "edge_gain", "gap_gain"]
    assert table.num_rows == 15
    frame = pd.concat([pd.read_parquet(p) for p in parts])
    assert frame[frame.layer == "2"].z_norm.tolist() == [step + 0.25 for step in range(5)]
    assert Trace.load(tmp_path).to_pandas().equals(frame.reset_index(drop=True))


# ---- what load refuses -------------------------------------------------------------------------------


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "half a part": lambda here: damage(here / "part-00000.parquet"),
    "empty part": lambda here: (here / "part-00000.parquet").write_bytes(b""),
    "another table for a part": lambda here: pq.write_table(pa.table({"x": [1]}), here / "part-00001.parquet"),
    "words for numbers": lambda here: pq.write_table(pa.table({"step": ["one"]}), here / "part-00001.parquet"),
    "half the steps": lambda here: damage(here / "steps-00000.parquet"),
    "half the reasons": lambda here: damage(here / "missing.parquet"),
    "another table for the reasons": lambda here: pq.write_table(pa.table({"x": [1]}), here / "missing.parquet"),
    "half the meta": lambda here: damage(here / "meta.json"),
    "empty meta": lambda here: (here / "meta.json").write_text(""),
    "meta is no text": lambda here: (here / "meta.json").write_bytes(b"\xff\xfe\x00"),
    "meta is a list": lambda here: (here / "meta.json").write_text("[]"),
    "no layers": lambda here: (here / "meta.json").write_text('{"schema": 1}'),
    "half a layer": lambda here: (here / "meta.json").write_text('{"schema": 1, "layers": [{"name": "0"}]}'),
    "another schema": lambda here: (here / "meta.json").write_text('{"schema": 99, "layers": []}'),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_with_its_place(name, tmp_path):
    DAMAGES[name](full().save(tmp_path))
    with pytest.raises(TraceError) as told:
        Trace.load(tmp_path)
    assert str(tmp_path) in str(told.value)
    assert "\n" not in str(told.value)
    if name == "another schema":
        assert "99" in str(told.value)


def test_no_trace(tmp_path):
    with pytest.raises(TraceError, match="absent: no such folder"):
        Trace.load(tmp_path / "absent")
    with pytest.raises(TraceError, match=r"no trace here.*meta\.json"):
        Trace.load(tmp_path)


@pytest.mark.parametrize("depth", ["sweep/job", "all/sweep/job"])
def test_a_folder_of_runs_is_told_from_a_run(tmp_path, depth):
    full().save(tmp_path / depth)
    with pytest.raises(TraceError, match=f"a folder of runs, not a run; take one of them, as .*{depth}$"):
        Trace.load(tmp_path / depth.partition("/")[0])


def test_a_run_from_before_a_column_existed(tmp_path):
    """Adding a column is free: an old trace has it, all null."""
    here = full().save(tmp_path)
    part = pq.read_table(here / "part-00000.parquet")
    pq.write_table(part.drop_columns(["a_dead_fraction"]), here / "part-00000.parquet")
    trace = Trace.load(tmp_path)
    assert trace.column("z_norm")[1][:, 0].all()
    assert not trace.column("a_dead_fraction")[1].any()


# ---- torch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["bpdiag", "bpdiag.trace", "bpdiag.diagnosis"])
def test_reading_and_judging_cost_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_part_that_is_gone_is_no_whole_trace(tmp_path):
    writer = TraceWriter(tmp_path, part_samples=1)
    for step in range(3):
        writer.write(Sample(step, [Layer("a", 0, "linear")], [(0, 0, {"z_rms": 1.0})], [(step, 1.0)]))
    writer.close()
    assert len(Trace.load(tmp_path).sampled_steps) == 3
    (tmp_path / "trace" / "part-00001.parquet").unlink()
    with pytest.raises(TraceError, match=r"damaged: a part-NNNNN\.parquet is gone"):
        Trace.load(tmp_path)
