"""Traces typed by hand, and for each finding a sick one and its healthy twin."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from bpdiag.diagnosis import Finding, diagnose
from bpdiag.trace import Layer, Sample, Trace

INF, NAN = math.inf, math.nan
RELU, SIGMOID = ("relu", 1.0, math.sqrt(0.5)), ("sigmoid", 0.25, 1.0)  # name, largest slope, r
HE = math.sqrt(2)  # sig at weight variance 2
HALF = math.sqrt(0.5)  # rms of a relu's slopes, half of them 0
TORCH = math.sqrt(1 / 3)  # sig of nn.Linear's default
FAN_IN, B, K = 100, 256, 10

Number = float | list[float] | Callable[[int], float | list[float]]
# losses: falls all the time and has not converged after 200 steps; a plateau; under a tenth of ln 10 from step 1 on
learning, stuck, late = (lambda s: 2.3 * math.exp(-s / 100), lambda s: 2.2, lambda s: 2.3 if s == 0 else 0.22)


def net(
    depth: int = 5, *,
    sig: Number = HE, A: Number = 1.0, slope: Number = HALF, C: Number = 1.0,
    between: Number | None = None,  # what a normalization between weights and activation multiplies by
    update: Number = 1e-3, dead: Number | None = None, cosine: Number = 0.5,
    loss: Callable[[int], float] | None = learning,
    phi: tuple[str, float, float] = RELU, function: bool = False,  # True: a function call, no module of its own
    planned: int | None = 1000, adam: bool = False, momentum: float = 0.0,
    scale: float = 1.0,  # of all cotangents
    steps: Sequence[int] = range(0, 200, 10),
    target: Callable[[int], dict[str, float]] = lambda step: {},  # what the loss compares with
    edit: Callable[[int, str, dict], None] = lambda step, layer, row: None,  # a last touch
) -> Trace:  # fmt: skip
    """The trace of an MLP, layers z1, a1, ..., zL, whose step from z_{l+1} to z_l has G = sig A slope C [between].

    Numbers are one for all, a list from the lowest step up, or either as a function of the training step.
    """
    name, largest, r = phi
    stride = 1 + (between is not None) + (not function)
    acts = {"activation": name, "largest_slope": largest, "r": r, "window": 8}
    layers = []
    for n in range(1, depth + 1):
        at, last = len(layers), n == depth
        parents = (at - 1,) if n > 1 else ()
        on = {} if last else {"next": at + stride, "via": tuple(range(at + 1, at + stride))}
        on |= acts if function and not last else {}
        units = K if last else FAN_IN
        layers.append(Layer(f"z{n}", 0, "linear", (B, units), parents, fan_in=FAN_IN, units=units, **on))
        if between is not None and not last:
            layers.append(Layer(f"n{n}", 0, "batchnorm1d", (B, FAN_IN), (len(layers) - 1,)))
        if not function and not last:
            layers.append(Layer(f"a{n}", 0, name, (B, FAN_IN), (len(layers) - 1,), **acts))
    index = {layer.name: i for i, layer in enumerate(layers)}

    def at_step(number: Number | None, step: int) -> list[float]:
        number = number(step) if callable(number) else 1.0 if number is None else number
        return number if isinstance(number, list) else [number] * depth

    def rows(step: int) -> dict[str, dict[str, float]]:
        numbers = (sig, A, slope, C, between, update, cosine, dead)
        sigs, As, slopes, Cs, norms, updates, cosines, silent = (at_step(number, step) for number in numbers)
        g, rows = scale, {}
        for n in range(depth, 0, -1):
            z = rows[f"z{n}"] = {"z_norm": 10.0, "z_rms": 1.0, "forward_gain": 1.0, "z_cosine": cosines[n - 1]}
            z |= {"W_rms": (sigs[n - 2] if n > 1 else 1.0) / math.sqrt(FAN_IN), "update_ratio": updates[n - 1]}
            if n < depth:
                i = n - 1
                above, w, s = g, sigs[i] * As[i], slopes[i] * Cs[i] * norms[i]
                phi_row = {"a_norm": 5.0, "g_a_norm": w * above, "slope_rms": slopes[i]}
                if dead is not None:
                    phi_row["a_dead_fraction"] = silent[i]
                if between is not None:
                    rows[f"n{n}"] = {"z_norm": 9.0, "g_z_norm": w * above * slopes[i] * Cs[i]}
                g = w * s * above
                z |= {"weight_factor": w, "slope_factor": s, "backward_gain": g / above} if above else {}
                rows[f"z{n}" if function else f"a{n}"] = z | phi_row if function else phi_row
            rows[f"z{n}"] |= {"g_z_norm": g, "g_W_norm": g, "decades": math.log10(g / scale) if g > 0 else -INF}
        rows["z1"]["x_rms"] = 1.0
        for name, row in rows.items():
            edit(step, name, row)
        return rows

    samples, told = [], -1
    for step in steps:
        losses = [(s, loss(s)) for s in range(told + 1, step + 1)] if loss else []
        numbers = [(0, index[k], row) for k, row in rows(step).items()]
        samples.append(Sample(step, layers, numbers, losses, 0.1, target=target(step)))
        told = step
    optimizer = {"name": "Adam" if adam else "SGD", "lr": 0.1, "momentum": momentum, "sgd_like": not adam}
    return Trace.build(layers, samples, {"optimizer": optimizer, **({"planned_steps": planned} if planned else {})})


def by(decades: float, owner: str = "sig", depth: int = 5, **options) -> Trace:
    """A net whose lowest layer is ``decades`` from its top, all by one owner."""
    normal = {"sig": HE, "A": 1.0, "slope": HALF, "C": 1.0, "between": 1.0}[owner]
    return net(depth, **{owner: normal * 10 ** (decades / (depth - 1))}, **options)


def kinds(trace: Trace) -> list[tuple[str, str]]:
    return [(f.kind, f.severity) for f in diagnose(trace)]


def only(trace: Trace) -> Finding:
    (finding,) = diagnose(trace)
    return finding


def bracket(finding: Finding) -> tuple[float, float]:
    return finding.evidence["last_finite_step"], finding.evidence["first_nonfinite_step"]


def spoil(step: int, layer: str, **values: float) -> Callable[[int, str, dict], None]:
    """Overwrite numbers of one layer at one step."""
    return lambda s, name, row: row.update(values) if (s, name) == (step, layer) else None


def nan_from(first: int) -> Callable[[int], float]:
    return lambda step: NAN if step >= first else learning(step)


VANISH, GROW = ("vanishing", "harm"), ("exploding", "harm")
DEAD = {"dead": [0.0, 0.9, 0.0, 0.0], "slope": [HALF, 1e-3, HALF, HALF]}


def noted(trace: Trace, **meta) -> Trace:
    """A trace with more in its meta."""
    trace.meta |= meta
    return trace


def path(*ops: str) -> list[dict]:
    """Operations from an output of ten classes to a loss."""
    head = {"op": "Addmm", "shape": [B, K], "layer": "z5#0"}
    return [{"op": "Output", "shape": [B, K], "made": [head]}, *({"op": op, "shape": [B, K]} for op in ops)]


def stale(share: float) -> Callable[[int, str, dict], None]:
    """From the second step on .grad holds so much already; the first finds none."""

    def edit(step: int, name: str, row: dict) -> None:
        if "g_W_norm" in row:
            row.update(g_W_raw_norm=row["g_W_norm"], g_W_stale_norm=share * row["g_W_norm"] * (step > 0))

    return edit


def started(loss: float, z: float = 1.0, saturated: float = 0.0, weights: float = 1.0, later: float = 2.0) -> Trace:
    """A tanh net whose first and later loss, last preactivations, saturation and weights (over critical) are these."""

    def edit(step: int, name: str, row: dict) -> None:
        if step == 0 and name == "z5":
            row["z_rms"] = z
        if name.startswith("a"):
            row["a_saturated_fraction"] = saturated if step == 0 else 0.1

    course = lambda step: loss if step == 0 else later - step / 1000  # noqa: E731
    return net(phi=("tanh", 1.0, 1.0), sig=weights, slope=1.0 / weights, loss=course, edit=edit)


def alike(share: float, until: int = 200) -> Callable[[int, str, dict], None]:
    """Of the second layer's rows so many differ, until a step."""
    return lambda s, name, row: row.update(W_distinct_rows=share) if name == "z2" and s < until else None


def decayed(decay: float) -> Trace:
    """A net on a plateau under weight decay; |W| is 14 where |g_W| is 1."""
    trace = net(loss=stuck)
    trace.meta["optimizer"]["weight_decay"] = decay
    return trace


def plain(slope: float) -> Trace:
    """Weight layers with nothing watched between them; what lies there multiplies by ``slope``."""
    layers = [
        Layer(f"z{n}", 0, "linear", (B, 10), (n - 1,) if n else (), n + 1 if n < 2 else None, fan_in=10, units=10)
        for n in range(3)
    ]
    rows = [
        (0, n, {"g_z_norm": 1.0, "weight_factor": 1.0, "slope_factor": slope, "backward_gain": slope}) for n in (0, 1)
    ]
    rows.append((0, 2, {"g_z_norm": 1.0}))
    samples = [Sample(s, layers, rows, [(s, learning(s))], 0.1) for s in range(0, 200, 10)]
    return Trace.build(layers, samples, {"planned_steps": 1000, "optimizer": {"sgd_like": True}})


def residual(branch: float, z: float = 1.0, loss: Callable[[int], float] = learning) -> Trace:
    """Twenty blocks x + f(x), whose branches carry so much; the rms of the last layer, at the first step."""
    layers, rows = [Layer("x0", 0, "linear", (B, 10), fan_in=10, units=10)], [(0, 0, {"g_z_norm": 1.0})]
    for n in range(1, 21):
        below = len(layers) - 1
        layers += [
            Layer(f"f{n}", 0, "linear", (B, 10), (below,), fan_in=10, units=10),
            Layer(f"x{n}", 0, "sum", (B, 10), (below, below + 1)),
        ]
        rows.append((0, len(layers) - 2, {"g_z_norm": 1.0, "edge_gain": [branch], "decades": 0.0}))
        rows.append((0, len(layers) - 1, {"g_z_norm": 1.0, "edge_gain": [1.0, 1.0]}))
    rows[-2][2]["z_rms"] = z
    samples = [Sample(s, layers, rows, [(s, loss(s))], 0.1) for s in range(0, 200, 10)]
    return Trace.build(layers, samples, {"planned_steps": 300, "optimizer": {"sgd_like": True}})


LEFT = {"what": "parameter", "name": "head.weight", "reason": "in no optimizer, so never updated"}
STRANGER = {"what": "parameter", "name": "of shape (5, 8)", "reason": "in an optimizer, in no module of the model: ..."}


def data(rms: float) -> Callable[[int, str, dict], None]:
    return lambda s, name, row: row.update(x_rms=rms) if name == "z1" else None


def numbers(rms: float) -> Callable[[int], dict[str, float]]:
    return lambda step: {"target_rms": rms, "target_spread": rms / 10}


def between(lowest: float, highest: float) -> Callable[[int], dict[str, float]]:
    return lambda step: {"target_lowest": lowest, "target_highest": highest}


def classes(share: float) -> Callable[[int], dict[str, float]]:
    """Four classes, one after the other, each with so much of its batches."""
    return lambda step: {"target_class": float(step // 50), "target_class_share": share}


def rounded(share: float) -> Callable[[int, str, dict], None]:
    return lambda s, name, row: row.update(dW_rounded_fraction=share) if "update_ratio" in row else None


def held_in(dtype: str, trace: Trace, eps: float = 1e-4) -> Trace:
    """The trace of a model in this format, under an optimizer with this eps."""
    trace.layers = [dataclasses.replace(layer, dtype=dtype) for layer in trace.layers]
    trace.meta["optimizer"] |= {"dtype": dtype, "eps": eps}
    return trace


def sent(rms: float) -> Callable[[int, str, dict], None]:
    return lambda s, name, row: row.update(g_z_rms=rms) if "g_z_norm" in row else None


def sure(head: float) -> Callable[[int, str, dict], None]:
    """Logits of rms 9, or as much as the last layer makes of 1."""
    return lambda s, name, row: row.update(z_rms=max(head, 9.0), forward_gain=head) if name == "z5" else None


def clipped(lowest: float) -> Callable[[int, str, dict], None]:
    """A clip to a tenth; gradients of norm 1 but for the lowest layer's."""

    def edit(step: int, name: str, row: dict) -> None:
        if "g_W_norm" in row:
            row["g_W_raw_norm"] = lowest if name == "z1" else 1.0
            row["g_W_norm"] = row["g_W_raw_norm"] / 10

    return edit


CASES = {
    "dominating_layer": (lambda: net(edit=clipped(3.2)), lambda: net(edit=clipped(2.9))),
    "logits_saturated": (
        lambda: net(edit=sure(9.0), loss=lambda s: 9.0 if s == 0 else 2.0 - s / 1000),
        lambda: net(edit=sure(9.0)),
    ),
    "chance_level": (lambda: net(loss=lambda s: 2.29), lambda: net(loss=lambda s: 2.29 * math.exp(-s / 4000))),
    "too_few_steps": (
        lambda: net(loss=lambda s: 5 - s / 500, planned=200),
        lambda: net(loss=lambda s: 5 - s / 100, planned=200),
    ),
    "precision": (lambda: net(edit=rounded(0.95), loss=stuck), lambda: net(edit=rounded(0.85), loss=stuck)),
    "input_scale": (lambda: net(edit=data(11.0), loss=stuck), lambda: net(edit=data(9.0), loss=stuck)),
    "targets": (lambda: net(target=numbers(31.0), loss=stuck), lambda: net(target=numbers(29.0), loss=stuck)),
    "data_order": (lambda: net(target=classes(0.63)), lambda: net(target=classes(0.62))),
    "symmetric_initialization": (lambda: net(edit=alike(0.01)), lambda: net(edit=alike(0.51))),
    "disconnected": (lambda: noted(net(), unseen=[LEFT, STRANGER]), lambda: noted(net(), unseen=[STRANGER])),
    "loss_interface": (
        lambda: noted(net(), loss_path=path("Softmax", "LogSoftmax", "NllLoss")),
        lambda: noted(net(), loss_path=path("LogSoftmax", "NllLoss")),
    ),
    "stale_gradient": (lambda: net(edit=stale(0.9)), lambda: net(edit=stale(0.0))),
    "update_too_small": (lambda: net(update=0.0), lambda: net(update=2e-5)),
    "saturated": (lambda: started(5.0, saturated=0.8, weights=9.0), lambda: started(5.0, saturated=0.2, weights=9.0)),
    "forward_scale": (lambda: started(9.0, z=20.0), lambda: started(9.0, z=2.0)),
    "update_too_large": (lambda: net(update=0.2, loss=stuck), lambda: net(update=0.2)),
    "over_regularized": (lambda: decayed(1.0), lambda: decayed(1e-4)),
    "linear_stack": (lambda: plain(1.0), lambda: plain(0.9)),
    "correlation_collapse": (
        lambda: net(cosine=[0.5, 0.9, 0.99, 0.999, 0.5], loss=stuck),
        lambda: net(cosine=[0.5, 0.9, 0.99, 0.99, 0.5], loss=stuck),
    ),
    "residual_mismatch": (lambda: residual(1.5), lambda: residual(0.5)),
    "non_finite": (lambda: net(edit=spoil(60, "z2", z_norm=INF)), lambda: net(edit=spoil(60, "z2", z_norm=1e30))),
    "dead_units": (lambda: net(**DEAD, planned=300), lambda: net(**DEAD | {"dead": 0.1, "slope": HALF}, planned=300)),
    "exploding": (lambda: by(3.2), lambda: by(2.8)),
    "vanishing": (lambda: by(-3.2), lambda: by(-2.8)),
}
