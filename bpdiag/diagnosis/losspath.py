"""The operations from the last layers up to the losses told, as a graph: what a loss is given is what it reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bpdiag.trace import Trace

# operations that move numbers about and change none
SHAPES = (
    "alias", "clone", "contiguous", "flatten", "permute", "reshapealias", "select", "slice", "squeeze", "t", "tocopy",
    "transpose", "unsafeview", "unsqueeze", "view",
)  # fmt: skip


@dataclass(eq=False)
class Operation:
    """One step of a trace's ``loss_path``."""

    op: str  # autograd's name in lower case
    shape: list[int]  # of what it gave out
    reads: list[Operation]
    dim: int | None = None  # that it worked along
    layer: str | None = None  # the watched call that gave it out
    in_model: bool = False  # in the forward pass, not in the loss

    @property
    def below(self) -> str:
        """The operation that it is given the result of, those of shape left out; empty at the lower end."""
        source = next(iter(self.reads), None)
        while source is not None and (source.op in SHAPES or source.op == "output"):
            source = next(iter(source.reads), None)
        return source.op if source else ""

    def sources(self) -> Iterator[Operation]:
        """All that it was computed from, nearest first."""
        seen, waiting = set[Operation](), list(self.reads)
        while waiting:
            source = waiting.pop(0)
            if source not in seen:
                seen.add(source)
                waiting += source.reads
                yield source

    @property
    def end(self) -> str | None:
        """The last layer below it."""
        return next((source.layer for source in (self, *self.sources()) if source.layer), None)


def operations(trace: Trace) -> list[Operation]:
    """All operations of a trace's ``loss_path``, each after those that it reads; the model's own end among them.

    Example:
        >>> trace = Trace.build([], [], {"loss_path": [
        ...     {"op": "Output", "shape": [64, 10], "made": [{"op": "Softmax", "shape": [64, 10]}]},
        ...     {"op": "LogSoftmax", "shape": [64, 10]}]})
        >>> [(o.op, o.below) for o in operations(trace)]
        [('softmax', ''), ('output', 'softmax'), ('logsoftmax', 'softmax')]
    """
    return _graph(trace.meta.get("loss_path") or [])


def _graph(steps: list[dict[str, Any]], in_model: bool = False) -> list[Operation]:
    """Of a list that tells no ``reads`` each step reads the one before."""
    places: list[Operation] = []
    found: list[Operation] = []
    for n, step in enumerate(steps):
        made = _graph(step.get("made") or [], in_model=True)
        reads = [places[i] for i in step.get("reads", [n - 1] if n else [])] or made[-1:]
        name = step["op"].lower().replace("_", "")
        places.append(Operation(name, step["shape"], reads, step.get("dim"), step.get("layer"), in_model))
        found += [*made, places[-1]]
    return found
