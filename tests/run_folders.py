"""Run folders written in a moment from traces typed by hand: for what shows runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from typed import net

from bpdiag import diagnosis
from bpdiag.config import Config, ModelConfig
from bpdiag.trace import Trace, write_json

HOSTILE = "</script><img src=x onerror=alert(1)>\"'\u202e"  # ends a script, opens a tag, closes quotes, turns the line


def write_run(folder: Path, trace: Trace, remedies: list[dict[str, Any]] | None = None, **model: Any) -> Path:
    """A finished run of ours: trace, findings.json, summary.json, metrics.json."""
    config = Config(model=ModelConfig(**{"depth": len(trace.weight_layers()), **model}))
    trace.meta |= {"config": dataclasses.asdict(config), "model": "Sequential", "loss": "cross_entropy"}
    trace.meta |= {"versions": {"bpdiag": "0"}, "every": 10}
    trace.save(folder)
    findings = diagnosis.diagnose(trace)
    diagnosis.write(trace, findings, folder)
    if remedies is not None:
        told = {"schema": 1, "findings": findings, "notes": [], "remedies": remedies}
        write_json(folder / "findings.json", told)
    write_json(folder / "metrics.json", {"test_accuracy": 0.5, "train_loss": 1.25, "steps": 200, "seconds": 1.0})
    return folder


def renamed(trace: Trace, name: str) -> Trace:
    """The same with its first layer called ``name``."""
    old = trace.layers[0].name
    layers = [dataclasses.replace(trace.layers[0], name=name), *trace.layers[1:]]
    names = [name if layer == old else layer for layer in trace.table["layer"].to_pylist()]
    at = trace.table.schema.get_field_index("layer")
    table = trace.table.set_column(at, "layer", [names])
    return Trace(table, trace.steps_table, layers, trace.missing, trace.meta)


def sick(depth: int = 10, **options: Any) -> Trace:
    """A sigmoid's: slopes of 0.24 take the gradient."""
    return net(depth, sig=0.577, slope=0.244, phi=("sigmoid", 0.25, 1.0), loss=lambda s: 2.3, **options)
