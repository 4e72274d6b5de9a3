"""Autograd's graph between watched calls: which outputs a call was computed from, and what each way down carries.

A sum that no module computes is a call too where ways meet in it (see ``sums``): walks end there.

At a place that several calls read (a block's input: its branch and its skip) the cotangents of the ways add up, and the
sum says nothing of the parts.  So a hook on the last node of each way reads what that way alone sends down.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bpdiag.hooks.between import names
from bpdiag.hooks.call import Call, leaves
from bpdiag.hooks.reading import norm_by_sample
from bpdiag.hooks.shelf import Shelf
from bpdiag.hooks.sums import ADDITIONS, call_of, joins

MOST_NODES = 10_000  # looked at between two layers

Place = tuple[Any, int]  # a tensor of the graph: the node that made it, and which of its outputs it is
Edge = tuple[Any, int]  # the node that reads it, and which of its inputs it is


@dataclass
class Walk:
    """From an output down to the outputs of watched calls, with no watched call in between."""

    parents: dict[Call, None] = field(default_factory=dict)
    crossed: list[tuple[Place, Edge | None]] = field(default_factory=list)  # without an edge: handed on as it is
    through: dict[Any, None] = field(default_factory=dict)  # reentrant checkpoints in whose insides it ends
    between: list[Any] = field(default_factory=list)  # nodes that are none of the reader's own, from above
    sums: dict[Any, Call] = field(default_factory=dict)  # those among them that are calls since this walk
    given_up: bool = False  # after MOST_NODES
    ops: dict[str, None] = field(default_factory=dict)  # names of the nodes crossed

    def join(self, other: Walk) -> None:
        """What ``other`` came to."""
        self.parents |= other.parents
        self.through |= other.through
        self.crossed += other.crossed
        self.given_up |= other.given_up


class Graph:
    """The graph of one forward pass, as far as it was walked."""

    def __init__(self, shelf: Shelf) -> None:
        self.made_by: dict[Place, Call] = {}
        self._shelf = shelf
        self._readers: dict[Place, dict[Edge | None, dict[Call | None, None]]] = {}
        self._below: dict[Any, Walk] = {}  # a checkpoint -> what its input was computed from
        self._sums: dict[tuple[str, int], Call] = {}

    def walk(
        self,
        outs: Iterable[Tensor],
        at: tuple[int, int],
        within: Any = None,
        inputs: Collection[Place] | None = None,
    ) -> Walk:
        """Down from what a reader gave out to watched calls.

        Args:
            outs: its outputs.
            at: number of its forward pass, its place in the order of execution.
            within: the checkpoint whose recomputation made them, if one did.
            inputs: what the reader was given: what lies above is its own.  None of who reads the model's output, with
                nothing of its own.
        """
        outs, known = list(outs), set(self._below)
        walk = self._down(outs, within, inputs)
        fresh = self._below.keys() - known
        nodes = [*walk.between, *(node for checkpoint in fresh for node in self._below[checkpoint].between)]
        if walk.given_up or not any(node.name() in ADDITIONS for node in nodes):
            return walk
        sums = self._new_sums(nodes, at, within)
        if sums:
            for checkpoint in fresh:
                del self._below[checkpoint]
            walk = self._down(outs, within, inputs)
            walk.sums = sums
        return walk

    def _down(self, outs: Sequence[Tensor], within: Any, inputs: Collection[Place] | None) -> Walk:
        walk = Walk()
        for out in outs:
            node = out.grad_fn
            if node is None:
                continue
            place = node, out.output_nr
            if place in self.made_by:
                walk.parents[self.made_by[place]] = None
                walk.crossed.append((place, None))
            elif is_checkpoint(node):
                self._end_at(node, walk)
            else:
                self._descend(node, walk, self._below.get(within), inputs)
        return walk

    def _descend(self, top: Any, walk: Walk, entry: Walk | None, inputs: Collection[Place] | None) -> None:
        """Extend ``walk`` by all that lies below a node; ``entry`` lies below what a recomputation began with."""
        seen = {top}
        own, between = ([], [top]) if inputs is None else ([top], [])
        while (own or between) and len(seen) < MOST_NODES:
            further = own or between
            above = further.pop()
            if further is between:
                walk.between.append(above)
            # edges to a node already seen still count: another of its outputs may be a watched one
            for i, (node, number) in enumerate(above.next_functions):
                if node is None:
                    continue
                if hasattr(node, "variable"):  # a weight, or what a checkpoint detached
                    if entry is not None and not isinstance(node.variable, nn.Parameter):
                        walk.parents |= entry.parents
                        walk.through |= entry.through
                    continue
                place = node, number
                walk.crossed.append((place, (above, i)))
                if place in self.made_by:
                    walk.parents[self.made_by[place]] = None
                elif is_checkpoint(node):
                    self._end_at(node, walk)
                elif node not in seen:
                    seen.add(node)
                    (between if inputs and (node, number) in inputs else further).append(node)
        walk.given_up |= bool(own or between)
        walk.ops |= dict.fromkeys(sorted({re.sub(r"Backward\d*$", "", node.name()) for node in seen}))

    def _new_sums(self, nodes: Iterable[Any], at: tuple[int, int], within: Any) -> dict[Any, Call]:
        """Sums among nodes and what lies below them, from the lowest up; each a call from now on."""
        found: dict[Any, Call] = {}
        entry = self._below.get(within)
        reached: dict[Any, frozenset[Any]] = {}  # a node -> the calls, and checkpoints, that it was computed from

        def known(node: Any, number: int) -> frozenset[Any] | None:
            """What one input of a node was computed from; None where that must be found first."""
            if (node, number) in self.made_by:
                return frozenset((self.made_by[node, number],))
            if hasattr(node, "variable"):
                outside = entry is None or isinstance(node.variable, nn.Parameter)
                return frozenset() if entry is None or outside else frozenset((*entry.parents, *entry.through))
            return frozenset((node,)) if is_checkpoint(node) else reached.get(node)

        stack = list(nodes)
        while stack:
            node = stack[-1]
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            below = [known(*edge) for edge in edges]
            unknown = [edge[0] for edge, calls in zip(edges, below, strict=True) if calls is None]
            if unknown:
                stack += unknown
                continue
            stack.pop()
            if node in reached:
                continue
            parts = [calls for calls in below if calls is not None]
            reached[node] = frozenset().union(*parts)
            if joins(node, parts):
                call = self._new_sum(node, at, within)
                if call is not None:
                    found[node] = call
        return found

    def _new_sum(self, node: Any, at: tuple[int, int], within: Any) -> Call | None:
        """The call that a sum is from now on; None over checkpoints alone, whose last calls are not known yet."""
        whole, gap = Walk(), dict[Call, tuple[str, ...]]()
        for i, (below, number) in enumerate(node.next_functions):
            walk = Walk(crossed=[((below, number), (node, i))])
            if (below, number) in self.made_by:
                walk.parents[self.made_by[below, number]] = None
            elif is_checkpoint(below):
                self._end_at(below, walk)
            elif hasattr(below, "variable"):  # what the checkpoint that it is computed in began with
                walk = Walk(self._below[within].parents, through=self._below[within].through)
            else:
                self._descend(below, walk, self._below.get(within), None)
            gap |= dict.fromkeys(walk.parents, names(walk.between))
            whole.join(walk)
        if not whole.parents:
            return None
        # through a checkpoint its reader's place is known alone, else it stands behind what it adds
        behind = at[1] - 1 if whole.through else max(call.order[0] for call in whole.parents)
        place, key = (at[0], (behind, len(self._sums) + 1)), self._sums.__contains__
        call = call_of(node, tuple(whole.parents), key, place, within=within, through=tuple(whole.through), gap=gap)
        self.made_by[node, 0] = self._sums[call.key] = call
        self.read(whole, call)
        return call

    def _end_at(self, checkpoint: Any, walk: Walk) -> None:
        walk.through[checkpoint] = None
        if checkpoint not in self._below:
            self._below[checkpoint] = below = Walk()
            self._descend(checkpoint, below, None, checkpoint.next_functions)

    def read(self, walk: Walk, reader: Call | None) -> None:
        """``reader``, or None for who reads the model's output, stands at the upper end of ``walk``."""
        for place, edge in walk.crossed:
            self._readers.setdefault(place, {}).setdefault(edge, {})[reader] = None

    def measure_forks(self) -> None:
        """Where ways part, have each way that is one call's alone measured: the norm lands in ``reader.edges``.

        For when the forward pass is through: before, nobody knows who else will read a place.
        """
        alone: dict[tuple[Call, Call], list[Edge]] = {}
        for place, edges in self._readers.items():
            everyone = [reader for readers in edges.values() for reader in readers]
            if len(set(everyone)) < 2:
                continue
            source = self._source(place, everyone)
            for edge, readers in edges.items():
                (reader, *others) = readers
                if edge and reader and source and not others:
                    alone.setdefault((reader, source), []).append(edge)
        for (reader, source), ways in alone.items():
            if len(ways) == 1:  # of several the norms do not add
                _measure(reader, source, *ways[0], self._shelf)

    def _source(self, place: Place, readers: Iterable[Call | None]) -> Call | None:
        """Whose output it is, or was before a function changed it."""
        if place in self.made_by:
            return self.made_by[place]
        shared = [set(reader.parents) for reader in readers if reader]
        below = set.intersection(*shared) if shared else set()
        return below.pop() if len(below) == 1 else None


@dataclass(frozen=True)
class View:
    """How an output is a view of its base."""

    base_stride: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, g: Tensor) -> Tensor:
        """A gradient of the base, as the output's: so that its first dimension is the batch again."""
        laid = torch.empty_strided(g.shape, self.base_stride, dtype=g.dtype, device=g.device)
        return laid.copy_(g.detach()).as_strided(self.shape, self.stride, self.offset)


def where_gradients_come(outs: Sequence[Tensor], given: Any) -> Iterator[tuple[int, Tensor, View | None]]:
    """i and the i-th output; for one that is a view of something else that its maker made, all of it, ~i and that.

    Who overwrites a view gives it a new graph above what it is a view of: the gradient comes there, and no more to i.

    Args:
        outs: of a call.
        given: its arguments: what they or other outputs share is not this output's alone.

    Example:
        >>> out = nn.Linear(2, 3)(Tensor(4, 5, 2))
        >>> [(i, tuple(t.shape), view and view.shape) for i, t, view in where_gradients_come([out], ())]
        [(0, (4, 5, 3), None), (-1, (20, 3), torch.Size([4, 5, 3]))]
    """
    for i, out in enumerate(outs):
        if not out.requires_grad:
            continue
        yield i, out, None
        base = out._base
        if type(base) is not Tensor or base.grad_fn is None or base.numel() != out.numel():
            continue
        others = (*leaves(given), *(other for other in outs if other is not out))
        if not any(x is base or x._base is base for x in others):
            offset = out.storage_offset() - base.storage_offset()
            yield ~i, base, View(base.stride(), out.shape, out.stride(), int(offset))


def on_gradient(t: Tensor, arrived: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``arrived`` with the gradient of ``t``; not when a Function above says that it has none."""
    return t.register_hook(lambda g: None if g is None else arrived(g))


def is_checkpoint(node: Any) -> bool:
    """Whether a node of the graph is a reentrant checkpoint: its inside is computed, with a graph, in the backward."""
    return bool(node.name() == "CheckpointFunctionBackward")


def _measure(reader: Call, source: Call, node: Any, i: int, shelf: Shelf) -> None:
    def arrived(grad_inputs: tuple[Tensor | None, ...], grad_outputs: Any) -> None:
        g = grad_inputs[i]
        again = source in reader.edges  # a second backward through the same graph
        reader.edges[source] = None if again or g is None else norm_by_sample(g, shelf)

    node.register_hook(arrived)
