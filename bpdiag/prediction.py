"""What theory expects of a run before it has begun: the flow of gradients, the verdict, the depth it bears.

The theory is ``meanfield``'s.  Here a ``Config`` becomes a network that it can follow, and what it says becomes a trace
of one step, as if measured: so the same judge and the same pictures serve both.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from bpdiag import data, diagnosis, meanfield, model
from bpdiag.config import Config, ModelConfig, UsageError, planned_steps
from bpdiag.initialization import BIAS_PRESETS, number, variances
from bpdiag.meanfield import Plan, Theory
from bpdiag.rules import ACTIVATIONS
from bpdiag.statistics import SATURATED
from bpdiag.trace import Layer, Sample, Trace

COVERED = ("mlp",)  # the models that the theory knows
LARGEST = 3.4e38  # of float32
DEEPEST = 1_000  # layers looked for
SPREADS = 2  # standard deviations of the draw of the weights that a measured gain may be off
OWN = 0.01  # of a gain: the theory's own accuracy
ALIKE = 6  # correlation depths over which a net can be trained (Schoenholz et al. 2017)
QUANTILES = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
ENOUGH = 5_000  # samples to measure a data set by


@dataclass(frozen=True)
class Source:
    """What the theory needs to know of the data."""

    samples: int  # in the training split
    inputs: int
    classes: int
    mean_squares: tuple[float, ...]  # of a sample's standardized pixels: quantiles over the samples
    variance: float  # of a pixel over the samples, mean over the pixels


# MNIST's, so that nothing need be read: measured over all 55,000
DIGITS = Source(
    55_000, 784, 10, (0.5535, 0.6817, 0.7722, 0.8512, 0.9279, 1.0061, 1.0907, 1.1889, 1.3231, 1.5605), 0.7083
)


@functools.lru_cache(maxsize=2)
def source(dataset: data.Dataset) -> Source:
    """What the theory needs, measured over the first 5,000 training samples."""
    x = dataset.train.x[:ENOUGH].cpu().double()
    squares = torch.quantile(x.square().mean(1), QUANTILES).tolist()
    variance = float(x.var(0, correction=0).mean())
    return Source(len(dataset.train), math.prod(dataset.shape), dataset.classes, tuple(squares), variance)


def plan(config: ModelConfig, given: Source) -> Plan:
    """The network of ``config`` as the theory sees it.

    Raises:
        UsageError: It is a kind of network that the theory does not cover.

    Example:
        >>> plan(ModelConfig(depth=2, width=100), DIGITS).weights
        (2.0, 2.0)
    """
    if config.name not in COVERED:
        raise UsageError(f"model.name={config.name}: the theory covers {', '.join(COVERED)} only; train it to see")
    widths = (given.inputs, *[config.width] * (config.depth - 1), given.classes)
    pairs = [variances(config, n_in, n_out) for n_in, n_out in pairwise(widths)]
    weights, biases = zip(*pairs, strict=True)
    return Plan(
        rule=ACTIVATIONS[config.activation],
        widths=widths,
        weights=weights,
        biases=biases,
        normalization=model.normalization(config),
        branch=model.branch_scale(config) if config.residual == "identity" else None,
        mean_squares=given.mean_squares,
        variance=given.variance,
    )


def expect(config: Config, given: Source = DIGITS) -> dict[str, Any]:
    """What stands beside the measured in a run: gain per hidden layer with its band, decades of every layer, verdict.

    ``within`` is what a measured gain may be off: two standard deviations of the draw of the weights and 1 % of it.

    Example:
        >>> told = expect(Config(model=ModelConfig(activation="sigmoid", weight_variance="torch", depth=10)))
        >>> round(told["gain_per_layer"], 3), round(told["decades"][0], 1), told["verdict"]
        (0.141, -7.7, 'dies')
    """
    seedless = dataclasses.replace(config, seed=0, expect=[])  # theory knows no draw
    return copy.deepcopy(_remembered(_Asked(repr(seedless), seedless), given))


@dataclass(frozen=True)
class _Asked:
    """A configuration that can be looked up."""

    text: str
    config: Config = field(compare=False)


@functools.lru_cache(maxsize=1_000)
def _remembered(asked: _Asked, given: Source) -> dict[str, Any]:
    """A sweep asks the same of every seed."""
    return _expect(asked.config, given)[0]


def _expect(config: Config, given: Source) -> tuple[dict[str, Any], Trace]:
    """What ``expect`` tells, and the trace it was judged by."""
    planned = plan(config.model, given)
    theory = meanfield.follow(planned)
    trace = as_trace(config, given, planned, theory)
    told = {
        "gain_per_layer": theory.gain_per_layer,
        "within": SPREADS * theory.gain_band + OWN * theory.gain_per_layer,
        "decades": theory.decades.tolist(),
        "decades_band": theory.band.tolist(),
        "spreads": SPREADS,
        "verdict": diagnosis.verdict(diagnosis.diagnose(trace)),
        "caveat": caveat(planned),
    }
    return told, trace


def caveat(planned: Plan) -> str:
    """Where the theory is known to say too little; empty where it holds."""
    biased = abs(meanfield.moments(planned.rule, 1.0).mean) > 1e-3
    if planned.branch is not None and planned.normalization == "none" and biased and len(planned.weights) > 8:
        return (
            f"{planned.rule.name} adds numbers that are not 0 on the average, so that over more than a few blocks "
            "without a norm gradients grow faster than told"
        )
    return ""


def predict(config: Config, given: Source | None = None) -> Trace:
    """The first step of a run, expected and not measured, as a trace.  ``diagnose`` judges it.

    Its ``meta["predicted"]`` has what ``expect`` tells, how deep such a net can be, how fast it forgets, and the
    critical variances with what they would change.  Nothing is trained; MNIST is not even read.

    Args:
        config: one run, whole.
        given: the data; None: as ``config.data`` names them.

    Raises:
        UsageError: The theory does not cover the network, or the data cannot be read.

    Example:
        >>> from bpdiag.diagnosis import diagnose
        >>> trace = predict(Config(model=ModelConfig(activation="tanh", weight_variance="torch", depth=30)))
        >>> [(f.kind, f.cause) for f in diagnose(trace)], trace.meta["predicted"]["deepest"]
        ([('vanishing', 'weights')], 12)
    """
    if given is None:
        digits = config.data.name == "mnist"
        given = DIGITS if digits else source(data.load(config.data, "cpu", torch.float32))
    planned = plan(config.model, given)
    told, trace = _expect(config, given)
    trace.meta["predicted"] = {
        **told,
        "deepest": deepest(config, given),
        "looked_for": DEEPEST,
        "scales": _scales(planned),
        "critical": _critical(config, given, planned),
    }
    return trace


def deepest(config: Config, given: Source = DIGITS) -> int:
    """The most layers with |D_1| <= log10 T: the depth to which the first layer gets more than 1/T and less than T.

    1,000 stands for that or more.

    Example:
        >>> deepest(Config(model=ModelConfig(activation="sigmoid", weight_variance="torch")))
        4
    """
    limit = math.log10(max(planned_steps(config, given.samples), 2))
    typical = dataclasses.replace(given, mean_squares=(float(np.median(given.mean_squares)),))

    def bears(depth: int) -> bool:
        deeper = dataclasses.replace(config.model, depth=depth)
        return abs(meanfield.follow(plan(deeper, typical)).decades[0]) <= limit

    low = model.LEAST_DEPTH - 1 if config.model.residual == "identity" else 1
    high = low + 1
    while high <= DEEPEST and bears(high):
        low, high = high, min(2 * high, DEEPEST) if high < DEEPEST else DEEPEST + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bears(middle) else (low, middle)
    return low


def _scales(planned: Plan) -> dict[str, float] | None:
    """Depth scales of the hidden layers; None where a norm or a skip makes another map."""
    if planned.branch is not None or planned.normalization != "none" or len(planned.weights) < 3:
        return None
    told = meanfield.depth_scales(planned.rule, planned.weights[1], planned.biases[1])
    return {**dataclasses.asdict(told), "trainable": ALIKE * told.xi_c}


def _critical(config: Config, given: Source, planned: Plan) -> dict[str, Any] | None:
    """The critical variances and what they make of this net; None where there are none to choose.

    Those of the bias variance given as a number, else the activation's own.
    """
    given_bias = number("model.bias_variance", config.model.bias_variance, BIAS_PRESETS)
    there = meanfield.critical(planned.rule, given_bias)
    if there is None or planned.normalization != "none" or planned.branch is not None:
        return None
    mended = dataclasses.replace(
        config.model, weight_variance=f"{there.weight_variance:.7g}", bias_variance=f"{there.bias_variance:.7g}"
    )
    told = expect(dataclasses.replace(config, model=mended), given)
    return {**dataclasses.asdict(there), **{key: told[key] for key in ("gain_per_layer", "decades", "verdict")}}


# ---- as if measured ------------------------------------------------------------------------------------------


def as_trace(config: Config, given: Source, planned: Plan, theory: Theory) -> Trace:
    """The theory as a trace of step 0: modules are named as ``model.build`` names them.

    Its updates are the optimizer's, of weight gradients whose samples neither agree nor cancel:  |g_W|^2 = sum over the
    batch of |g|^2 |a|^2.
    """
    layers, rows = _rows(config, given, planned, theory)
    o = config.optimizer
    optimizer = {"name": o.name, "sgd_like": o.name == "sgd", "lr": o.lr, "momentum": o.momentum, "eps": o.eps}
    meta = {
        "config": dataclasses.asdict(config),
        "planned_steps": max(planned_steps(config, given.samples), 1),
        "loss": "cross_entropy",
        "optimizer": optimizer if o.name == "sgd" else {**optimizer, "momentum": 0.0},
    }
    told = [(0, i, {name: value for name, value in row.items() if not math.isnan(value)}) for i, row in enumerate(rows)]
    loss = meanfield.first_loss(theory.length[-1], given.classes)
    return Trace.build(layers, [Sample(0, layers, told, [(0, loss)])], meta)


def _rows(config: Config, given: Source, planned: Plan, theory: Theory) -> tuple[list[Layer], list[dict[str, float]]]:
    rule, depth, batch = planned.rule, len(planned.weights), config.data.batch_size
    norm = {"layer": "layernorm", "batch": "batchnorm"}.get(planned.normalization)
    top = math.sqrt((given.classes - 1) / given.classes / batch)  # |g_z_L| of a guess, mean reduction
    with np.errstate(over="ignore", invalid="ignore"):  # of a branch of scale 0 infinite times 0
        g_z, g_a = top * 10.0**theory.decades, np.append(top * 10.0 ** theory.decades[1:], 0.0) * theory.weight_factor
    gains, z_below = theory.gain, math.sqrt(theory.fed[0])
    layers: list[Layer] = []
    rows: list[dict[str, float]] = []
    for l in range(depth):  # noqa: E741
        n_in, n_out, at, last = planned.widths[l], planned.widths[l + 1], len(layers), l == depth - 1
        block = planned.branch is not None and l > 0 and not last
        names = [*([norm] if norm else []), rule.name, *(["sum"] if block else [])] if not last else []
        straight = not last and (planned.branch is None or l == depth - 2)
        z_rms, W_rms = math.sqrt(theory.length[l]), math.sqrt(planned.weights[l] / n_in)
        g_W = g_z[l] * math.sqrt(theory.fed[l] / n_out)
        step = config.optimizer.lr * (g_W if config.optimizer.name == "sgd" else g_W / (g_W + config.optimizer.eps))
        own = {
            "z_rms": z_rms if z_rms < LARGEST else math.inf,
            "z_norm": z_rms * math.sqrt(batch * n_out) if z_rms < LARGEST else math.inf,
            "g_z_norm": g_z[l],
            "decades": float(theory.decades[l]),
            "W_rms": W_rms,
            "update_ratio": step / W_rms if W_rms else math.nan,
            "forward_gain": z_rms / z_below if z_below else math.nan,
            **({} if l else {"x_rms": z_below}),
        }
        z_below = z_rms
        on: dict[str, Any] = {}
        if straight:
            on = {"next": at + len(names) + 1, "via": tuple(range(at + 1, at + 1 + len(names)))}
            own |= {"backward_gain": float(gains[l]), "weight_factor": float(theory.weight_factor[l])}
            own["slope_factor"] = float(theory.slope_factor[l])
        parents = (at - 1,) if at else ()
        layers.append(Layer(f"linear{l + 1}", 0, "linear", (batch, n_out), parents, fan_in=n_in, units=n_out, **on))
        rows.append(own)
        scale = (planned.branch or 1.0) if block else 1.0  # of what comes back into the branch
        for name in names:
            acts: dict[str, Any] = {}
            row: dict[str, float] = {}
            if name == rule.name:
                acts = {"activation": name, "largest_slope": rule.largest_slope, "r": rule.r}
                q = float(theory.length[l]) if norm is None else 1.0
                row = {
                    "a_saturated_fraction": meanfield.flat_share(rule, q, SATURATED * rule.largest_slope),
                    "slope_rms": float(theory.slope[l]),
                    "g_a_norm": scale * float(g_a[l]),
                }
            elif name == norm:  # what stands between slope and norm
                row = {"g_z_norm": scale * float(g_a[l] * theory.slope[l])}
            layers.append(Layer(f"{name}{l + 1}", 0, name, (batch, n_out), (len(layers) - 1,), **acts))
            rows.append(row)
    return layers, rows
