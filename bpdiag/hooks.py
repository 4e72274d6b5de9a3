"""The recorder: what every layer gave out and what came back to it, for any ``nn.Module`` run eagerly.

On a sampled step a forward hook on each leaf reduces its output to a few numbers at once and puts a hook on the output
*tensor*, which sees the cotangent.  Never a full backward hook on a module: those break on every in-place operation.
The numbers stay on the device as () tensors until the step ends; then the host reads all of them in one go.  Between
sampled steps there is no hook on any module.

Hooks only read: no result of the model changes by a bit, no random number is drawn, nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bpdiag import statistics
from bpdiag.rules import ACTIVATIONS, Activation
from bpdiag.trace import COLUMNS, Layer, Sample, Sink

DEAD_WINDOW = 8  # sampled batches a unit must be silent in: in one, chance alone silences many (see diagnosis)
MOST_PASSES = 64  # forward passes kept per step: a validation loop without no_grad must not fill the memory
MOST_NODES = 10_000  # of the graph looked at between two layers

# nodes that move numbers about and change none
SHAPE_NODES = (
    "View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Alias",
)  # fmt: skip


class _Hook:
    """A hook that a copy or a pickle of the model does not take along: there it does nothing."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        if self.call is not None:
            self.call(*args)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


@dataclasses.dataclass(eq=False)
class Call:
    """One call of one module in the step being measured."""

    module: nn.Module
    name: str
    number: int  # which call of this module in its forward pass
    backward: int  # which forward pass of the step
    kind: str
    tensor: str  # "a" for an activation, "z" for anything else
    shape: tuple[int, ...]
    weight: nn.Parameter | None
    fan_in: int | None
    rule: type[Activation] | None = None  # whose slope this row carries
    parents: tuple[Call, ...] = ()
    in_graph: bool = True
    values: dict[str, Tensor | float] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # elements: rms = norm / sqrt(size)


class Recorder:
    """Measures ``model`` on steps 0, N, 2N, ... and gives each ``Sample`` to the sinks.

    A step ends when the last of ``optimizers`` has stepped, or at ``end_step()``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        sinks: Sequence[Sink],
        every: int = 1,
    ) -> None:
        self.model, self.optimizers, self.sinks, self.every = model, list(optimizers), list(sinks), every
        self.step = 0
        self.layers: list[Layer] = []
        self._index: dict[tuple[str, int], int] = {}
        self._names: dict[nn.Module, str] = {}
        self._always: list[Any] = []  # hooks on optimizers
        self._handles: list[Any] = []  # hooks on modules, while armed
        self._silence: dict[tuple[str, int], deque[Tensor]] = {}
        self._losses: list[tuple[int, Tensor | float]] = []
        self.last_loss = math.nan
        self._forget()

    # ---- life ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin with step 0."""
        for optimizer in self.optimizers:
            self._always.append(optimizer.register_step_pre_hook(self._before_step))
        if self.optimizers:
            self._always.append(self.optimizers[-1].register_step_post_hook(lambda *_: self.end_step()))
        self._owners = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        self._arm_if_due()

    def stop(self) -> None:
        """Remove every hook; a step whose gradients came but whose update did not is kept, with that said."""
        self._disarm()
        for handle in self._always:
            handle.remove()
        self._always.clear()
        if any(column.startswith("g_") for call in self._calls for column in call.values):
            self._weights_before(self._weights())
            self._finish("the watching ended before the update")
        elif self._losses:
            self._send(Sample(self.step, self.layers, [], self._read([])))
        self._forget()

    def add_loss(self, loss: Tensor | float) -> None:
        """Remember this step's loss; read with the next sample."""
        self._losses.append((self.step, loss.detach().clone() if isinstance(loss, Tensor) else float(loss)))

    def end_step(self) -> None:
        """The optimizer has stepped: finish the sample if this step was one, arm for the next if it is one."""
        if self._handles:
            if self._calls:
                self._finish()
            self._disarm()
            self._forget()
        self.step += 1
        self._arm_if_due()

    def _arm_if_due(self) -> None:
        if self.step % self.every:
            return
        self._names = {module: name for name, module in self.model.named_modules()}
        self._handles.append(self.model.register_forward_pre_hook(_Hook(self._new_pass)))
        for module in self._names:
            if not any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False)):
                self._handles.append(module.register_forward_hook(_Hook(self._forward), with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(_Hook(self._given_out)))
        if not self.optimizers:
            self._copies = {p: p.detach().clone() for p in self._weights()}

    def _disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forget(self) -> None:
        self._calls: list[Call] = []
        self._counts: dict[nn.Module, int] = {}
        self._made_by: dict[tuple[Any, int], Call] = {}  # (node, output number) -> the call whose output it is
        self._given: dict[Call, None] = {}  # calls whose output the model's output was computed from
        self._pass = -1
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}

    # ---- forward -------------------------------------------------------------------------------------

    def _new_pass(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and not _recomputing():
            self._pass += 1
            self._counts.clear()
            self._made_by.clear()

    def _measure(self, call: Call, tensor: str, x: Tensor) -> None:
        call.values[f"{tensor}_norm"] = statistics.norm(x)
        call.sizes[tensor] = x.numel()

    def _given_out(self, module: nn.Module, args: Any, output: Any) -> None:
        """The model's output reads layers too: the loss may be computed from any of it."""
        if torch.is_grad_enabled() and not _recomputing():
            for out in _leaves(output):
                self._given |= dict.fromkeys(self._parents(out))

    def _forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or _recomputing() or self._pass >= MOST_PASSES:
            return
        out = next((t for t in _leaves(output) if t.is_floating_point() or t.is_complex()), None)
        if out is None or torch._C._functorch.is_functorch_wrapped_tensor(out):
            return
        number = self._counts.get(module, 0)
        self._counts[module] = number + 1
        rule = _rule_of(module)
        weight = module._parameters.get("weight")
        call = Call(
            module=module,
            name=self._names[module],
            number=number,
            backward=max(self._pass, 0),
            kind=rule.name if rule else type(module).__name__.lower(),
            tensor="a" if rule else "z",
            shape=tuple(out.shape),
            weight=weight,
            fan_in=_fan_in(module, weight),
            rule=rule,
            parents=self._parents(out),
            in_graph=out.requires_grad,
        )
        self._calls.append(call)
        self._measure(call, call.tensor, out)
        x = next((t for t in _leaves((args, kwargs)) if t.is_floating_point()), None)
        if rule:
            self._measure_slope(call, rule, out if rule.saves == "output" else x)
        if call.fan_in is not None:
            call.values["z_cosine"] = statistics.mean_cosine(out)
        if x is not None and x is not out and not any(True for _ in module.children()):  # in place x is gone
            self._measure_input(call, x)
        if out.requires_grad:
            handle = out.register_hook(lambda g: self._measure(call, f"g_{call.tensor}", g))
            if out.grad_fn is not None:
                self._made_by[out.grad_fn, out.output_nr] = call
            else:  # a parameter or an input handed on: it outlives the step
                self._handles.append(handle)

    def _measure_input(self, call: Call, x: Tensor) -> None:
        """The data, if no watched layer feeds this one; an activation, if it was a function call and no module."""
        if not call.parents:
            call.values["x_rms"] = statistics.rms(x)
            return
        if not x.requires_grad or (x.grad_fn is not None and (x.grad_fn, x.output_nr) in self._made_by):
            return  # what arrives here is the cotangent of a watched output, seen there
        owner, rule = call.parents[0], _rule_that_made(x)
        if rule is None or len(call.parents) > 1 or owner.tensor != "z" or "a_norm" in owner.values:
            owner = None
        else:
            owner.rule = rule
            self._measure(owner, "a", x)
            self._measure_slope(owner, rule, x)
        if owner is None and call.fan_in is None:
            return

        def arrived(g: Tensor) -> None:
            self._measure(call, "_entering", g)
            if owner is not None:
                owner.values["g_a_norm"], owner.sizes["g_a"] = call.values["_entering_norm"], g.numel()

        x.register_hook(arrived)

    def _measure_slope(self, call: Call, rule: type[Activation], kept: Tensor) -> None:
        slope = rule.slope(kept.detach())
        call.values["slope_rms"] = statistics.rms(slope)
        call.values["a_saturated_fraction"] = statistics.saturated_fraction(slope, rule.largest_slope)
        if call.backward == 0 and slope.dim():
            alive = statistics.alive_units(slope, _unit_dim(call, slope))
            window = self._silence.setdefault((call.name, call.number), deque(maxlen=DEAD_WINDOW))
            if window and (window[-1].shape != alive.shape or window[-1].device != alive.device):
                window.clear()
            window.append(alive)
            if len(window) > 1:
                ever = torch.stack(tuple(window)).any(0)
                call.values["a_dead_fraction"] = 1 - ever.to(torch.float64).mean()

    def _parents(self, out: Tensor) -> tuple[Call, ...]:
        """The calls whose outputs ``out`` was computed from with no watched call in between."""
        if out.grad_fn is None:
            return ()
        found: dict[Call, None] = {}
        seen, stack = {out.grad_fn}, [(out.grad_fn, out.output_nr)]
        while stack and len(seen) < MOST_NODES:
            edge = stack.pop()
            if edge in self._made_by:
                found[self._made_by[edge]] = None
                continue
            # edges of a node already seen still count: another of its outputs may be a watched one
            for node, number in edge[0].next_functions:
                if node is None:
                    continue
                if (node, number) in self._made_by:
                    found[self._made_by[node, number]] = None
                elif node not in seen:
                    seen.add(node)
                    stack.append((node, number))
        return tuple(found)

    # ---- update --------------------------------------------------------------------------------------

    def _weights(self) -> list[nn.Parameter]:
        """The weights of the calls of this step; before any call those of all modules."""
        called = {call.weight: None for call in self._calls if call.weight is not None}
        return list(
            called or {m._parameters["weight"]: None for m in self._names if m._parameters.get("weight") is not None}
        )

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Copy what this optimizer is about to change; the last one also takes what none of them owns."""
        if self._handles:
            default = self.optimizers[-1]
            self._weights_before([p for p in self._weights() if self._owners.get(p, default) is optimizer])

    def _weights_before(self, weights: Sequence[nn.Parameter]) -> None:
        for p in weights:
            if p not in self._copies:
                self._copies[p] = p.detach().clone()
                if p.grad is not None and self._calls:  # before any call, as for a closure, it is not this step's
                    self._gradients[p] = statistics.norm(p.grad)

    def _finish(self, no_update: str = "") -> None:
        """Reduce the updates, read all numbers of the step at once, derive the step-to-step ones, send the sample."""
        missing: list[tuple[Call, str, str]] = []
        updates: dict[nn.Parameter, dict[str, Tensor]] = {}
        for p in {call.weight: None for call in self._calls if call.weight is not None}:
            updates[p] = told = {}
            before = self._copies.get(p)
            if before is not None and before.numel():
                told["W_rms"] = statistics.rms(before)
                if not no_update:
                    update = p.detach() - before
                    told["dW_rms"], told["update_ratio"] = (
                        statistics.rms(update),
                        statistics.update_ratio(update, before),
                    )
            if p not in self._gradients and p.grad is not None:  # a closure's, or a loop's without an optimizer
                self._gradients[p] = statistics.norm(p.grad)
            if p in self._gradients:
                told["g_W_norm"] = self._gradients[p]
        for call in self._calls:
            if call.weight is None:
                continue
            call.values.update(updates[call.weight])
            if no_update:
                missing += [(call, "dW_rms", no_update), (call, "update_ratio", no_update)]
            if "g_W_norm" not in call.values:
                frozen = not call.weight.requires_grad
                missing.append((call, "g_W_norm", "frozen" if frozen else "no gradient arrived at this weight"))
        group = self.optimizers[0].param_groups[0] if self.optimizers else {}
        rate = {"lr": group["lr"]} if "lr" in group else {}
        losses = self._read([*(call.values for call in self._calls), rate])
        missing += self._derive()
        self._enter_layers()
        rows = []
        for call in self._calls:
            told = {column: float(value) for column, value in call.values.items() if column in COLUMNS}
            rows.append((call.backward, self._index[call.name, call.number], told))
        gaps = [(self._index[call.name, call.number], column, reason) for call, column, reason in missing]
        self._send(Sample(self.step, self.layers, rows, losses, float(rate["lr"]) if rate else None, gaps))

    def _send(self, sample: Sample) -> None:
        for sink in self.sinks:
            sink.write(sample)

    def _read(self, tables: list[dict[str, Tensor | float]]) -> list[tuple[int, float]]:
        """Replace every () tensor in ``tables`` by its number; returns the losses.  The step's one host read."""
        places = [(table, key) for table in tables for key, value in table.items() if isinstance(value, Tensor)]
        losses = {"loss": dict(enumerate(loss for _, loss in self._losses))}
        for i, loss in losses["loss"].items():
            if isinstance(loss, Tensor):
                losses["loss"][i] = loss.to(torch.float64).mean()
                places.append((losses["loss"], i))
        by_device: dict[torch.device, list[tuple[Any, Any]]] = {}
        for table, key in places:
            by_device.setdefault(table[key].device, []).append((table, key))
        for group in by_device.values():
            numbers = torch.stack([table[key].to(torch.float64) for table, key in group]).tolist()
            for (table, key), number in zip(group, numbers, strict=True):
                table[key] = number
        of_step: dict[int, list[float]] = {}
        for (step, _), loss in zip(self._losses, losses["loss"].values(), strict=True):
            of_step.setdefault(step, []).append(loss)
        self._losses.clear()
        means = [(step, sum(told) / len(told)) for step, told in of_step.items()]
        self.last_loss = means[-1][1] if means else self.last_loss
        return means

    # ---- step to step --------------------------------------------------------------------------------

    def _derive(self) -> list[tuple[Call, str, str]]:
        """Gains, factors and decades from the norms, on the host; returns what is missing and why."""
        missing: list[tuple[Call, str, str]] = []
        readers: dict[Call, list[Call]] = {}
        for call in self._calls:
            for tensor, size in call.sizes.items():
                call.values[f"{tensor}_rms"] = _ratio(call.values[f"{tensor}_norm"], math.sqrt(size))
            if "dW_rms" in call.values:
                call.values["update_ratio"] = _ratio(call.values["dW_rms"], call.values["W_rms"])
            for parent in call.parents:
                readers.setdefault(parent, []).append(call)
        self._ways = {call: _way(call, readers, self._given) for call in self._calls if call.fan_in is not None}
        for number in sorted({call.backward for call in self._calls}):
            weighted = [c for c in self._ways if c.backward == number and "g_z_norm" in c.values]
            top = weighted[-1].values["g_z_norm"] if weighted else math.nan
            for call in weighted:
                call.values["decades"] = _log10(_ratio(call.values["g_z_norm"], top))
        for call in self._calls:
            own = f"g_{call.tensor}_norm"
            if own not in call.values:
                reason = "no gradient came back" if call.in_graph else "outside the graph: nothing below it is trained"
                missing.append((call, own, reason))
        below = _weights_below(self._calls)
        for call, (way, child, why) in self._ways.items():
            feed = call.values.get("x_rms") if not call.parents else None
            if len(below[call]) == 1:
                feed = below[call][0].values["z_rms"]
            if feed is not None:
                call.values["forward_gain"] = _ratio(call.values["z_rms"], feed)
            if "g_z_norm" not in call.values:
                continue
            if child is None or "g_z_norm" not in child.values:
                reason = why or "no gradient came back to the next weight layer"
                missing += [(call, c, reason) for c in ("backward_gain", "weight_factor", "slope_factor")]
                continue
            here, above = call.values["g_z_norm"], child.values["g_z_norm"]
            call.values["backward_gain"] = _ratio(here, above)
            last = way[-1] if way else call
            entering = child.values.get("_entering_norm", last.values.get(f"g_{last.tensor}_norm"))
            if entering is None:
                missing += [
                    (call, c, "no gradient came back to the activation") for c in ("weight_factor", "slope_factor")
                ]
                continue
            call.values["weight_factor"] = _ratio(entering, above)
            call.values["slope_factor"] = _ratio(here, entering)
        return missing

    def _enter_layers(self) -> None:
        """Put calls seen for the first time into the layer table, in execution order."""
        fresh = []
        for call in self._calls:
            if (call.name, call.number) not in self._index:
                self._index[call.name, call.number] = len(self._index)
                fresh.append(call)
        for call in fresh:
            way, child, _ = self._ways.get(call, ((), None, ""))
            at = lambda c: self._index[c.name, c.number]  # noqa: E731
            self.layers.append(
                Layer(
                    name=call.name,
                    call=call.number,
                    kind=call.kind,
                    shape=call.shape,
                    parents=tuple(sorted(at(p) for p in call.parents)),
                    next=at(child) if child else None,
                    via=tuple(at(c) for c in way) if child else (),
                    fan_in=call.fan_in,
                    units=call.shape[_unit_dim(call, None)] if call.fan_in is not None and call.shape else None,
                    activation=call.rule.name if call.rule else None,
                    largest_slope=call.rule.largest_slope if call.rule else None,
                    r=call.rule.r if call.rule else None,
                    window=DEAD_WINDOW if call.rule else 0,
                )
            )


def describe(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """What a judge must know of the optimizers: class, first group's settings, whether a step follows |g|."""
    if not optimizers:
        return {}
    optimizer, group = optimizers[0], optimizers[0].param_groups[0]
    told = {k: float(group[k]) for k in ("lr", "momentum", "eps", "weight_decay") if k in group}
    return {"name": type(optimizer).__name__, "sgd_like": isinstance(optimizer, torch.optim.SGD), **told}


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


def _recomputing() -> bool:
    """Whether a backward is under way: a forward inside it is a checkpoint's recomputation, not a new call."""
    return torch._C._current_graph_task_id() != -1


def _leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors of a nested output."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for branch in tree.values():
            yield from _leaves(branch)
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _leaves(branch)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for f in dataclasses.fields(tree):
            yield from _leaves(getattr(tree, f.name))


def _rule_of(module: nn.Module) -> type[Activation] | None:
    """The activation a module computes: our own say so, torch's are recognized."""
    rule = getattr(module, "rule", None)
    if isinstance(rule, type) and issubclass(rule, Activation):
        return rule
    return next((r for r in ACTIVATIONS.values() if r.is_done_by(module)), None)


def _rule_that_made(x: Tensor) -> type[Activation] | None:
    """The activation whose function call gave ``x``, looking through nodes that only move numbers about."""
    node = x.grad_fn
    while node is not None and node.name().removesuffix("0").removesuffix("Backward") in SHAPE_NODES:
        node = node.next_functions[0][0]
    rules = (r for r in ACTIVATIONS.values() if r.saves == "output")
    return next((r for r in rules if node is not None and r.made(node)), None)


def _fan_in(module: nn.Module, weight: nn.Parameter | None) -> int | None:
    """Products summed into one output: N_in, or C_in/groups times the kernel.  None: no weight matrix."""
    if weight is None or weight.dim() < 2 or isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None
    if getattr(module, "transposed", False):  # weight (C_in, C_out/groups, kernel)
        return weight.numel() // (weight.shape[1] * module.groups)
    return weight.numel() // max(weight.shape[0], 1)


def _unit_dim(call: Call, x: Tensor | None) -> int:
    """Where units lie: channels of an image, else the last dimension."""
    dims = x.dim() if x is not None else len(call.shape)
    convolved = any("1d" in c.kind for c in (call, *call.parents))
    return 1 if dims == 2 or dims > 3 or (dims == 3 and convolved) else -1


def _way(
    call: Call, readers: dict[Call, list[Call]], given: Collection[Call]
) -> tuple[tuple[Call, ...], Call | None, str]:
    """(calls passed, next weight layer, why there is none): upwards as long as each output has one reader."""
    way: list[Call] = []
    while True:
        above = readers.get(call, [])
        if not above:
            return tuple(way), None, "no watched layer reads its output" if way else "the last layer: nothing above it"
        if len(above) > 1 or call in given:
            also = " and the model's output" if call in given else ""
            return tuple(way), None, f"its output is read by {len(above)} layers{also}: the way up forks"
        call = above[0]
        if call.fan_in is not None:
            return tuple(way), call, ""
        way.append(call)


def _weights_below(calls: Sequence[Call]) -> dict[Call, list[Call]]:
    """The nearest weight layers below each call, over calls that have none; two at the most: more say no more."""
    below: dict[Call, list[Call]] = {}
    for call in calls:  # in execution order, so that parents come first
        nearest: dict[Call, None] = {}
        for parent in call.parents:
            nearest |= dict.fromkeys([parent] if parent.fan_in is not None else below[parent])
        below[call] = list(nearest)[:2]
    return below


def _ratio(a: Any, b: Any) -> float:
    """a / b with 0/0 = nan, a/0 = inf."""
    if b:
        return a / b
    return math.nan if not a or math.isnan(a) else math.inf


def _log10(x: float) -> float:
    return math.log10(x) if x > 0 else -math.inf if x == 0 else math.nan
