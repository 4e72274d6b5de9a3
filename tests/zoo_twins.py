"""Watchers with one fault each, for the zoo's checks to catch: some do harm, some miss calls, some report untruths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from bpdiag import Trace, watch

Rows = list[dict[str, Any]]


def sound(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return watch(model, optimizer)


# ---- those that do harm -----------------------------------------------------------------------------------


def harmful(before: Callable[[nn.Module], Any], after: Callable[[nn.Module, Any], Any]) -> Callable[..., Any]:
    """Watches, and does something of its own when it begins and when it ends."""

    @contextmanager
    def watcher(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
        with watch(model, optimizer) as watching:
            mine = before(model)
            yield watching
            after(model, mine)

    return watcher


def first_linear(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, nn.Linear))


def bend_gradients(model: nn.Module) -> Any:
    """A hook on the output's tensor whose return value takes the cotangent's place."""

    def bend(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda g: g * (1 + 2**-50))

    return first_linear(model).register_forward_hook(bend)


def add_noise(model: nn.Module) -> Any:
    return first_linear(model).register_forward_hook(lambda module, args, output: output * (1 + 2**-50))


def remove(model: nn.Module, handle: Any) -> None:
    handle.remove()


def nothing(*_: Any) -> None:
    pass


def leave_on_weight(model: nn.Module, _: Any) -> None:
    first_linear(model).weight.register_hook(nothing)


def count_up(model: nn.Module, _: Any) -> None:
    next(b for b in model.buffers() if b.dtype == torch.int64).add_(1)


HARMFUL = {
    "adds noise": harmful(add_noise, remove),
    "bends gradients": harmful(bend_gradients, remove),
    "draws a random number": harmful(nothing, lambda *_: torch.rand(1)),
    "leaves a hook": harmful(lambda model: first_linear(model).register_forward_hook(nothing), nothing),
    "leaves a hook on a parameter": harmful(
        nothing, lambda model, _: first_linear(model).weight.register_hook(nothing)
    ),
    "changes a buffer": harmful(nothing, count_up),
}


# ---- those that tell something else -----------------------------------------------------------------------


def telling(edit: Callable[[Trace], Trace]) -> Callable[..., Any]:
    """Watches, and tells an edited trace."""

    @contextmanager
    def watcher(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
        told = SimpleNamespace()
        with watch(model, optimizer) as watching:
            told.loss = watching.loss
            yield told
        told.trace = edit(watching.trace)

    return watcher


def with_rows(edit: Callable[[Rows], Rows]) -> Callable[..., Any]:
    def edited(trace: Trace) -> Trace:
        rows = edit(trace.to_arrow().to_pylist())
        return dataclasses.replace(trace, table=pa.Table.from_pylist(rows, schema=trace.table.schema))

    return telling(edited)


def cotangent(row: dict[str, Any]) -> str:
    return "g_a_norm" if row["z_norm"] is None else "g_z_norm"


def of_the_layer_above(rows: Rows) -> Rows:
    """What the layer above gave out: the cotangent of another tensor."""
    told = [row[cotangent(row)] for row in rows]
    return [{**row, cotangent(row): g} for row, g in zip(rows, [*told[1:], told[0]], strict=True)]


def after_what_overwrites(rows: Rows) -> Rows:
    """As a hook that is put on the output too late: an in-place activation has taken the tensor by then."""
    late = [above if above["a_norm"] is not None else row for row, above in pairwise(rows)]
    return [
        {**row, cotangent(row): taken[cotangent(taken)]} for row, taken in zip(rows, [*late, rows[-1]], strict=True)
    ]


def of_the_last_call(rows: Rows) -> Rows:
    """One number per module, whichever call it was of."""
    last = {row["layer"]: row for row in rows}
    return [{**row, cotangent(row): last[row["layer"]][cotangent(row)]} for row in rows]


def zero_for_missing(rows: Rows) -> Rows:
    return [{**row, cotangent(row): row[cotangent(row)] or 0.0} for row in rows]


def imprecise(column: str) -> Callable[[Rows], Rows]:
    return lambda rows: [{**row, column: row[column] and row[column] * (1 + 1e-9)} for row in rows]


def imprecise_in_sums(rows: Rows) -> Rows:
    return [{**row, "g_z_norm": row["g_z_norm"] * (1 + 1e-9)} if row["layer"].endswith("+") else row for row in rows]


def swapped(trace: Trace) -> Trace:
    first, second, *others = trace.layers
    return dataclasses.replace(trace, layers=[second, first, *others])


def blaming_the_graph(trace: Trace) -> Trace:
    outside = [dataclasses.replace(line, reason="outside the graph") for line in trace.missing]
    return dataclasses.replace(trace, missing=outside)


def blaming_others(trace: Trace) -> Trace:
    unseen = [{**line, "reason": "another one uses its parameters itself"} for line in trace.meta["unseen"]]
    return dataclasses.replace(trace, meta={**trace.meta, "unseen": unseen})


INCOMPLETE = {
    "drops a call": with_rows(lambda rows: rows[:7] + rows[8:]),
    "drops the second call of a module": with_rows(lambda rows: [r for r in rows if r["call"] == 0]),
    "makes up a call": with_rows(lambda rows: [*rows, {**rows[0], "call": 9}]),
    "lists nothing": telling(lambda trace: dataclasses.replace(trace, meta={**trace.meta, "unseen": []})),
    "gives no reason": telling(lambda trace: dataclasses.replace(trace, missing=[])),
    "gives a reason that is not so": telling(blaming_the_graph),
    "lists for a reason that is not so": telling(blaming_others),
    "orders by something else": telling(swapped),
}
WRONG = {
    "tells the layer above": with_rows(of_the_layer_above),
    "comes after an in-place operation": with_rows(after_what_overwrites),
    "tells the last call": with_rows(of_the_last_call),
    "has zero for missing": with_rows(zero_for_missing),
    "is imprecise in cotangents of z": with_rows(imprecise("g_z_norm")),
    "is imprecise in cotangents of a": with_rows(imprecise("g_a_norm")),
    "is imprecise in weight gradients": with_rows(imprecise("g_W_norm")),
    "is imprecise in sums": with_rows(imprecise_in_sums),
    "is imprecise in outputs": with_rows(imprecise("a_norm")),
}
