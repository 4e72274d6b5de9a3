"""What a run leaves in its folder: its trace, TensorBoard's event file and, when it closes, its findings.

Whoever measures writes to it: ``watch`` sample by sample, a stack in parts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bpdiag import diagnosis, views
from bpdiag.config import dotted
from bpdiag.dashboard.writer import TensorBoardWriter
from bpdiag.diagnosis import Finding
from bpdiag.trace import Sink, Trace, TraceWriter

# settings that the hparams tab shows, by their short names: the tab opens on the first five in alphabetical order
TOLD = {
    "seed": "seed",
    "data.batch_size": "batch_size",
    "model.activation": "activation",
    "model.bias_variance": "bias_variance",
    "model.depth": "depth",
    "model.weight_variance": "weight_variance",
    "model.width": "width",
    "optimizer.clip": "optimizer_clip",
    "optimizer.eps": "optimizer_eps",
    "optimizer.lr": "lr",
    "optimizer.momentum": "momentum",
    "optimizer.name": "optimizer",
    "optimizer.warmup": "optimizer_warmup",
    "optimizer.weight_decay": "weight_decay",
}


class RunLog:
    """Of one run.  Without a folder it keeps the trace, in memory.

    Raises:
        TraceError: ``folder`` already holds a run.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, meta: dict[str, Any]) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.steps = 0
        self.traces = TraceWriter(folder, meta)
        self.board = TensorBoardWriter(folder) if folder is not None else None
        self.sinks: list[Sink] = [sink for sink in (self.traces, self.board) if sink]
        self._results: dict[str, float] = {}
        self._final: Trace | None = None

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers for the dashboard; those of a test are the run's results."""
        self._results |= {tag: value for tag, value in values.items() if tag.endswith("/test")}
        if self.board is not None:
            self.board.add_scalars(values, step)

    def image(self, tag: str, png: bytes) -> None:
        """A picture for the dashboard, a PNG."""
        if self.board is not None:
            self.board.add_image(tag, png, self.steps)

    @property
    def trace(self) -> Trace:
        """All that was measured so far."""
        return self._final or self.traces.snapshot()

    def findings(self) -> list[Finding]:
        """What a judge says of it so far."""
        trace = self.trace
        return diagnosis.diagnose(trace) if len(trace.sampled_steps) else []

    def close(self, **facts: Any) -> None:
        """Write what is pending, ``facts`` for meta.json, the findings; called once."""
        self.traces.meta |= facts
        self.traces.close()
        self._final = self.traces.snapshot()
        if self.board is not None and self.folder is not None:
            findings = self.findings()
            diagnosis.write(self._final, findings, self.folder)
            views.keep(self.folder, len(self._final.sampled_steps))
            self.board.add_text("findings", diagnosis.as_markdown(findings), self.steps)
            self._tell_settings(findings)

    def release(self) -> None:
        """Close the event file, whatever happened before."""
        if self.board is not None:
            self.board.close()

    def _tell_settings(self, findings: Sequence[Finding]) -> None:
        """A run of ours in the hparams tab: its configuration, test accuracy, D_1, number of findings."""
        if "config" in self.traces.meta and self.board is not None:
            results = {
                **self._results,
                "summary/decades_layer_1": diagnosis.summarize(self.trace, findings)["decades_first_layer"],
                "summary/findings": float(len(findings)),
            }
            told = {key: value for key, value in dotted(self.traces.meta["config"]).items() if key in TOLD}
            self.board.add_settings({TOLD[key]: value for key, value in told.items()}, results, self.steps)
