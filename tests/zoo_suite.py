"""What is asked of the watcher on any architecture: it changes nothing, misses no call, reports autograd's cotangents.

Three runs of one step from one seed: one by itself, one watched, one in which every output's place in autograd's graph
is noted by hooks of this file and ``torch.autograd.grad`` is asked for the gradients there.  The place is noted when
the module returns, so that an in-place operation afterwards does not change what is asked for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from bpdiag import watch

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative; of the norms alone, the tensors are the same bits


def tensors(tree: Any) -> Iterator[Tensor]:
    """The real and complex tensors of an output."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point() or tree.is_complex():
            yield tree
    elif isinstance(tree, Mapping):
        yield from tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from tensors(branch)
    elif hasattr(tree, "__dataclass_fields__"):
        yield from tensors(list(vars(tree).values()))


def distance(output: Any) -> Tensor:
    """A loss that reads everything the model gives out: mean squares of the distance to fixed random numbers."""
    generator = torch.Generator().manual_seed(2)
    return sum(
        (t - torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)).abs().square().mean()
        for t in tensors(output)
        if t.requires_grad
    )


def told_loss(output: Any) -> Tensor:
    """The loss that the model computes itself, or the sum of them."""
    return output.loss if hasattr(output, "loss") else sum(output.values())


@dataclass(frozen=True)
class Entry:
    """An architecture of the zoo.

    Attributes:
        make: the model, from the seed that is set.
        inputs: positional arguments, likewise; a mapping is passed by keyword.
        loss: of the model's output.
        dtype: float64 where the architecture computes in it.
        remark: what is special about it.
        plain: the same model without what keeps torch.autograd.grad from being asked, for the oracle.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    loss: Callable[[Any], Tensor] = distance
    dtype: torch.dtype = torch.float64
    remark: str = ""
    plain: Callable[[], nn.Module] | None = None


@dataclass
class Verdict:
    """Counts for the table, and per check what was found wrong: nothing, if all is well."""

    calls: int = 0
    rows: int = 0
    listed: int = 0
    without_gradient: int = 0
    cotangents: int = 0
    sums: int = 0
    weights: int = 0
    seconds: float = 0.0
    reasons: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        return [*self.changed, *self.incomplete, *self.wrong]


class Run:
    """A model, its input and an optimizer, as the seed gives them."""

    def __init__(self, entry: Entry) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.entry = entry
        self.model = entry.make().to(entry.dtype).train()
        self.inputs = cast(entry.inputs(), entry.dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.given: list[Tensor] = []

    def loss(self) -> Tensor:
        output = self.model(**self.inputs) if isinstance(self.inputs, Mapping) else self.model(*self.inputs)
        self.given = [t.detach().clone() for t in tensors(output)]
        return self.entry.loss(output)

    def step(self, told: Callable[[Tensor], Tensor] = lambda loss: loss) -> Run:
        loss = told(self.loss())
        self.given.append(loss.detach().clone())
        loss.backward()
        self.optimizer.step()
        return self

    def state(self) -> dict[str, Any]:
        """All that watching must leave as it is."""
        model = self.model
        return {
            **{f"output {i}": t for i, t in enumerate(self.given)},
            **{f"gradient of {name}": p.grad for name, p in model.named_parameters()},
            **{f"parameter {name}": p for name, p in model.named_parameters()},
            **{f"buffer {name}": b for name, b in model.named_buffers()},
            "torch's random numbers": torch.get_rng_state(),
            "Python's random numbers": random.getstate(),
            "NumPy's random numbers": np.random.get_state()[1].tolist(),
            "hooks": hooks_on(model, self.optimizer),
        }


def cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    if isinstance(tree, Mapping):
        return {key: cast(branch, dtype) for key, branch in tree.items()}
    return type(tree)(cast(branch, dtype) for branch in tree) if isinstance(tree, list | tuple) else tree


def hooks_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Whatever has ``hooks`` in its name, on modules, parameters, buffers and optimizer -> how many."""
    places = {f"module {name}": module for name, module in model.named_modules()}
    places |= {f"parameter {name}": p for name, p in model.named_parameters()}
    places |= {f"buffer {name}": b for name, b in model.named_buffers()}
    places["optimizer"] = optimizer
    found = {}
    for place, thing in places.items():
        for name in dir(thing) if isinstance(thing, Tensor) else vars(thing):
            if name.endswith("_hooks"):
                hooks = getattr(thing, name)
                found[f"{name} of {place}"] = len(hooks) if isinstance(hooks, Mapping) else 0
    return {name: number for name, number in found.items() if number}


def same(one: Any, other: Any) -> bool:
    """Bit for bit, so that nan equals nan and -0 is not 0."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return bool(one == other)
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if one.layout is not torch.strided:
        one, other = one.coalesce(), other.coalesce()
        return same(one.indices(), other.indices()) and same(one.values(), other.values())
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*bits)


# ---- the oracle -------------------------------------------------------------------------------------------


class Output:
    """A tensor that a module gave out, and where in the graph its gradient arrives."""

    def __init__(self, t: Tensor, given: list[Tensor]) -> None:
        self.tensor, self.edge = t, edge(t)
        # of a linear layer with a sequence, say: a view of what it has computed, all of it
        own = t._base is not None and t._base.numel() == t.numel() and t._base.requires_grad
        self.whole = edge(t._base) if own and not any(x is t._base or x._base is t._base for x in given) else None

    def asked_at(self) -> GradientEdge:
        """Once the forward pass is through: overwriting a view makes a graph of its own above what it is a view of."""
        overwritten = self.tensor.grad_fn is not None and self.tensor.grad_fn is not self.edge.node
        return self.whole if overwritten and self.whole is not None else self.edge


SUMS = ("add", "iadd", "radd", "sub", "isub", "rsub")


class Additions(TorchFunctionMode):
    """Where the gradient of every sum and difference arrives, as torch's functions were asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.edges: list[GradientEdge] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        if function.__name__.strip("_") in SUMS and isinstance(given, Tensor) and given.requires_grad:
            self.edges.append(edge(given))
        return given


@dataclass
class Seen:
    """One call of a module that computes something itself, as a hook of this file saw it."""

    name: str
    number: int
    norm: float
    outputs: list[Output]
    entering: GradientEdge | None
    g: float | None = None  # of all outputs together; None: no gradient arrives
    g_entering: float | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.number


def computes(module: nn.Module) -> bool:
    """It has parameters of its own, or no module inside: what happens in it no other module tells."""
    return bool([p for p in module._parameters.values() if p is not None]) or not any(module._modules.values())


def norm(t: Tensor) -> float:
    t = t.detach().coalesce().values() if t.is_sparse else t.detach()
    return float(t.abs().double().square().sum().sqrt())


def edge(t: Tensor) -> GradientEdge:
    """Where in the graph its gradient arrives.  Of a tensor without a graph of its own that is where it adds up."""
    return get_gradient_edge(t)


def retained(run: Run) -> tuple[list[Seen], list[float]]:
    """Every call of the step, in its order, with the gradients that torch.autograd.grad gives at its outputs.

    Beside them the norms of those at every sum.
    """
    calls: list[Seen] = []
    counts: dict[str, int] = {}
    entering: list[GradientEdge | None] = []  # of the calls that are under way
    handles = []
    for name, module in run.model.named_modules():
        if not computes(module):
            continue

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = next(tensors([args, kwargs]), None)
            entering.append(edge(x) if x is not None and x.requires_grad else None)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            outs = list(tensors(output))
            outs = [t for t in outs if t.requires_grad] or outs
            given = list(tensors([args, kwargs]))
            outputs = [Output(t, given) for t in outs if t.requires_grad]
            counts[name] = counts.get(name, -1) + 1
            calls.append(Seen(name, counts[name], norm(outs[0]) if outs else 0.0, outputs, entering.pop()))

        handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]
    with Additions() as additions:
        loss = run.loss()
    for handle in handles:
        handle.remove()
    at = {call.key: dict.fromkeys(output.asked_at() for output in call.outputs) for call in calls}
    into = [call.entering for call in calls if call.entering is not None]
    edges = list(dict.fromkeys([*(e for of_call in at.values() for e in of_call), *into, *additions.edges]))
    found = torch.autograd.grad(loss, edges, allow_unused=True)
    norms = {e: None if g is None else norm(g) for e, g in zip(edges, found, strict=True)}
    for call in calls:
        arrived = [norms[e] for e in at[call.key] if norms[e] is not None]
        call.g = float(np.sqrt(np.square(arrived).sum())) if arrived else None
        call.g_entering = norms[call.entering] if call.entering is not None else None
    return calls, [g for e in additions.edges if (g := norms[e]) is not None]


# ---- the checks -------------------------------------------------------------------------------------------


def examine(entry: Entry, watcher: Callable[..., Any] = watch) -> Verdict:
    """The three checks of one architecture."""
    start, verdict = time.perf_counter(), Verdict()
    alone = Run(entry).step()
    expected = alone.state()  # the random numbers' is the world's: taken now
    run = Run(entry)
    with watcher(run.model, run.optimizer) as watching:
        run.step(watching.loss)
    trace = watching.trace
    check_unchanged(verdict, expected, run.state())
    del run
    calls, sums = retained(Run(replace(entry, make=entry.plain or entry.make)))
    check_complete(verdict, alone.model, calls, trace)
    check_cotangents(verdict, calls, trace, TOLERANCE[entry.dtype])
    check_sums(verdict, sums, trace, TOLERANCE[entry.dtype])
    check_weight_gradients(verdict, alone.model, trace, TOLERANCE[entry.dtype])
    verdict.seconds = time.perf_counter() - start
    return verdict


def check_unchanged(verdict: Verdict, alone: dict[str, Any], watched: dict[str, Any]) -> None:
    """Outputs, loss, gradients, parameters, buffers, random numbers and hooks are those of the step by itself."""
    for name in alone.keys() | watched.keys():
        if name not in alone or name not in watched or not same(alone[name], watched[name]):
            verdict.changed.append(f"{name} is not as it is without watching")


def check_complete(verdict: Verdict, model: nn.Module, calls: list[Seen], trace: Any) -> None:
    """Every call is a row, in the order of execution, or its module is listed; and so is every module not called."""
    listed = {line["name"]: line["reason"] for line in trace.meta["unseen"] if line["what"] == "module"}
    rows = [(layer.name, layer.call) for layer in trace.layers]
    there = {(r["layer"], r["call"]) for r in trace.to_arrow().to_pylist()} - sums_of(trace).keys()
    silent = {name for name, m in model.named_modules() if computes(m)} - {call.name for call in calls}
    lost = [call for call in calls if call.key not in there]
    verdict.calls, verdict.rows = len(calls), len(calls) - len(lost)
    verdict.listed = sum(call.name in listed for call in lost) + len(silent & listed.keys())
    verdict.reasons = list(dict.fromkeys(listed.values()))
    same_names = {name for name, m in model.named_modules() if isinstance(m, nn.Identity)}
    verdict.incomplete += [f"{call.key} is neither in the trace nor listed" for call in lost if call.name not in listed]
    verdict.incomplete += [f"{name}, never called, is not listed" for name in silent - listed.keys() - same_names]
    verdict.incomplete += [
        f"{name}: {listed[name]!r} is not so"
        for name, module in model.named_modules()
        if name in silent & listed.keys() and ("uses its parameters" in listed[name]) != is_used(module)
    ]
    verdict.incomplete += [f"{key} is in the trace and was never called" for key in there - {c.key for c in calls}]
    expected = [call.key for call in calls if call.key in there]
    if [key for key in rows if key in there] != expected:
        verdict.incomplete.append("the layer table is not in the order of execution")


def is_used(module: nn.Module) -> bool:
    """Whether a gradient came to its own parameters."""
    return any(p.grad is not None for p in module.parameters(recurse=False))


def check_cotangents(verdict: Verdict, calls: list[Seen], trace: Any, tolerance: float) -> None:
    """|g| of every row is autograd's; where none arrived it is null, with a reason.  So is the size of its output."""
    rows = {(r["layer"], r["call"]): r for r in trace.to_arrow().to_pylist()}
    truth = {call.key: call for call in calls}
    reasons = {(m.layer, m.call, m.column): m.reason for m in trace.missing}
    readers: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for layer in trace.layers:
        if len(layer.parents) == 1:
            below = trace.layers[layer.parents[0]]
            readers.setdefault((below.name, below.call), []).append((layer.name, layer.call))
    for key, row in rows.items():
        if key not in truth:
            continue
        call, tensor = truth[key], "a" if row["z_norm"] is None else "z"
        got = row[f"g_{tensor}_norm"]
        if call.g is None:
            verdict.without_gradient += 1
            if got is not None:
                verdict.wrong.append(f"{key}: a cotangent of {got}, where autograd has none")
            reason = reasons.get((*key, f"g_{tensor}_norm"))
            if got is None and (reason is None or ("outside the graph" in reason) == bool(call.outputs)):
                verdict.incomplete.append(f"{key}: no cotangent, and for a reason {reason!r}")
        elif got is None or not close(got, call.g, tolerance):
            verdict.wrong.append(f"{key}: |g| = {got}, autograd's is {call.g}")
        else:
            verdict.cotangents += 1
        if not close(row[f"{tensor}_norm"], call.norm, tolerance):
            verdict.wrong.append(f"{key}: |{tensor}| = {row[f'{tensor}_norm']}, its output's is {call.norm}")
        if tensor == "z" and row["g_a_norm"] is not None:  # of an activation that is a function call
            read = [truth[r].g_entering for r in readers.get(key, []) if r in truth]
            if not any(g is not None and close(row["g_a_norm"], g, tolerance) for g in read):
                verdict.wrong.append(f"{key}: |g_a| = {row['g_a_norm']}, autograd's at its readers are {read}")
            else:
                verdict.cotangents += 1


def sums_of(trace: Any) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of sums that no module computes."""
    keys = {(la.name, la.call) for la in trace.layers if la.kind in ("add", "sub") and la.name.endswith(("+", "-"))}
    return {key: r for r in trace.to_arrow().to_pylist() if (key := (r["layer"], r["call"])) in keys}


def check_sums(verdict: Verdict, sums: list[float], trace: Any, tolerance: float) -> None:
    """|g| of every sum that has a row is autograd's at a sum of its own; where none arrived there is a reason."""
    left, told = list(sums), {(m.layer, m.call) for m in trace.missing if m.column == "g_z_norm"}
    for key, row in sums_of(trace).items():
        got = row["g_z_norm"]
        met = next((g for g in left if got is not None and close(got, g, tolerance)), None)
        if met is not None:
            left.remove(met)
            verdict.sums += 1
        elif got is not None or key not in told:
            verdict.wrong.append(f"{key}: |g| = {got}, which is autograd's at no sum")


def check_weight_gradients(verdict: Verdict, model: nn.Module, trace: Any, tolerance: float) -> None:
    """|g_W| is that of the gradient which the step by itself left."""
    modules = dict(model.named_modules())
    for row in trace.to_arrow().to_pylist():
        module = modules.get(row["layer"])  # of a sum there is none
        weight = module._parameters.get("weight") if module is not None else None
        if weight is None or not weight.is_leaf:
            continue
        true, got = None if weight.grad is None else norm(weight.grad), row["g_W_norm"]
        if (true is None) != (got is None) or (true is not None and not close(got, true, tolerance)):
            verdict.wrong.append(f"{row['layer']}: |g_W| = {got}, autograd's is {true}")
        else:
            verdict.weights += true is not None


def close(got: float | None, true: float, tolerance: float) -> bool:
    if got is None or np.isnan(true):
        return got is not None and bool(np.isnan(got))
    return got == true or abs(got - true) <= tolerance * abs(true)
