"""Each detector switched off is missed, and each threshold moved by a decade is noticed."""

import dataclasses
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
from findings_page import constants
from test_diagnosis import LINES
from typed import (
    CASES,
    HE,
    INF,
    NAN,
    B,
    alike,
    between,
    data,
    held_in,
    net,
    noted,
    path,
    plain,
    residual,
    sent,
    spoil,
    stuck,
)  # fmt: skip

from bpdiag import diagnosis
from bpdiag.diagnosis import DIAGNOSES, diagnose
from bpdiag.trace import Layer, Sample, Trace

MODULES = [
    import_module(f"bpdiag.diagnosis.{file.stem}")
    for file in sorted(Path(diagnosis.__file__).parent.glob("*.py"))
    if file.stem != "__init__"
]


def decoupled(decay: float) -> Trace:
    trace = net(loss=stuck, adam=True)
    trace.meta["optimizer"] |= {"name": "AdamW", "weight_decay": decay}
    return trace


def shrinking(to: float) -> Callable[[int, str, dict], None]:
    """All weights, to this share of their first size."""
    return lambda s, name, row: row.update(W_rms=row["W_rms"] * (to if s else 1)) if "W_rms" in row else None


def dropped(kept: float) -> Trace:
    """A layer, a dropout that keeps so much, a head; the loss stands."""
    layers = [
        Layer("z1", 0, "linear", (B, 10), (), 2, (1,), fan_in=10, units=10),
        Layer("drop", 0, "dropout", (B, 10), (0,)),
        Layer("z2", 0, "linear", (B, 10), (1,), fan_in=10, units=10),
    ]
    rows = [(0, i, {"z_norm": 10 / kept**0.5 if i == 1 else 10.0, "g_z_norm": 1.0, "decades": 0.0}) for i in range(3)]
    samples = [Sample(s, layers, rows, [(t, stuck(t)) for t in range(s, s + 10)], 0.1) for s in range(0, 200, 10)]
    return Trace.build(layers, samples, {"planned_steps": 1000, "optimizer": {"sgd_like": True}})


EDGES: dict[str, Callable[[], Trace]] = {  # between a threshold and a tenth or ten times of it
    "ROSE": lambda: net(loss=lambda s: NAN if s >= 60 else 2.3 * (1 + s / 3)),
    "FELL": lambda: noted(net(loss=lambda s: -2.3 - s / 10), loss_path=path("LogSoftmax", "NllLoss", "Neg")),
    "SETTLED": lambda: net(edit=alike(0.01), steps=range(8)),
    "SMALL_INPUT": lambda: net(edit=data(0.005), loss=stuck),
    "SMALLEST_HALF": lambda: held_in("float16", net(edit=sent(3e-8), loss=stuck)),
    "the optimizer's eps": lambda: held_in("float16", net(loss=stuck), eps=1e-8),
    "IDLE": lambda: residual(0.01),
    "SCALED": lambda: residual(0.31, z=20.0, loss=lambda s: 9.0 if s == 0 else 2.0),
    "OVERCOME": lambda: residual(0.5, z=20.0, loss=lambda s: 9.0 if s == 0 else 1.0),
    "FIRST_REACH": lambda: net(update=0.16, steps=[0]),
    "ROUNDING": lambda: net(scale=1.3e38, sig=HE * 10**1.25e-9),
    "BALANCE": lambda: decoupled(4.0),
    "KEPT": lambda: dropped(0.1),
    "SHRUNK": lambda: net(loss=stuck, edit=shrinking(0.05)),
    "PROBABLE": lambda: noted(net(target=between(0, 2)), loss_path=path("BinaryCrossEntropyWithLogits")),
    "HUGE": lambda: net(loss=lambda s: NAN if s else 5e3, edit=spoil(10, "z2", z_norm=INF)),
    "SAME": lambda: plain(1 + 5e-7),
    "APART": lambda: net(cosine=[0.95, 0.97, 0.99, 0.999, 0.5], loss=stuck),
    "LEAST_FALL": lambda: net(loss=lambda s: 2.29 - 2e-5 * s),
    "STILL": lambda: net(loss=lambda s: 2.34 - 4e-4 * s + 0.05 * (-1) ** s),
    "LEAST_WON": lambda: net(loss=lambda s: 5 - 3e-4 * s, planned=200),
}
FOUND = {  # what the edges are
    "ROSE": "non_finite", "FELL": "loss_interface", "SETTLED": "symmetric_initialization",
    "SMALL_INPUT": "input_scale", "SMALLEST_HALF": "precision", "the optimizer's eps": "precision",
    "IDLE": "residual_mismatch", "SCALED": "forward_scale", "OVERCOME": "forward_scale",
    "FIRST_REACH": "update_too_large",
    "ROUNDING": "exploding", "BALANCE": "over_regularized", "KEPT": "over_regularized",
    "SHRUNK": "over_regularized", "PROBABLE": "targets", "HUGE": "non_finite", "SAME": "linear_stack",
    "APART": "correlation_collapse", "LEAST_FALL": "chance_level", "STILL": "chance_level",
    "LEAST_WON": "too_few_steps",
}  # fmt: skip


def judged(trace: Trace) -> list[tuple[str, ...]]:
    """What is said, computed anew."""
    fresh = dataclasses.replace(trace)
    return [(f.kind, f.severity, f.cause, f.why, f.remedy) for f in diagnose(fresh)]


@pytest.fixture(scope="module")
def traces() -> dict[str, tuple[Trace, list[tuple[str, ...]]]]:
    """Every typed trace, with what is said of it."""
    builders = {f"{kind} {n}": build for kind, pair in CASES.items() for n, build in enumerate(pair)}
    builders |= EDGES | {f"line {name}": build for name, (build, _) in LINES.items()}
    built = {name: build() for name, build in builders.items()}
    return {name: (trace, judged(trace)) for name, trace in built.items()}


@pytest.mark.parametrize("name", EDGES)
def test_the_edges(name, traces):
    assert [kind for kind, *_ in traces[name][1]] == [FOUND[name]]


@pytest.mark.parametrize("kind", DIAGNOSES)
def test_a_detector_switched_off_is_missed(kind, traces, monkeypatch):
    trace, before = traces[f"{kind} 0"]
    monkeypatch.setitem(DIAGNOSES, kind, lambda p: iter(()))
    assert kind in [k for k, *_ in before]
    assert kind not in [k for k, *_ in judged(trace)]


def thresholds() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each constant that a detector compares with, and the kinds that do."""
    users: dict[str, list[str]] = {}
    for kind, generator in DIAGNOSES.items():
        for name, _, _ in constants(generator):
            users.setdefault(name, []).append(kind)
    yield from ((name, tuple(kinds)) for name, kinds in users.items())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a window of no samples is no window that we use
@pytest.mark.parametrize(("name", "kinds"), [*thresholds()])
def test_a_threshold_moved_by_a_decade_is_noticed(name, kinds, traces, monkeypatch):
    owners = [module for module in MODULES if name in vars(module)]
    value = vars(owners[0])[name]
    likely = [name, *(f"{kind} {n}" for kind in kinds for n in (0, 1))]
    said = {trace: {kind for kind, *_ in before} for trace, (_, before) in traces.items()}
    order = sorted(traces, key=lambda trace: (trace not in likely, not said[trace] & {*kinds}))
    for factor in (10, 0.1):
        moved = type(value)(value * factor)
        for module in owners:
            monkeypatch.setattr(module, name, moved)
        if any(judged(traces[trace][0]) != traces[trace][1] for trace in order):
            return
    pytest.fail(f"{name} = {value} can be moved by a decade unnoticed")
