"""A sink that writes TensorBoard's event file: few tags, layers in execution order, one event a step.

Tags are ``group/statistic/NN_kind``, NN counting the weight layers from the input (01) to the logits:

    gradient/cotangent_norm/03_linear    |dL/dz|               gain/backward_gain/03_linear   G, < 1 vanishes
    gradient/weight_norm/03_linear       |dL/dW|               gain/decades/03_linear         log10 of the product of G
    signal/z_rms/03_linear               what enters phi       signal/saturated/03_tanh, signal/dead/03_tanh
    update/update_ratio/03_linear        rms(dW) / rms(W)
    gain/edge/sum3_from_relu2            where ways part: what one of them carries, against its reader's cotangent
    gain/gap/out_from_qkv                what functions between two layers pass on of it

Where histograms are asked for: ``histogram/z/03_linear``, also of g_z, a, g_a, W and g_W, of the finite numbers; how
many were not is the scalar ``nonfinite/z/03_linear``, written where there are any.

The custom scalars tab shows all layers of a statistic in one chart, the hparams tab a run of ours by its settings.
One event carries all of a step's numbers: 13 bytes each instead of 42.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from bpdiag.dashboard import summaries
from bpdiag.trace import Layer, Sample

TAGS = {
    "g_z_norm": "gradient/cotangent_norm",
    "g_W_norm": "gradient/weight_norm",
    "backward_gain": "gain/backward_gain",
    "decades": "gain/decades",
    "z_rms": "signal/z_rms",
    "a_saturated_fraction": "signal/saturated",
    "a_dead_fraction": "signal/dead",
    "update_ratio": "update/update_ratio",
}
QUEUE = 1_000  # events that wait for the writing thread before anybody waits for it
WAYS = {"edge_gain": "gain/edge", "gap_gain": "gain/gap"}


class TensorBoardWriter:
    """The event file of one run folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._file = EventFileWriter(str(Path(folder)), max_queue_size=QUEUE)
        self._add(summaries.layout({tag: tag.partition("/")[2].replace("_", " ") for tag in TAGS.values()}), 0)

    def write(self, sample: Sample) -> None:
        """One event per step: the losses of the steps since the last sample, then the sample."""
        losses = dict(sample.losses)
        values = {"loss/train": losses.pop(sample.step)} if sample.step in losses else {}
        for step, loss in losses.items():
            self.add_scalars({"loss/train": loss}, step)
        if sample.learning_rate is not None:
            values["update/learning_rate"] = sample.learning_rate
        labels = _labels(sample.layers)
        for backward, index, row in sample.rows:
            if backward == 0 and index in labels:
                values |= {f"{tag}/{labels[index]}": row[column] for column, tag in TAGS.items() if column in row}
            for column, group in WAYS.items():
                if backward == 0 and column in row:
                    reader = sample.layers[index]
                    parents = [sample.layers[i].short for i in reader.parents]
                    ways = {f"{group}/{reader.short}_from_{p}": v for p, v in zip(parents, row[column], strict=True)}
                    values |= {tag: gain for tag, gain in ways.items() if gain is not None}
        bins = []
        for index, tensor, told in sample.histograms:
            if index in labels:
                tag, low, high, strangers, *counts = f"{tensor}/{labels[index]}", *told
                if strangers:
                    values[f"nonfinite/{tag}"] = strangers
                if any(counts):
                    bins.append(summaries.histogram(f"histogram/{tag}", low, high, counts))
        self.add_scalars(values, sample.step)
        if bins:
            self._add(Summary(value=bins), sample.step)

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by tag, in one event."""
        if values:
            self._add(Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()]), step)

    def add_text(self, tag: str, markdown: str, step: int) -> None:
        """Markdown for the text tab."""
        self._add(summaries.text(tag, markdown), step)

    def add_image(self, tag: str, png: bytes, step: int) -> None:
        """A picture for the images tab."""
        self._add(summaries.image(tag, png), step)

    def add_settings(self, config: Mapping[str, Any], results: Mapping[str, float], step: int) -> None:
        """What was asked of the run and what it came to, for the hparams tab: no run of its own."""
        self.add_scalars(dict(results), step)
        for summary in summaries.settings(config, list(results)):
            self._add(summary, step)

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def _add(self, summary: Summary, step: int) -> None:
        self._file.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def _labels(layers: Sequence[Layer]) -> dict[int, str]:
    """Index -> NN_kind; an activation has the number of the weight layer below it."""
    number = 0
    labels: dict[int, str] = {}
    digits = max(2, len(str(sum(layer.is_weight_layer for layer in layers))))
    for index, layer in enumerate(layers):
        number += layer.is_weight_layer
        if layer.is_weight_layer or layer.activation:
            label = f"{number:0{digits}d}_{layer.kind}"
            again = sum(taken == label or taken.startswith(f"{label}.") for taken in labels.values())
            labels[index] = f"{label}.{again + 1}" if again else label
    return labels
