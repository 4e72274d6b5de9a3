"""A stack: K networks of one shape trained at once, forward, backward sweep and update by hand.

    forward   z_l = W_l a_{l-1} + b_l,   u_l = norm(z_l),   a_l = phi(u_l);   a_l = a_{l-1} + scale phi(u_l) in a block
    backward  g_u = phi'(u) g_a,   g_z by the norm's rule,   g_a(l-1) = W_l^T g_z(l) (+ g_a(l) in a block)
    update    G_l = g_z a_{l-1}^T, as soon as it is known

One backward sweep yields the slope of every weight of every member, and each shared factor is computed once.

Letters: K members, N features, B samples, L weight layers.  Feature-major: every activation is (K, N, B), every weight
(K, N_out, N_in), so that nothing but the batch itself is ever transposed in memory.  Convolutions, with the places of
a picture among the samples, are in ``conv``.  Nothing of the size of an activation is allocated in a step, but by
torch's convolutions, and the host reads nothing.  Members go through in chunks that a cache holds; what they compute
does not depend on it, nor on their neighbors, but for the rounding of Adam: an operation of a stack is K operations.

Units: float32 ends at 1e-38, and a cotangent in a deep net does not.  The sweep is linear, so that of each layer and
member may be multiplied by a power of two, which changes no bit but the exponent: its unit.  The velocity has it too;
the rate and what is measured are divided by it.  ``look`` finds the units before the first step, and ``adjust``
follows, on what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bpdiag.backprop.conv import Convolution, patches
from bpdiag.backprop.kernels import Kernel, kernel
from bpdiag.backprop.layers import arranged, check, modules_of, parameters_of
from bpdiag.backprop.meter import Meter, Numbers
from bpdiag.backprop.update import Named, Optimizer, Parameter, Update
from bpdiag.rules import Activation

CHUNK = 2**24  # bytes of parameters, velocities and activations of the members that go through together
FAR = 2.0**-30, 2.0**30  # rms of a cotangent in its unit; beyond, it gets another
LARGEST = 1000  # exponent of a unit, and
BEARABLE = 100  # of a velocity in it: float32 ends at 127


class _Run(NamedTuple):
    """Neighbors of a chunk with one activation, in one layer: its kernel, what it reads and writes."""

    rule: type[Activation]
    kernel: Kernel
    members: slice
    u: Tensor
    a: Tensor
    kept: Tensor
    g: list[Tensor]
    spare: Tensor


class _Reading(NamedTuple):
    """Neighbors of a chunk that read the same batch, in the first layer."""

    order: int
    number: int
    W: Tensor
    z: Sequence[Tensor]  # of a convolution place by place of the window: equal patches give equal bits, and tie in it
    V: Tensor
    G: Tensor
    g: list[Tensor]


@dataclass
class _Step:
    """A layer of a chunk: every view that a step needs, made once."""

    W: Parameter
    WT: Tensor
    b: Parameter
    gamma: Parameter | None
    beta: Parameter | None
    z: Tensor  # of a normalized layer xn, once that is known
    u: Tensor  # what the activation reads
    a: Tensor
    out: Tensor  # what the next layer reads
    out_transposed: Tensor
    g: list[Tensor]  # room for three cotangents
    arrives: list[Tensor]  # the same memory, in the shape of ``out``
    conv: Convolution | None
    spare: Tensor
    G: Tensor  # room for the gradient
    room_beside: Tensor
    runs: list[_Run]
    rate: Tensor  # (k, 1, 1), divided by the unit
    seen: tuple[int, ...] | None = None  # shape in which a meter sees it, where it is another than that of z
    turn: Tensor | None = None  # what a cotangent is multiplied by where it enters the layer
    back: Tensor | None = None  # 1 / unit
    r: Tensor | None = None  # of the norm

    def measure(self, meter: Meter, what: str, number: int, s: slice, x: Tensor) -> Tensor:
        """|x|, of a tensor of the shape of z; returns the squares of its samples."""
        x, spare = (x, self.spare) if self.seen is None else (x.view(self.seen), self.spare.view(self.seen))
        return meter.size(what, number, s, x, spare)


@dataclass
class _Chunk:
    """Members that go through together, for one size of batch."""

    members: slice
    layers: list[_Step]
    first: list[_Reading]
    reads: Tensor  # (k,) which batch each reads


class Stack:
    """K networks that ``bpdiag.model.build`` made, of one shape; their activations may differ.

    Args:
        nets: alike but for their numbers and their activation; left as they are until ``give_back``.
        rules: the activation of each.
        optimizer: with as many rates.
        orders: which of the batches given to ``step`` each member reads; None: all the only one.
        chunk_bytes: see CHUNK.

    Raises:
        UsageError: No net, nets that differ in shape, or a rule that learns.

    Example:
        >>> from bpdiag.config import ModelConfig
        >>> from bpdiag.model import build
        >>> from bpdiag.rules import ACTIVATIONS
        >>> nets = [build(ModelConfig(depth=2, width=4), 3, 2, seed) for seed in range(2)]
        >>> stack = Stack(nets, [ACTIVATIONS["relu"]] * 2, Optimizer([0.1, 0.2]))
        >>> stack.step([torch.ones(5, 3)], [torch.zeros(5, dtype=torch.int64)])
        >>> stack.losses.shape
        torch.Size([2])
    """

    def __init__(
        self,
        nets: Sequence[nn.Module],
        rules: Sequence[type[Activation]],
        optimizer: Optimizer,
        orders: Sequence[int] | None = None,
        chunk_bytes: int = CHUNK,
    ) -> None:
        self.K, self.rules = len(nets), list(rules)
        self.orders = [0] * self.K if orders is None else list(orders)
        check(nets, self.rules, len(optimizer.rate), self.orders)
        self.layers = parameters_of(nets, optimizer)
        self.L, self.chunk_bytes = len(self.layers), chunk_bytes
        first = self.layers[0].W.W
        self._new: dict[str, Any] = {"dtype": first.dtype, "device": first.device}
        self.update = Update(optimizer, first)
        self.losses = torch.zeros(self.K, **self._new)
        self.units = np.ones((self.L, self.K))
        self._plans: dict[int, list[_Chunk]] = {}
        self._buffers: dict[Any, Tensor] = {}

    # ---- a step --------------------------------------------------------------------------------------

    def step(self, xs: Sequence[Tensor], ys: Sequence[Tensor], meter: Meter | None = None) -> None:
        """One step of every member; its loss is left in ``losses``.

        Args:
            xs: the batches, (B, N_0) each; ``orders`` says whose is which.
            ys: their classes (B,).
            meter: measures this step; changes nothing.
        """
        self._sweep(xs, ys, meter, training=True)

    def look(self, xs: Sequence[Tensor], ys: Sequence[Tensor], meter: Meter, most: int = 32) -> Numbers:
        """What a step would measure, every cotangent in a unit that holds it; without a step."""
        for _ in range(most):
            self._sweep(xs, ys, meter, training=False)
            numbers = meter.read(self.units)
            if not self.adjust(numbers):
                break
        meter.forget_silence()
        return numbers

    @np.errstate(over="ignore")
    def adjust(self, numbers: Numbers) -> bool:
        """New units, where what was measured has come near the ends of the old; whether there were any."""
        before, units = self.units, self.units.copy()
        for layer in range(self.L - 1, -1, -1):
            norm = numbers["g_out", layer]
            above = units[layer + 1] if layer + 1 < self.L else np.ones(self.K)
            known = np.isfinite(norm) & (norm > 0)
            rms = np.where(known, norm, 1.0) / math.sqrt(self.layers[layer].W.W.shape[1])
            here = rms * before[layer]
            fits = known & (here > FAR[0]) & (here < FAR[1])
            new = np.exp2(np.clip(-np.round(np.log2(rms)), -LARGEST, LARGEST))
            units[layer] = np.where(fits, before[layer], np.where(known, new, above))
            if self.update.optimizer.accumulates and (units[layer] != before[layer]).any():
                velocities = [p.states[0] for p in self.layers[layer].parameters()]
                units[layer] = np.minimum(units[layer], before[layer] * _bearable(velocities))
                turned = self._column(units[layer] / before[layer])
                for V in velocities:
                    V.mul_(turned)
        if (units == before).all():
            return False
        self.units = units
        self._plan_units()
        return True

    def set_rate(self, rate: Sequence[float]) -> None:
        """The learning rates from the next step on."""
        self.update.set_rate(rate)
        self._plan_units()

    @torch.no_grad()
    def give_back(self, member: int, net: nn.Module) -> None:
        """Write a member's numbers into a net of its shape."""
        for layer, (linear, norm, _) in zip(self.layers, modules_of(net), strict=True):
            pairs = [(linear.weight, layer.W.W), (linear.bias, layer.b.W)]
            if layer.norm is not None and norm is not None:
                pairs += [(norm.weight, layer.norm.gamma), (norm.bias, layer.norm.beta)]
                if layer.norm.running:
                    pairs += zip((norm.running_mean, norm.running_var), layer.norm.running, strict=True)
                    norm.num_batches_tracked.fill_(self.update.steps)
            for theirs, ours in pairs:
                view = arranged(theirs, layer.picture)
                view.copy_(ours[member].view(view.shape))

    # ---- the sweep -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _sweep(self, xs: Sequence[Tensor], ys: Sequence[Tensor], meter: Meter | None, training: bool) -> None:
        plan = self._plans.get(len(ys[0]))
        if plan is None:
            plan = self._plans[len(ys[0])] = self._plan(len(ys[0]))
        if training:
            self.update.begin()
        if meter:
            meter.begin(xs, self.orders)
        parts: dict[int, Sequence[Tensor]] = {}  # of each order what the first weights are multiplied by, ...
        rows: dict[int, Tensor] = {}  # ... and its transpose, which their gradient reads
        held: dict[int, int] = {}
        if self.layers[0].picture is None:
            parts, rows = {i: [x.t()] for i, x in enumerate(xs)}, dict(enumerate(xs))
        targets = torch.stack(list(ys)).unsqueeze(1)
        for chunk in plan:
            if self.layers[0].picture:
                for slot, one in enumerate(chunk.first):
                    read = self._patches(xs[one.order], slot, held.get(slot) == one.order)
                    parts[one.order], rows[one.order] = read.chunk(self.layers[0].picture.pool ** 2, 1), read.t()
                    held[slot] = one.order
            self._forward(chunk, parts, meter, training)
            self._loss(chunk, targets)
            self._backward(chunk, rows, meter, training)

    def _patches(self, x: Tensor, slot: int, known: bool) -> Tensor:
        """What the places of the first convolution read; a slot is one of those that a chunk needs at once."""
        layer = self.layers[0]
        out = self._room(("patches", slot), layer.W.W.shape[2], len(x) * layer.columns)
        return out if known or layer.picture is None else patches(x, layer.picture, out)

    def _forward(
        self, chunk: _Chunk, parts: Mapping[int, Sequence[Tensor]], meter: Meter | None, training: bool
    ) -> None:
        s, below = chunk.members, chunk.layers[0]
        for number, (c, layer) in enumerate(zip(chunk.layers, self.layers, strict=True)):
            if number and c.conv:
                c.conv.forward()
            elif number:
                torch.bmm(c.W.W, below.out, out=c.z)
            else:
                for one in chunk.first:
                    for x, z in zip(parts[one.order], one.z, strict=True):
                        torch.bmm(one.W, x.expand(one.number, *x.shape), out=z)
            c.z.add_(c.b.W)
            if meter:
                squares = c.measure(meter, "z", number, s, c.z)
                shape = c.seen or c.z.shape
                meter.cosine(number, s, c.z.view(shape), squares, c.spare.view(shape))
            if number == self.L - 1:
                return
            if layer.norm:
                c.r = layer.norm.forward(s, c.z, c.u, training)
                if meter:
                    c.measure(meter, "u", number, s, c.u)
            for run in c.runs:
                run.kernel.forward(run.u, run.a)
            if meter:
                c.measure(meter, "a", number, s, c.a)
                for run in c.runs:
                    meter.slopes(number, run.members, run.kept, run.rule, run.kernel, run.spare)
            if c.conv:
                c.conv.pool()
                if meter:
                    c.conv.measure(meter, "p", s)
            if layer.scale is not None:
                torch.add(below.out, c.a, alpha=layer.scale, out=c.out)
                if meter:
                    meter.size("s", number, s, c.out, c.spare)
            below = c

    def _loss(self, chunk: _Chunk, targets: Tensor) -> None:
        """C = mean_b(log sum exp z - z_y),  g_z = (softmax(z) - onehot(y)) / B: the rule ``CrossEntropy``."""
        c = chunk.layers[-1]
        g, at = c.g[0], targets[chunk.reads]
        torch.log_softmax(c.z, 1, out=g)
        torch.mean(g.gather(1, at), (1, 2), out=self.losses[chunk.members]).neg_()
        g.exp_().scatter_add_(1, at, torch.full_like(g[:, :1], -1.0)).div_(g.shape[2])
        if c.turn is not None:
            g.mul_(c.turn)

    def _backward(self, chunk: _Chunk, rows: Mapping[int, Tensor], meter: Meter | None, training: bool) -> None:
        s, room = chunk.members, 0
        held: list[Named] = []  # gradients that wait for the norm of all of them
        for number in range(self.L - 1, -1, -1):
            c, layer = chunk.layers[number], self.layers[number]
            g_out, arrived = c.g[room], room
            if c.conv:
                c.conv.arrive(c.arrives[room])
                if meter:
                    c.conv.measure(meter, "g_out", s)
                c.conv.unpool(g_out)
            elif meter:
                meter.size("g_out", number, s, g_out, c.spare)
            small: list[Named] = []
            if number < self.L - 1:
                if layer.scale is not None:  # a block's end: the skip needs g_out again
                    room = (room + 1) % 3
                    if layer.scale != 1:
                        torch.mul(g_out, layer.scale, out=c.g[room])
                        arrived = room
                for run in c.runs:
                    run.kernel.vjp(run.g[arrived], run.kept, run.g[room])
                if layer.norm and c.gamma and c.beta and c.r is not None:
                    if meter:
                        c.measure(meter, "g_u", number, s, c.g[room])
                    g_gamma, g_beta = layer.norm.vjp(s, c.g[room], c.z, c.r, c.spare)
                    g_gamma, g_beta = g_gamma.view_as(c.gamma.W), g_beta.view_as(c.beta.W)
                    small += [Named(c.gamma, g_gamma, "gamma", number), Named(c.beta, g_beta, "", number)]
            g = c.g[room]
            if meter:
                c.measure(meter, "g_z", number, s, g)
            held_room = room
            if number:
                room = (room + 1) % 3
                self._onward(chunk, number, g, g_out, room, meter)
            if training:
                small.append(Named(c.b, g.sum(2, keepdim=True), "", number))
                held += self._learn(chunk, number, held_room, rows, small, meter)
        if held:
            self._clip(held, chunk, meter)

    def _onward(self, chunk: _Chunk, number: int, g: Tensor, g_out: Tensor, room: int, meter: Meter | None) -> None:
        """The cotangent of what a layer read: by its weights, and past them in a block."""
        c, below = chunk.layers[number], chunk.layers[number - 1]
        onward = below.arrives[room]
        if c.conv:
            c.conv.onward(g, onward)
        elif self.layers[number].scale is None:
            torch.bmm(c.WT, g, out=onward)
        else:
            if meter:  # what the way through the weights alone carries
                meter.size("edge", number, chunk.members, torch.bmm(c.WT, g, out=c.spare), onward)
            torch.baddbmm(g_out, c.WT, g, out=onward)
        if below.turn is not None:
            onward.mul_(below.turn)

    # ---- the update ----------------------------------------------------------------------------------

    def _learn(
        self, chunk: _Chunk, number: int, room: int, rows: Mapping[int, Tensor], small: list[Named], meter: Meter | None
    ) -> list[Named]:
        """Update a layer; or return its gradients, where all of them must be known before any is used."""
        c, optimizer = chunk.layers[number], self.update.optimizer
        named: list[Named] = [Named(c.W, c.G, "W", number), *small]
        if meter:
            meter.distinct_rows(number, chunk.members, c.W.W)
        if meter or not optimizer.accumulates:
            self._product(chunk, number, room, rows, None)
        if meter:
            for one in named:
                meter.before(one, chunk.members)
        if optimizer.accumulates:
            self._product(chunk, number, room, rows, optimizer.momentum)
            self.update.descend(c.W, c.rate)
            for one in small:
                self.update.accumulate(one.p, one.G, c.rate)
        else:
            if c.back is not None:
                for one in named:
                    one.G.mul_(c.back)
            if optimizer.clip:
                return named
            for one in named:
                self.update.apply(one.p, one.G, c.room_beside)
        if meter:
            for one in named:
                meter.after(one, chunk.members)
        return []

    def _product(self, chunk: _Chunk, number: int, room: int, rows: Mapping[int, Tensor], mu: float | None) -> None:
        """V = mu V + g a^T; without mu G = g a^T."""
        c = chunk.layers[number]
        if number and c.conv:
            c.conv.gradient(c.G if mu is None else c.W.states[0], mu)
            return
        if number:
            aT = chunk.layers[number - 1].out_transposed
            if mu is None:
                torch.bmm(c.g[room], aT, out=c.G)
            else:
                torch.baddbmm(c.W.states[0], c.g[room], aT, beta=mu, out=c.W.states[0])
            return
        for one in chunk.first:
            x = rows[one.order].expand(one.number, *rows[one.order].shape)
            if self.layers[0].picture:  # of so long a sum the transpose takes two thirds of the time
                G = torch.bmm(x.mT, one.g[room].mT).mT
                torch.add(G, one.V, alpha=mu, out=one.V) if mu is not None else one.G.copy_(G)
            elif mu is None:
                torch.bmm(one.g[room], x, out=one.G)
            else:
                torch.baddbmm(one.V, one.g[room], x, beta=mu, out=one.V)

    def _clip(self, held: Sequence[Named], chunk: _Chunk, meter: Meter | None) -> None:
        """G = G min(1, most / |G|), |G| over all of a member's parameters, as torch's ``clip_grad_norm_``; a step."""
        sizes = torch.stack([torch.linalg.vector_norm(one.G, dim=(1, 2)) for one in held])
        total = torch.linalg.vector_norm(sizes, dim=0).view(-1, 1, 1)
        factor = (self.update.most[chunk.members] / (total + 1e-6)).clamp_(max=1)
        if meter:
            meter.clipped(chunk.members, factor.flatten())
        for one in held:
            self.update.apply(one.p, one.G.mul_(factor), chunk.layers[one.layer].room_beside)
            if meter:
                meter.after(one, chunk.members)

    # ---- plans ---------------------------------------------------------------------------------------

    def _plan_units(self) -> None:
        """What the units and the rates come to, in every plan."""
        for plan in self._plans.values():
            for chunk in plan:
                self._set_units(chunk)

    def _set_units(self, chunk: _Chunk) -> None:
        s = chunk.members
        rate = np.array(self.update.host_rate)[s]
        above = np.ones_like(rate)
        for c, units in zip(reversed(chunk.layers), self.units[::-1, s], strict=True):
            c.turn = self._column(units / above) if (units != above).any() else None
            c.back = self._column(1 / units) if (units != 1).any() else None
            c.rate = self._column(rate / units)
            above = units

    def _column(self, numbers: np.ndarray) -> Tensor:
        """(K, 1, 1)."""
        return torch.from_numpy(numbers).to(**self._new).view(-1, 1, 1)

    def _plan(self, batch: int) -> list[_Chunk]:
        """Every view that a step of this size of batch needs."""
        widths = [layer.W.W.shape[1] * layer.columns for layer in self.layers]
        numbers = sum(layer.W.W[0].numel() * 2 for layer in self.layers) + batch * sum(widths)
        size = max(1, self.chunk_bytes // (numbers * self.layers[0].W.W.element_size()))
        count = -(-self.K // size)
        ends = [round(self.K * i / count) for i in range(count + 1)]
        widest = max(stop - start for start, stop in pairwise(ends))
        return [self._chunk(slice(*ends[i : i + 2]), batch, widest) for i in range(count)]

    def _room(self, name: Any, *shape: int, largest: int = 0) -> Tensor:
        """Of a buffer that every chunk uses."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < max(size, largest):
            self._buffers[name] = torch.empty(max(size, largest), **self._new)
        return self._buffers[name][:size].view(shape)

    def _chunk(self, members: slice, batch: int, widest: int) -> _Chunk:
        n, top = members.stop - members.start, max(layer.W.W.shape[1] * layer.columns for layer in self.layers)

        def room(name: Any, rows: int, columns: int, largest: int) -> Tensor:
            """(n, rows, columns)."""
            return self._room(name, n, rows, columns, largest=widest * largest)

        alike = [(here, rule, kernel(rule)) for here, rule in _neighbors(self.rules[members])]
        apart = any(its.keeps_input for _, _, its in alike)
        largest = max(layer.W.W[0].numel() for layer in self.layers)
        steps: list[_Step] = []
        for number, layer in enumerate(self.layers):
            _, N, M = layer.W.W.shape
            columns = batch * layer.columns
            of_width = (N, columns, N * columns)
            z = room(("z", number), *of_width)
            u = room(("u", number), *of_width) if layer.norm else z
            a = room(("a", number), *of_width) if apart and number < self.L - 1 else u
            out = room(("out", number), *of_width) if layer.scale is not None else a
            W, b = layer.W.of(members), layer.b.of(members)
            g = arrives = [room(("g", i), N, columns, top * batch) for i in range(3)]
            conv = None
            if layer.picture:
                below, flat = steps[-1].out if steps else None, self.layers[number + 1].picture is None
                conv = Convolution(layer.picture, W.W, z, a, batch, below, flat, number, room)
                out = conv.out
                arrives = [room(("g", i), *conv.side, top * batch) for i in range(3)]
            spare = room("spare", N, columns, top * batch)
            runs = [
                _Run(
                    rule,
                    its,
                    slice(members.start + here.start, members.start + here.stop),
                    u[here],
                    a[here],
                    (u if its.keeps_input else a)[here],
                    [x[here] for x in g],
                    spare[here],
                )
                for here, rule, its in alike
            ]
            steps.append(
                _Step(
                    W=W,
                    WT=W.W.transpose(1, 2),
                    b=b,
                    gamma=layer.gamma.of(members) if layer.gamma else None,
                    beta=layer.beta.of(members) if layer.beta else None,
                    z=z,
                    u=u,
                    a=a,
                    out=out,
                    out_transposed=out.transpose(1, 2),
                    g=g,
                    arrives=arrives,
                    conv=conv,
                    seen=conv.seen if conv else None,
                    spare=spare,
                    G=room(("G", number), N, M, N * M) if self.update.optimizer.clip else room("G", N, M, largest),
                    room_beside=room("spare G", N, M, largest),
                    runs=runs,
                    rate=self.update.rate[members],
                )
            )
        c, layer = steps[0], self.layers[0]
        first = [
            _Reading(
                order,
                here.stop - here.start,
                c.W.W[here],
                c.z[here].chunk(layer.picture.pool**2 if layer.picture else 1, 2),
                c.W.states[0][here],
                c.G[here],
                [x[here] for x in c.g],
            )
            for here, order in _neighbors(self.orders[members])
        ]
        chunk = _Chunk(members, steps, first, torch.tensor(self.orders[members], device=self._new["device"]))
        self._set_units(chunk)
        return chunk


def _bearable(velocities: Sequence[Tensor]) -> np.ndarray:
    """(K,) what each member's velocities may be multiplied by: a power of two that leaves them in float32."""
    largest = torch.stack([V.abs().amax((1, 2)) for V in velocities]).amax(0).double().cpu().numpy()
    known = np.isfinite(largest) & (largest > 0)
    return np.where(known, np.exp2(BEARABLE - np.ceil(np.log2(np.where(known, largest, 1.0)))), np.exp2(LARGEST))


def _neighbors(things: Sequence[Any]) -> list[tuple[slice, Any]]:
    """Where equal things stand next to each other.

    Example:
        >>> _neighbors("aab")
        [(slice(0, 2, None), 'a'), (slice(2, 3, None), 'b')]
    """
    found, start = [], 0
    for thing, group in groupby(things):
        stop = start + len(list(group))
        found.append((slice(start, stop), thing))
        start = stop
    return found
