"""What stands between a model's last layers and its loss, read from autograd's graph: a judge sees them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from bpdiag.hooks.call import Call
from bpdiag.hooks.graph import Place

MOST_NODES = 64  # between the output and the loss; and between the last layer and the output
MOST_LOSSES = 16  # told in one run, each with a path of its own
# operations that the inside of a layer may end with: what lies below the first other one is the layer itself
CARRIED = frozenset((
    "Alias", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "Clamp", "ClampMin", "Clone", "Elu", "Exp", "Gelu",
    "Hardsigmoid", "Hardswish", "Hardtanh", "HuberLoss", "L1Loss", "LeakyRelu", "Log", "LogSigmoid", "LogSoftmax",
    "Mean", "MseLoss", "Neg", "NllLoss", "NllLoss2D", "Permute", "Relu", "Relu6", "ReshapeAlias", "Select", "Sigmoid",
    "Silu", "Slice", "SmoothL1Loss", "Softmax", "Softplus", "Squeeze", "Sum", "T", "Tanh", "ToCopy", "Transpose",
    "Unsqueeze", "UnsafeView", "View",
))  # fmt: skip

Step = dict[str, Any]


class LossPaths:
    """The paths of all losses told of a run, each once."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._known: set[str] = set()

    def examine(self, loss: Tensor, outputs: Mapping[Place, Mapping[Place, Call]]) -> None:
        """Add the path of a loss, unless one like it is known: batches may differ in size."""
        if len(self._known) >= MOST_LOSSES:
            return
        path = loss_path(loss, outputs)
        like = _without_sizes(path)
        if like not in self._known:
            self._known.add(like)
            self.steps += [{**step, "reads": [n + len(self.steps) for n in step["reads"]]} for step in path]


def loss_path(loss: Tensor, outputs: Mapping[Place, Mapping[Place, Call]]) -> list[Step]:
    """The operations from the model's output up to ``loss``, each after those that it reads.

    Args:
        loss: before its backward.
        outputs: the model's output tensors, each the node that made it and which of its outputs it is; with the watched
            calls of its forward pass, by what they gave out.

    Returns:
        ``{"op": "LogSoftmax", "shape": [64, 10], "reads": [0], "dim": 1}``: autograd's name of it without Backward, the
        shape of what it gave out, the places in this list of what it reads, the dimension it worked along, counted from
        the front, where it has one.  First the outputs that are read, as ``{"op": "Output", "shape": [64, 10], "reads":
        [], "made": [...]}``, made as ``end_of_model`` tells it.  Empty where the loss was not computed from these
        outputs, or over more than 64 operations.

    Example:
        >>> import torch
        >>> out = torch.ones(3, 2, requires_grad=True) * 1
        >>> [step["op"] for step in loss_path(out.softmax(1).log().mean(), {(out.grad_fn, 0): {}})]
        ['Output', 'Softmax', 'Log', 'Mean']
    """
    reached: dict[Place, None] = {}

    def below(node: Any) -> Iterator[Place]:
        for edge in node.next_functions:
            if edge in outputs:
                reached[edge] = None
            elif _computes(edge[0]):
                yield edge

    top = loss.grad_fn, loss.output_nr
    if top in outputs:
        reached[top] = None
        order: list[Any] | None = []
    else:
        order = _from_below(loss.grad_fn, below)
    if order is None or not reached:
        return []
    number: dict[Any, int] = {edge: n for n, edge in enumerate(reached)}
    number |= {node: len(reached) + n for n, node in enumerate(order)}
    begins: list[Step] = [
        {"op": "Output", "shape": _shape(*edge), "reads": [], "made": end_of_model(edge, outputs[edge])}
        for edge in reached
    ]
    return [*begins, *(_step(node, number) for node in order)]


def end_of_model(output: Place, made_by: Mapping[Place, Call]) -> list[Step]:
    """The operations from the last layers up to an output of the model, each after those that it reads.

    Functions of the forward pass, activations and losses that are modules, and what a layer's own inside ends with, as
    far as the operation that makes the layer: ``F.softmax(self.head(x), 1)`` is Addmm, Softmax.

    Args:
        output: of the model.
        made_by: the watched calls of the pass, by what they gave out.

    Returns:
        As ``loss_path``; with ``"layer": "head#0"`` what a watched call gave out.  Over more than 64 operations one
        step alone, named Unknown.
    """
    inside: set[Any] = set()  # watched calls, and below them
    calls: dict[Any, Call] = {}

    def enter(edge: Place, above: Any = None) -> None:
        if edge in made_by and not made_by[edge].is_sum:
            calls.setdefault(edge[0], made_by[edge])
            inside.add(edge[0])
        elif above in inside:
            inside.add(edge[0])

    def below(node: Any) -> Iterator[Place]:
        if node in inside and _name(node) not in CARRIED:
            return
        for edge in node.next_functions:
            if _computes(edge[0]):
                enter(edge, node)
                yield edge

    enter(output)
    order = _from_below(output[0], below)
    if order is None:
        return [{"op": "Unknown", "shape": _shape(*output), "reads": []}]
    number = {node: n for n, node in enumerate(order)}
    steps = [_step(node, number) for node in order]
    for node, step in zip(order, steps, strict=True):
        if node in calls:
            step["layer"] = "{}#{}".format(*calls[node].key)
            if calls[node].rule and step["op"] not in CARRIED:  # an activation that is no operation of torch's
                step["op"] = calls[node].kind
    return steps


def kind_of_loss(loss: Tensor) -> str:
    """cross_entropy where autograd's graph shows one within a few nodes of the loss, else unknown."""
    stack, seen = [loss.grad_fn], 0
    while stack and seen < 32:
        node, seen = stack.pop(0), seen + 1
        if node is not None:
            if any(word in node.name() for word in ("NllLoss", "CrossEntropy")):
                return "cross_entropy"
            stack += [below for below, _ in node.next_functions]
    return "unknown"


def _without_sizes(path: list[Step]) -> str:
    """What two paths have in common that differ in the size of the batch alone."""
    own = [(step["op"], len(step["shape"]), step["reads"], step.get("dim"), step.get("layer")) for step in path]
    return str((own, [_without_sizes(step["made"]) for step in path if "made" in step]))


def _from_below(top: Any, below: Callable[[Any], Iterable[Place]]) -> list[Any] | None:
    """The nodes from ``top`` down, each after those below it; None over too many."""
    order: list[Any] = []
    seen, stack = set(), [(top, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            if len(seen) > MOST_NODES:
                return None
            stack += [(node, True), *((edge[0], False) for edge in reversed(list(below(node))))]
    return order


def _computes(node: Any) -> bool:
    return node is not None and not hasattr(node, "variable")


def _shape(node: Any, number: int = 0) -> list[int]:
    return [int(n) for n in node._input_metadata[number].shape]


def _step(node: Any, number: Mapping[Any, int]) -> Step:
    """What is told of a node; ``number`` of the nodes, and of the edges, that have a place in the list."""
    shape = _shape(node)
    places = [number.get(edge, number.get(edge[0])) for edge in node.next_functions]
    told: Step = {"op": _name(node), "shape": shape, "reads": [n for n in places if n is not None]}
    dim = getattr(node, "_saved_dim", None)
    if isinstance(dim, int):
        told["dim"] = dim if dim < 2**63 else dim - 2**64 + len(shape)  # autograd keeps -1 as an unsigned number
    return told


def _name(node: Any) -> str:
    """Autograd's name without Backward; of relus that torch computes as clamps theirs."""
    name = re.sub(r"Backward\d*$", "", node.name())
    if name == "Hardtanh":
        return "Relu6" if node._saved_min_val == 0 else name
    least, most = getattr(node, "_saved_min", None), getattr(node, "_saved_max", None)
    from_0 = isinstance(least, int | float) and least == 0 and most is None
    return "Relu" if name in ("Clamp", "ClampMin") and from_0 else name
