"""A run whose trace is not there, from its event file: what TensorBoard has kept of the scalars, n of N steps.

TensorBoard keeps a random sample of a tag's steps (1,000 unless told otherwise), and no layer table: nothing is judged
or multiplied here, and a map is drawn as far as it goes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from tensorboard.context import RequestContext
from tensorboard.data.provider import DataProvider, RunTagFilter

from bpdiag import views
from bpdiag.dashboard.writer import TAGS
from bpdiag.trace import plain

PLUGIN = "scalars"
# series of a view: (tag's beginning, log10 of it)
DRAWN = {key: (TAGS[column], log) for key, (column, log, _) in views.SERIES.items() if column in TAGS}
LOSS = "loss/train"


def runs(provider: DataProvider, experiment: str, known: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Overviews of the runs whose event files have our tags, by name; those known otherwise are left out."""
    names = {run.run_name for run in provider.list_runs(RequestContext(), experiment_id=experiment)} - set(known)
    if not names:
        return {}
    told = provider.list_scalars(
        RequestContext(), experiment_id=experiment, plugin_name=PLUGIN, run_tag_filter=RunTagFilter(runs=names)
    )
    beginning = f"{TAGS['decades']}/"
    found = {run: [series for tag, series in tags.items() if tag.startswith(beginning)] for run, tags in told.items()}
    return {
        run: {
            "id": run,
            "stamp": max(series.max_wall_time for series in all_of_it),
            "verdict": "not judged",
            "sentence": "No trace lies beside this event file: what TensorBoard has kept of its steps is drawn.",
            "planned": max(series.max_step for series in all_of_it) + 1,
            **dict.fromkeys(("first", "last", "accuracy", "loss", "steps")),
            "expected": [],
            "config": {},
            "model": "",
        }
        for run, all_of_it in found.items()
        if all_of_it
    }


def detail(provider: DataProvider, experiment: str, overview: dict[str, Any]) -> dict[str, Any]:
    """One of them in the form of ``views.detail``."""
    name = overview["id"]
    wanted = RunTagFilter(runs=[name])
    told = provider.read_scalars(
        RequestContext(), experiment_id=experiment, plugin_name=PLUGIN, downsample=views.COLUMNS, run_tag_filter=wanted
    )
    tags = {tag: {datum.step: datum.value for datum in data} for tag, data in told.get(name, {}).items()}
    beginning = f"{TAGS['decades']}/"
    labels = sorted(tag.removeprefix(beginning) for tag in tags if tag.startswith(beginning))
    steps = sorted({step for tag, data in tags.items() if tag.startswith(beginning) for step in data})
    empty = np.full((len(steps), len(labels)), np.nan)
    nothing = (empty, np.zeros(empty.shape, bool))
    series = dict.fromkeys(
        (*views.SERIES, *(f"takes_{owner}" for owner in views.OWNERS), "entering", "around"), nothing
    )
    for key, (tag, log) in DRAWN.items():
        series[key] = _block([tags.get(f"{tag}/{label}", {}) for label in labels], steps, log)
    losses = sorted(tags.get(LOSS, {}).items())
    return plain(
        {
            **overview,
            "schema": views.SCHEMA,
            "sentence": f"No trace lies beside this event file: {len(steps)} of {overview['planned']} steps are drawn, "
            "as TensorBoard has kept them.",
            "layers": [_layer(label) for label in labels],
            "around": [],
            "steps": steps,
            "sampled": len(steps),
            "spans": [],
            "curve": {"steps": [step for step, _ in losses], "low": [loss for _, loss in losses], "high": []},
            **dict.fromkeys(("guessing", "theory")),
            "series": {key: views.packed(*block) for key, block in series.items()},
            "peaks": {},
            **{key: [] for key in ("gaps", "findings", "remedies", "notes")},
            "provenance": {"folder": name, "versions": {}, "optimizer": {}},
        }
    )


def _block(columns: list[dict[int, float]], steps: list[int], log: bool) -> tuple[np.ndarray, np.ndarray]:
    """(S, L) numbers, a layer's by step, and whether they are there."""
    told = np.array([[column.get(step, np.nan) for column in columns] for step in steps]).reshape(-1, len(columns))
    there = np.array([[step in column for column in columns] for step in steps], bool).reshape(told.shape)
    with np.errstate(all="ignore"):
        return (np.log10(told) if log else told), there


def _layer(label: str) -> dict[str, Any]:
    kind = label.partition("_")[2]
    facts = dict.fromkeys(("fan_in", "units", "activation", "next"))
    return {"key": label, "name": label, "kind": kind, **facts, "forks": True}
