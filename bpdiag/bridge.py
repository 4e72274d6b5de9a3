"""From the lesson to a trained net: dC/dW of a layer as the product of the factors that its trace measured.

    ‖dC/dW_l‖ = ‖dC/dz_L‖ · G_{L-1} · ... · G_l · ‖a_{l-1}‖ · agreement,   G_k = ‖dC/dz_k‖ / ‖dC/dz_{k+1}‖ = w s

The scalar chain's dC/da_L · da_L/da_{L-1} · ... · da_l/dw_l, in l2 norms over all elements, batch included.  A factor
is a matrix here; its gain is how it scales the one cotangent that came.  All but the last are measured.  With dC/dW =
sum over samples of dC/dz a^T, agreement = ‖dC/dW‖ / (‖dC/dz‖ ‖a‖) is what closes the product: by Cauchy and Schwarz at
most 1, which it is where all samples push the same way; about 1/sqrt(B) where B of them push in unrelated directions.
Where samples are equally large it is k/sqrt(B), k the coherence: k^2 = ‖dC/dW‖^2 / sum over b of ‖dC/dz_b‖^2 ‖a_b‖^2.

Needs no torch.
"""

from __future__ import annotations

import itertools
import math
import operator
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np

from bpdiag.config import UsageError, nearest
from bpdiag.lesson import WIDTH, bars, short, table
from bpdiag.trace import Trace

DIGITS = 4  # shown


@dataclass(frozen=True)
class Term:
    """One factor of the product."""

    kind: str  # cotangent, gain, input, agreement; input and agreement: both in one, where the input was not measured
    name: str
    value: float
    weights: float | None = None  # of a gain: w, where it was measured
    slopes: float | None = None  # of a gain: s, where it was measured


@dataclass(frozen=True)
class Product:
    """‖dC/dW‖ of one layer at one step, factor by factor from the cost down."""

    layer: str
    step: int
    terms: tuple[Term, ...]
    measured: float  # ‖dC/dW‖ as the optimizer met it
    samples: int  # rows that dC/dW sums over: samples, times positions where a layer has them
    overlap: bool  # rows that read the same places, as a convolution's windows do: their agreement has no simple chance
    notes: tuple[str, ...]  # what of the terms' meaning does not hold here

    @property
    def value(self) -> float:
        """The terms multiplied."""
        return math.prod(term.value for term in self.terms)


def weight_gradient(trace: Trace, name: str | None, step: int | None = None) -> Product:
    """‖dC/dW‖ of the layer ``name`` (or ``name#call``) at a sampled ``step``; None: the last with finite numbers.

    A gain of exactly 0 ends the product: nothing arrives below it.

    Raises:
        UsageError: No such weight layer, a step that was not sampled, a way up that forks, a number that is missing.
    """
    row = _row(trace, name)
    at = _sample(trace, row, step)
    way = _way(trace, row)
    top = trace.layers[way[-1]].title
    terms = [Term("cotangent", f"‖dC/dz‖ of {top}", _number(trace, "g_z_norm", way[-1], at))]
    for below in way[-2::-1]:
        if terms[-1].value == 0:
            break
        gain = _number(trace, "backward_gain", below, at)
        factors = (trace.value(column, below, at) for column in ("weight_factor", "slope_factor"))
        terms.append(Term("gain", f"gain of {trace.layers[below].title}", gain, *factors))
    measured = _number(trace, "g_W_norm", row, at)
    if terms[-1].value != 0:
        terms += _closing(trace, row, at, measured)
    return Product(
        layer=trace.layers[row].title,
        step=int(trace.sampled_steps[at]),
        terms=tuple(terms),
        measured=measured,
        samples=_samples(trace, row, at),
        overlap="conv" in trace.layers[row].kind,
        notes=_notes(trace, row, at, terms[-1]),
    )


def to_data(product: Product) -> dict[str, Any]:
    """The same as numbers by name."""
    return {**vars(product), "product": product.value}


def render(product: Product) -> str:
    """One line a factor with what is left of the product after it; what was measured, and what derived."""
    gains = [term.value for term in product.terms if term.kind == "gain"]
    decades = list(itertools.accumulate(map(_log, gains), initial=0.0))
    drawn = [f"{d + 0.0:8.2f} {b}" for d, b in zip(decades, bars(decades), strict=True)]
    left = itertools.accumulate((term.value for term in product.terms), operator.mul)
    rows = [("factor", "", "weights · slopes", "product so far", " decades lost █ or gained ▒")]
    drawn += [""] * (len(product.terms) - len(drawn))
    for term, so_far, beside in zip(product.terms, left, drawn, strict=True):
        split = ""
        if term.weights is not None and term.slopes is not None:
            split = f"= {_short(term.weights)} · {_short(term.slopes)}"
        sign = "  " if term.kind == "cotangent" else "· "
        rows.append((sign + term.name, _short(term.value), split, _short(so_far), beside))
    whole = f"{' · '.join(_short(term.value) for term in product.terms)} = {_short(product.value)}"
    return "\n".join(
        [
            f"‖dC/dW‖ of {product.layer} at step {product.step}: the chain rule in a trained net, factor by factor.",
            "",
            *table(rows),
            "",
            *_wrapped(f"‖dC/dW‖ = {whole}; as the optimizer met it: {_short(product.measured)}."),
            "",
            *(line for sentence in [*_meanings(product), *product.notes] for line in _wrapped(sentence)),
        ]
    )


def _meanings(product: Product) -> list[str]:
    """What is measured and what is derived."""
    told = product.samples and not product.overlap
    alike = f", about 1/√{product.samples:,} = {_short(product.samples**-0.5)} in unrelated ones" if told else ""
    return [
        "Measured, in l2 norms over the batch: every ‖dC/dz‖, the ‖a‖ that enters, ‖dC/dW‖. A gain is the ratio of "
        "two ‖dC/dz‖: what the weights above pass down, times what the activation (and all else between) lets through.",
        "Derived, to close the product: agreement = ‖dC/dW‖ / (‖dC/dz‖ · ‖a‖). dC/dW sums dC/dz aᵀ over the samples: "
        f"1 if all push in one direction{alike}, 0 if they cancel. Clipping and loss scales end up in it too.",
    ]


def _wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(sentence, WIDTH - 2, initial_indent="  ", subsequent_indent="  ")


def _short(x: float) -> str:
    return short(x, DIGITS)


def _log(gain: float) -> float:
    return math.log10(gain) if gain > 0 else -math.inf if gain == 0 else gain


def _closing(trace: Trace, row: int, at: int, measured: float) -> list[Term]:
    """What the layer read, and the agreement that is left; in one where what it read was not measured."""
    title, arrives = trace.layers[row].title, _number(trace, "g_z_norm", row, at)
    read = entering(trace, row, at)
    if read is None:
        return [Term("input and agreement", f"‖a‖ into {title} · agreement", measured / arrives)]
    told = [Term("input", f"‖a‖ into {title}", read)]
    return told if read == 0 else [*told, Term("agreement", "agreement", measured / (arrives * read))]


def entering(trace: Trace, row: int, at: int) -> float | None:
    """‖a_{l-1}‖, the norm of what the layer read: measured there, else of the watched output it read unchanged."""
    values, there = entered(trace, row)
    return float(values[at]) if there[at] else None


def entered(trace: Trace, row: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of every sampled step: (S,) numbers and whether they are there."""
    parents, (values, there) = trace.layers[row].parents, (x[:, row] for x in trace.column("x_norm"))
    for column in ("a_norm", "z_norm") if len(parents) == 1 else ():
        given, known = (x[:, parents[0]] for x in trace.column(column))
        values, there = np.where(there, values, given), there | known
    return values, there


def _samples(trace: Trace, row: int, at: int) -> int:
    """Outputs of the step over units; the layer table's shape is the first batch's, and a last one may be shorter."""
    layer, norm, rms = trace.layers[row], trace.value("z_norm", row, at), trace.value("z_rms", row, at)
    ratio = norm / rms if norm is not None and rms else math.nan
    outputs = round(ratio**2) if math.isfinite(ratio) else math.prod(layer.shape)
    return outputs // layer.units if layer.units else 0


def _row(trace: Trace, name: str | None) -> int:
    """The index of a weight layer by its name."""
    rows = {layer.short: i for i, layer in enumerate(trace.layers)}
    weights = [key for key, i in rows.items() if trace.layers[i].is_weight_layer]
    if name is None:
        raise UsageError(f"--layer NAME is missing; known: {', '.join(weights)}")
    row = rows.get(name.removesuffix("#0"))
    if row is None:
        raise UsageError(f"--layer {name}: no such layer; {nearest(name, weights)}")
    if not trace.layers[row].is_weight_layer:
        raise UsageError(f"--layer {name}: {trace.layers[row].kind} has no weight matrix; {nearest(name, weights)}")
    return row


def _sample(trace: Trace, row: int, step: int | None) -> int:
    """The number of a sampled step."""
    steps = [int(s) for s in trace.sampled_steps]
    if not steps:
        raise UsageError("nothing was measured")
    if step is None:
        norms = [trace.column(column)[0][:, row] for column in ("g_z_norm", "g_W_norm")]
        return next(
            (i for i in range(len(steps) - 1, -1, -1) if all(math.isfinite(n[i]) for n in norms)), len(steps) - 1
        )
    if step not in steps:
        near = sorted(sorted(steps, key=lambda s: abs(s - step))[:2])
        raise UsageError(
            f"--step {step}: not sampled; {len(steps)} steps were, {steps[0]} to {steps[-1]}; "
            f"nearest: {' and '.join(map(str, near))}"
        )
    return steps.index(step)


def _way(trace: Trace, row: int) -> list[int]:
    """The weight layers from ``row`` up to the last."""
    way = climb(trace, row)
    if is_read_by_weights(trace, way[-1]):
        top, whole = trace.layers[way[-1]], []
        for i in trace.weight_layers():
            if not is_read_by_weights(trace, climb(trace, i)[-1]):
                whole.append(trace.layers[i].short)
        why = _reason(trace, "backward_gain", way[-1]) or "the way up forks"
        raise UsageError(
            f"--layer {trace.layers[row].short}: no single product; {top.title}: {why}; known: {', '.join(whole)}"
        )
    return way


def climb(trace: Trace, row: int) -> list[int]:
    """As far up as gains are told."""
    way = [row]
    while (above := trace.layers[way[-1]].next) is not None:
        way.append(above)
    return way


def is_read_by_weights(trace: Trace, row: int) -> bool:
    """Whether a weight layer stands anywhere above."""
    above = {row}
    for i, layer in enumerate(trace.layers):  # in execution order, so that parents come first
        if above & set(layer.parents):
            if layer.is_weight_layer:
                return True
            above.add(i)
    return False


def _number(trace: Trace, column: str, row: int, at: int) -> float:
    value = trace.value(column, row, at)
    if value is None:
        step = int(trace.sampled_steps[at])
        why = _reason(trace, column, row, step) or "not measured"
        raise UsageError(f"{trace.layers[row].title}: no {column} at step {step}: {why}")
    return value


def _reason(trace: Trace, column: str, row: int, step: int | None = None) -> str:
    """Why a column is null for a layer; at any step, or at one."""
    layer = trace.layers[row]
    for gap in trace.missing:
        here = (gap.layer, gap.call, gap.column) == (layer.name, layer.call, column)
        if here and (step is None or gap.from_step <= step <= gap.to_step):
            return gap.reason
    return ""


def _notes(trace: Trace, row: int, at: int, last: Term) -> tuple[str, ...]:
    layer, told = trace.layers[row], []
    ended = last.value == 0
    if ended:
        told.append(f"{last.name} is exactly 0: nothing is left to multiply.")
    calls = sum(other.name == layer.name for other in trace.layers)
    if calls > 1:
        rest = "theirs is what was measured" if ended else "the last factor holds what the others add"
        told.append(f"W is shared by {calls} calls and dC/dW sums over them; {rest}.")
    here = trace.table["step"].to_numpy() == trace.sampled_steps[at]
    passes = 1 + int(trace.table["backward"].to_numpy()[here].max())
    if passes > 1:
        rest = "; what was measured came of the others" if ended else ""
        told.append(f"The step had {passes} forward passes: the factors are the first's, dC/dW sums over all{rest}.")
    if last.kind == "input and agreement":
        told.append("What entered was not measured as it entered: ‖a‖ and the agreement stand as one factor.")
    elif "conv" in layer.kind:
        told.append("The positions of a convolution read an input several times: its agreement may exceed 1.")
    return tuple(told)
