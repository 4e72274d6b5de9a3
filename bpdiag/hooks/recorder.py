"""Puts hooks on a model for the sampled steps, gathers numbers, reads them once, hands the sample to the sinks."""

from __future__ import annotations

import math
import operator
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bpdiag import statistics
from bpdiag.config import UsageError
from bpdiag.hooks.between import change_numbers, names, operation
from bpdiag.hooks.call import Call, Facts, is_leaf, kept_by, leaves, rule_of, rule_that_made, weight_of
from bpdiag.hooks.cuts import Cuts
from bpdiag.hooks.gains import derive
from bpdiag.hooks.graph import Graph, Place, View, Walk, is_checkpoint, on_gradient, where_gradients_come
from bpdiag.hooks.hook import Hook, what_hooks_stand_on
from bpdiag.hooks.loss import LossPaths
from bpdiag.hooks.pace import Pace
from bpdiag.hooks.passes import Passes, recomputing
from bpdiag.hooks.reading import Reading, kept, norm_by_sample
from bpdiag.hooks.scale import ScalerClock, Scales, divide
from bpdiag.hooks.shelf import Held, Shelf
from bpdiag.hooks.slopes import Slopes
from bpdiag.hooks.symmetry import Symmetry
from bpdiag.hooks.table import LayerTable
from bpdiag.hooks.target import describe_target
from bpdiag.hooks.turns import Turns
from bpdiag.hooks.unseen import Overlooked, foreign_parameters, named_modules, refuse, unseen
from bpdiag.hooks.weights import Weights
from bpdiag.trace import COLUMNS, Sample, Sink

MOST_OUTPUTS = 4  # passes that one loss may be of; each holds its graph until the step ends


class Recorder:
    """Measures ``model`` on the steps that ``pace`` picks and gives each ``Sample`` to the sinks.

    A step ends when all ``optimizers`` have (see ``Turns``), with a ``scaler`` at its update, or at ``end_step()``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        sinks: Sequence[Sink],
        pace: Pace | None = None,
        histograms: bool = False,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model, self.optimizers, self.sinks, self.pace = model, list(optimizers), list(sinks), pace or Pace()
        self.histograms = histograms
        self.step = 0
        self.last_loss = math.nan
        self.last_sample: Sample | None = None
        self._table = LayerTable()
        self._names: dict[nn.Module, str] = {}
        self._silent: list[nn.Module] = []  # those that compute something and have not been called so far
        self._facts: dict[nn.Module, Facts] = {}
        self._always: list[Any] = []  # hooks on optimizers
        self._eager: Any = None  # torch.compile held off, while armed
        self._handles: list[Any] = []  # hooks on modules and weights, while armed
        self._standing: list[Any] = []  # what they were put on
        self._step_handles: list[Any] = []  # on tensors that outlive the step
        self._losses: list[tuple[int, Tensor | float]] = []
        self._clock = ScalerClock(scaler, self._updated) if scaler is not None else None
        self._shelf, self._slopes, self._weights = Shelf(), Slopes(), Weights(self._clock)
        self._symmetry, self._cuts, self._paths = Symmetry(), Cuts(), LossPaths()
        self._stepped: set[torch.optim.Optimizer] = set()  # since the last step ended
        self._skipped: list[int] = []  # steps, until the next sample
        self._turns, self._overlooked = Turns(self.optimizers), Overlooked()
        self._forget()

    # ---- life ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin with step 0; where that fails, nothing is left on the model."""
        refuse(self.model)
        try:
            for optimizer in self.optimizers:
                self._always.append(optimizer.register_step_pre_hook(self._before_step))
            if self._clock:
                self._clock.start()
            elif self.optimizers:
                self._always += [one.register_step_post_hook(self._after_step) for one in self.optimizers]
            self._arm_if_due()
        except RuntimeError as error:  # a scripted module takes no hooks
            self.stop()
            raise UsageError(f"model: {type(self.model).__name__} cannot be watched: {error}") from error

    def stop(self) -> None:
        """Remove every hook; a step whose gradients came but whose update did not is kept, with that said."""
        self._disarm()
        for handle in self._always:
            handle.remove()
        self._always.clear()
        if self._clock:
            self._clock.stop()
        if any(call.events for call in self._calls):
            self._copy(self._watched_weights())
            self._finish("the watching ended before the update")
        elif self._losses or self._skipped:
            self._send(Sample(self.step, self._table.layers, [], self._read(Reading(), []), skipped=self._skipped))
        self._forget()

    def unseen(self) -> list[dict[str, str]]:
        """Modules and parameters that no sampled step told anything of, each with its reason."""
        cuts = self._cuts.found(_owned(self.optimizers))
        return cuts + unseen(self.model, self.optimizers, self._table.names(), self._overlooked)

    def add_loss(self, loss: Tensor | float) -> None:
        """Remember this step's loss; read with the next sample."""
        # a clone: `loss /= 4` would change what a mere detach shares
        self._losses.append((self.step, loss.detach().clone() if isinstance(loss, Tensor) else float(loss)))
        if self._calls and isinstance(loss, Tensor) and loss.grad_fn is not None and loss.numel() == 1:
            self._scales.await_gradient(loss, self._passes.number)
            self._target |= describe_target(loss)
        if self._outputs and isinstance(loss, Tensor) and loss.grad_fn is not None:
            self._paths.examine(loss, {place: calls for one in self._outputs for place, calls in one.items()})

    @property
    def loss_path(self) -> list[dict[str, Any]]:
        """What stands between the model's output and the losses told so far; empty where that is not known."""
        return self._paths.steps

    def _updated(self) -> None:
        """The scaler ends a step; where no optimizer stepped, it skipped it."""
        if not self._stepped:
            self._skipped.append(self.step)
            self._copy(self._watched_weights() if self._calls else ())
        self.end_step("" if self._stepped else "the gradient scaler skipped this step")

    def end_step(self, no_update: str = "", count: int = 1) -> None:
        """The optimizer has stepped: finish the sample if this step was one, arm for the next if it is one."""
        if self._handles:
            if self._calls:
                self._finish(no_update)
            self._release()
            self._forget()
        self.step += count
        self._turns.begin()
        self._stepped.clear()
        self.pace.ended()
        self._arm_if_due()

    def _arm_if_due(self) -> None:
        if not self.pace.begins(self.step):
            self._disarm()
            return
        if self._eager is None and "torch._dynamo" in sys.modules:
            self._eager = torch.compiler.set_stance("force_eager")  # what is compiled runs as written: hooks fire there
        # hooks stand as long as every step is sampled and nothing changes that they were put up by
        standing = what_hooks_stand_on(self.model)
        before = self._standing
        if not self._handles or len(standing) != len(before) or not all(map(operator.is_, standing, before)):
            self._take_down()
            self._put_up()
            self._standing = standing
        if not self.optimizers:
            self._copy(self._watched_weights())

    def _put_up(self) -> None:
        self._names = {module: name for name, module in named_modules(self.model)}
        self._silent = [module for module in self._names if is_leaf(module)]
        self._handles.append(self.model.register_forward_pre_hook(Hook(self._new_pass)))
        for module in self._names:
            if is_leaf(module):
                self._handles.append(module.register_forward_hook(Hook(self._forward), with_kwargs=True))
            rule = rule_of(module)
            if rule and rule.saves == "input" and getattr(module, "inplace", False):
                self._handles.append(module.register_forward_pre_hook(Hook(self._before_overwriting)))
        self._handles.append(self.model.register_forward_hook(Hook(self._given_out), always_call=True))
        for weight in self._watched_weights():
            if weight.requires_grad:
                met, left = self._weights.met_by_backward, self._weights.left_by_backward
                self._handles.append(weight.register_hook(Hook(met, self._weights.of(weight))))
                self._handles.append(weight.register_post_accumulate_grad_hook(Hook(left, self._weights.of(weight))))

    def _take_down(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._weights.give_back()

    def _release(self) -> None:
        """What outlives a graph goes when its step ends."""
        for handle in self._step_handles:
            handle.remove()
        self._step_handles.clear()

    def _disarm(self) -> None:
        self._release()
        self._take_down()
        if self._eager is not None:
            self._eager.__exit__(None, None, None)
            self._eager = None

    def _forget(self) -> None:
        self._calls: list[Call] = []
        self._passes = Passes(self._overlooked.why.__setitem__)
        self._graph = Graph(self._shelf)
        self._given: dict[Call, None] = {}  # calls whose output the model's output was computed from
        self._entered: list[Tensor] = []  # the model's input, where it has a graph of its own
        self._outputs: deque[dict[Place, dict[Place, Call]]] = deque(maxlen=MOST_OUTPUTS)  # of each pass, and its calls
        self._given_through: dict[Any, None] = {}  # checkpoints, likewise
        self._overwritten: dict[nn.Module, Tensor] = {}  # the input of a call that works in place, until it is measured
        self._scales, self._target = Scales(), dict[str, Any]()
        self._shelf.forget()
        self._slopes.forget()
        self._weights.forget()

    # ---- forward -------------------------------------------------------------------------------------

    def _new_pass(self, module: nn.Module, args: Any) -> None:
        if self._passes.enter():
            self._passes.begin(any(call.backward == self._passes.number for call in self._calls))
            self._graph = Graph(self._shelf)
            self._cuts.begin(args)
            self._entered = [t for t in leaves(args) if t.grad_fn is not None]

    def _before_overwriting(self, module: nn.Module, args: Any) -> None:
        if self._passes.are_listened_to() and args:
            self._overwritten[module] = args[0].detach().clone()

    def _given_out(self, module: nn.Module, args: Any, output: Any) -> None:
        """The model's output reads layers too: the loss may be computed from any of it."""
        if self._passes.leave():
            outs = [t for t in leaves(output) if t.grad_fn is not None]
            if outs and self._overlooked.foreign is None:
                self._overlooked.foreign = foreign_parameters(self.model, outs, self._entered)
            walk = self._walk(outs, self._passes.number, self._passes.order + 1)
            self._given |= walk.parents
            self._given_through |= walk.through
            self._outputs.append({(t.grad_fn, t.output_nr): self._graph.made_by for t in outs})
            self._graph.read(walk, None)
            self._graph.measure_forks()

    def _forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        place = self._passes.place(module)
        if place is None:
            if self._passes.is_without_gradient():
                self._cuts.skipped(module, self._names[module])
            return
        if isinstance(output, Tensor) and output.requires_grad:
            outs = [output]
        else:
            outs = [t for t in leaves(output) if t.is_floating_point() or t.is_complex()]
            outs = [t for t in outs if t.requires_grad] or outs[:1]
        if not outs or torch._C._functorch.is_functorch_wrapped_tensor(outs[0]):
            why = "called under torch.func, whose tensors take no hooks" if outs else "its output holds no tensor"
            self._overlooked.why[module] = why
            return
        within = torch._C._current_autograd_node() if recomputing() else None
        out, facts = outs[0], self._facts_of(module)
        inputs = {(t.grad_fn, t.output_nr) for t in leaves((args, kwargs)) if t.grad_fn is not None}
        tops = {t.grad_fn for t in outs if t.grad_fn is not None}
        in_place = (out.grad_fn, out.output_nr) in inputs
        # of one that works in place, or has modules in it, the last operation is known to be its own
        ends = inputs if facts.childless and not in_place else {edge for node in tops for edge in node.next_functions}
        walk = self._walk(outs, place.number, place.order, within, ends)
        x = _first_input(args, kwargs)
        facts.meet(x, out)
        call = Call(
            facts,
            number=place.call,
            backward=place.number,
            shape=tuple(out.shape),
            in_graph=out.requires_grad,
            parents=tuple(walk.parents),
            order=(place.order, 0),
            within=within,
            given_up=walk.given_up,
            through=tuple(walk.through),
            dtype=str(out.dtype).removeprefix("torch."),
            ops=tuple(walk.ops),
            gap=dict.fromkeys(walk.parents, names(walk.between, in_place)) if facts.childless else {},
            inputs=len(inputs),
        )
        self._graph.read(walk, call)
        self._calls.append(call)
        held = self._measure(call, call.tensor, out)
        if call.rule:
            saved = out if call.rule.saves == "output" else self._overwritten.pop(module, x)
            if saved is not None:
                learned = [getattr(module, name) for name in call.rule.learnable]
                self._slope(call, held if saved is out else None, saved, *learned)
        self._symmetry.measure(call)
        self._cuts.called(call, x)
        if x is not None and x is not out and facts.childless:  # in place x is gone
            self._measure_input(call, x)
        for i, t, view in where_gradients_come(outs, (args, kwargs)):
            self._await(call, i, t, view)

    def _walk(self, outs: Sequence[Tensor], number: int, order: int, *known: Any) -> Walk:
        """Down from ``outs``; sums on the way are calls from now on."""
        walk = self._graph.walk(outs, (number, order), *known)
        for node, call in walk.sums.items():
            self._calls.append(call)
            node.register_prehook(partial(self._arrived_at_sum, call))
        return walk

    def _facts_of(self, module: nn.Module) -> Facts:
        facts = self._facts.get(module)
        if facts is None or not facts.hold():
            facts = self._facts[module] = Facts(module, self._names[module])
        return facts

    def _await(self, call: Call, i: int, out: Tensor, view: View | None) -> None:
        """Measure the cotangent of the i-th output when it comes, to it or, as ~i, below it."""

        def arrived(g: Tensor | None) -> None:
            if g is not None and ~i not in call.events:
                self._arrived(call, i, g if view is None else view.of(g))

        handle = out.register_hook(arrived)
        if out.grad_fn is not None:
            self._graph.made_by[out.grad_fn, out.output_nr] = call
        else:  # a parameter or an input handed on: it outlives the step
            self._step_handles.append(handle)

    def _arrived(self, call: Call, i: int, g: Tensor) -> None:
        call.values[f"_{call.g}_{i}"] = norm_by_sample(g, self._shelf)
        call.sizes[call.g] = call.sizes.get(call.g, 0) + g.numel()
        call.events[i] = call.events.get(i, 0) + 1  # now there is what it promises, should Ctrl-C come
        if i in (0, ~0):
            self._draw(call, call.g, g)

    def _arrived_at_sum(self, call: Call, gradients: Sequence[Tensor | None]) -> None:
        if gradients[0] is not None:
            self._arrived(call, 0, gradients[0])

    def _measure(self, call: Call, tensor: str, x: Tensor) -> Held | None:
        held = self._shelf.hold(x, call.rule or (tensor, call.fan_in is None))
        call.sizes[tensor] = x.numel()
        if held:
            call.values[f"{tensor}_norm"], samples = held, len(x)
        else:
            rows = statistics.by_sample(x)
            lengths, samples = statistics.lengths(rows), len(rows)
            call.values[f"{tensor}_norm"] = kept(lengths)
        if tensor == "z" and call.fan_in is not None and samples > 1:
            held_too = held and held._replace(of_units=True)
            call.values["_units_norm"] = held_too or kept(statistics.sum_of_units(rows, lengths))
            call.samples = samples
        self._draw(call, tensor, x)
        return held

    def _slope(self, call: Call, held: Held | None, saved: Tensor, *learned: Tensor) -> None:
        """Of a call's activation, from what its slope is computed from, which may have been ``held`` already."""
        assert call.rule
        held = None if learned else held or self._shelf.hold(saved, (call.rule, "slope"))
        if held:
            self._slopes.wait(call, call.rule, held)
        else:
            self._slopes.measure(call, call.rule, saved, *learned)

    def _draw(self, call: Call, tensor: str, x: Tensor) -> None:
        if self.histograms and call.backward == 0:
            call.histograms[tensor] = statistics.histogram(x)

    def _measure_input(self, call: Call, x: Tensor) -> None:
        """What no watched call gave out as it is: the data, an activation that was a function call, anything else."""
        if not call.parents and not call.through:
            self._measure(call, "x", x)
            return
        if not x.requires_grad:
            return
        if x.grad_fn is not None and (x.grad_fn, x.output_nr) in self._graph.made_by:
            maker = self._graph.made_by[x.grad_fn, x.output_nr]
            if maker.is_sum:
                if "z_norm" not in maker.values:
                    self._measure(maker, "z", x)
            elif maker.shape != x.shape:  # another output than the one measured
                self._measure(call, "x", x)
            return  # what arrives here is the cotangent of a watched output, seen there
        if is_checkpoint(x.grad_fn) if x.grad_fn is not None else call.within is not None:
            return  # so it is at either end of a checkpoint
        owner: Call | None = None
        rule, alone = rule_that_made(x), len(call.parents) == 1 and not call.through
        if rule is not None and alone and call.parents[0].tensor == "z" and "a_norm" not in call.parents[0].values:
            owner = below = call.parents[0]
            below.rule, below.r = rule, rule.r
            call.gap[below] = tuple(name for name in call.gap[below] if name != operation(rule.node))
            held = self._measure(below, "a", x)
            saved = kept_by(x, rule)
            if saved is not None:
                self._slope(below, held if saved[0] is x else None, *saved)
        if owner is None:
            if call.fan_in is not None:
                self._measure(call, "x", x)
            elif call.inputs != 1 or not any(map(change_numbers, call.gap.values())):
                return

        def arrived(g: Tensor) -> None:
            call.values["_entering_norm"] = norm_by_sample(g, self._shelf)
            if owner is not None:
                self._draw(owner, "g_a", g)
                owner.values["g_a_norm"], owner.sizes["g_a"] = call.values["_entering_norm"], g.numel()

        on_gradient(x, arrived)

    # ---- update --------------------------------------------------------------------------------------

    def _watched_weights(self) -> list[nn.Parameter]:
        """The weights of the calls of this step; before any call those of all modules."""
        called = {call.weight: None for call in self._calls if call.weight is not None}
        every = (weight_of(module) for module in self._names)
        return list(called or {weight: None for weight in every if weight is not None})

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Copy what this optimizer is about to change."""
        self._stepped.add(optimizer)
        if self._handles:
            its = _owned([optimizer])
            self._copy([p for p in self._watched_weights() if p in its])
            self._note_gradients()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if count := self._turns.taken_by(optimizer):
            self.end_step(count=count)

    def _note_gradients(self) -> None:
        self._silent = [module for module in self._silent if module not in self._facts]
        self._overlooked.note_gradients(self._silent)

    def _copy(self, weights: Sequence[nn.Parameter]) -> None:
        # before any call, as for a closure, a gradient is not this step's
        self._weights.copy(weights, with_gradients=bool(self._calls))

    def _finish(self, no_update: str = "") -> None:
        """Reduce the updates, read all numbers of the step at once, derive the step-to-step ones, send the sample."""
        if self.optimizers:  # what none of them owns, or one that has not stepped
            changed = _owned(self._stepped)
            self._copy([p for p in self._watched_weights() if p not in changed])
        self._note_gradients()
        self._calls.sort(key=lambda call: (call.backward, call.order))
        self._keep_trained_passes()
        if self.histograms:
            for call in self._calls:
                for tensor, x in self._weights.drawn(call):
                    self._draw(call, tensor, x)
        reading = Reading()
        gaps = self._weights.finish(self._calls, no_update)
        self._slopes.finish(self._calls, reading)
        group = self.optimizers[0].param_groups[0] if self.optimizers else {}
        rate = {"lr": group["lr"]} if "lr" in group else {}
        rate = {k: statistics.mean(v) if isinstance(v, Tensor) else v for k, v in rate.items()}
        tables = [table for call in self._calls for table in (call.values, call.edges)]
        losses = self._read(reading, [*tables, *self._scales.told.values(), rate, self._target])
        self._count_bad_samples(reading)
        self._slopes.enter(self._calls)
        self._symmetry.enter(self._calls)
        self._cuts.finish(self._calls, self._given)
        gaps += self._weights.settle(no_update)
        self._divide_scales_out()
        self._join_checkpoints()
        ways, more = derive(self._calls, self._given)
        gaps += more
        gaps += [
            (call, "a_dead_fraction", "one batch proves nothing: told from the second on")
            for call in self._calls
            if call.rule and call.backward == 0 and "a_dead_fraction" not in call.values
        ]
        self._table.enter(self._calls, ways)
        gaps += self._table.changed_ways(ways)
        rows = []
        for call in self._calls:
            told: dict[str, Any] = {name: value for name, value in call.values.items() if name in COLUMNS}
            if call.edge_gains:
                told["edge_gain"] = self._table.by_parent(call, call.edge_gains)
            if call.gap_gains:
                told["gap_gain"] = self._table.by_parent(call, call.gap_gains)
            rows.append((call.backward, self._table[call], told))
        missing = [(self._table[call], column, reason) for call, column, reason in gaps]
        bins = [(self._table[c], tensor, x.tolist()) for c in self._calls for tensor, x in c.histograms.items()]
        sample = Sample(self.step, self._table.layers, rows, losses, float(rate["lr"]) if rate else None, missing, bins)
        sample.target, sample.loss_scale, sample.skipped = self._target, self._scales.of(0), self._skipped
        self._send(sample)
        self.last_sample, self._skipped = sample, []

    def _count_bad_samples(self, reading: Reading) -> None:
        """In how many samples of the batch a call's numbers are not finite; which one, where it is one alone."""
        found = reading.strangers()
        for call in self._calls if found else ():
            own = f"{call.tensor}_norm", f"_{call.g}_0", f"_{call.g}_{~0}"
            told = [found[id(call.values), key] for key in ("x_norm", *own) if (id(call.values), key) in found]
            if told:
                nan, infinite = told[0]
                call.values |= {"nan_samples": float(sum(nan)), "inf_samples": float(sum(infinite))}
                if sum(nan) + sum(infinite) == 1:
                    call.values["nonfinite_sample"] = float((nan if any(nan) else infinite).index(True))

    def _keep_trained_passes(self) -> None:
        """Drop the forward passes that no gradient came back to, unless none had any: an evaluation is no training."""
        trained = sorted({call.backward for call in self._calls if call.events})
        ungraded = self._passes.without_gradient()
        self._overlooked.besides |= {module for module, place in ungraded if place.number in trained}
        if trained:
            number = {old: new for new, old in enumerate(trained)}
            self._scales.told = {number[n]: told for n, told in self._scales.told.items() if n in number}
            self._calls = [call for call in self._calls if call.backward in number]
            for call in self._calls:
                call.backward = number[call.backward]

    def _join_checkpoints(self) -> None:
        """Whoever reads a reentrant checkpoint reads the last call inside it."""
        last = {call.within: call for call in self._calls if call.within is not None}
        for call in self._calls:
            ends = [last[checkpoint] for checkpoint in call.through if checkpoint in last]
            call.parents = tuple(dict.fromkeys((*call.parents, *ends)))
        self._given |= {last[checkpoint]: None for checkpoint in self._given_through if checkpoint in last}

    def _divide_scales_out(self) -> None:
        """Cotangents as those of the told loss itself."""
        for call in self._calls:
            scale = self._scales.of(call.backward)
            if scale is not None and scale != 1:
                divide(call.values, [k for k in call.values if k.startswith(("_g_", "g_a", "_entering"))], scale)
                divide(call.edges, list(call.edges), scale)

    def _send(self, sample: Sample) -> None:
        for sink in self.sinks:
            sink.write(sample)

    def _read(self, reading: Reading, tables: Sequence[dict[Any, Any]]) -> list[tuple[int, float]]:
        """Replace every tensor in ``tables`` by its number; returns the losses.  The step's one host read."""
        told: dict[int, Any] = {
            i: statistics.mean(x) if isinstance(x, Tensor) else x for i, (_, x) in enumerate(self._losses)
        }
        reading.read([*tables, told])
        of_step: dict[int, list[float]] = {}
        for (step, _), loss in zip(self._losses, told.values(), strict=True):
            of_step.setdefault(step, []).append(loss)
        self._losses.clear()
        means = [(step, sum(losses) / len(losses)) for step, losses in of_step.items()]
        self.last_loss = means[-1][1] if means else self.last_loss
        return means


def _first_input(args: Any, kwargs: Any) -> Tensor | None:
    """The first that holds numbers to compute with."""
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return args[0]
    return next((t for t in leaves((*args, *kwargs.values())) if t.is_floating_point()), None)


def _owned(optimizers: Iterable[torch.optim.Optimizer]) -> set[nn.Parameter]:
    """Their parameters, as they are now: a group may have been added."""
    return {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
