"""The lesson on one page: from the words of ``bpdiag chain`` to a chain, from a chain to text that teaches it.

Plain text of 100 columns.  Needs the standard library only: the command must start at once.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bpdiag.chain import SQUISHES, Chain, Values, descend
from bpdiag.config import RANGES, UsageError, nearest

MOST_LAYERS = MOST_STEPS = 1_000
MOST_SWEPT = 100_000  # layers times steps
AS_IN = "; write it as in bpdiag chain a0=1 w=2,3,0.5 y=2 steps=3"

HELP = f"""The chain rule with every factor named, on a chain of scalars.

  a0=1           the input
  w=2,3,0.5      the weights, one a layer; 1x100 is 1 a hundred times
  y=2            what the last layer should give out; C = (a - y)²
  squish=none    what every layer does to w · a: {", ".join(SQUISHES)}
  last=squish    squish, or linear: the last layer does nothing to it
  b=0,0,0        what else enters each layer; held fixed
  lr=0.01        learning rate
  steps=3        steps of gradient descent

  bpdiag chain w=1x100 squish=sigmoid
  bpdiag chain --run RUN --layer linear1    the same product, measured in a trained net
"""


# ---- words on a command line ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """What ``bpdiag chain`` was asked: a chain, and how many steps of which learning rate to take."""

    chain: Chain
    lr: float = 0.01
    steps: int = 3


def parse(words: Sequence[str]) -> Lesson:
    """``KEY=VALUE`` words as a lesson; what is not given is the lesson's own.

    Raises:
        UsageError: A key is unknown or given twice, a value is no such thing, or too much is asked; one line names it.

    Example:
        >>> parse(["w=1,0.5x3", "squish=tanh", "steps=0"]).chain.w
        (1.0, 0.5, 0.5, 0.5)
        >>> parse(["squihs=tanh"])
        Traceback (most recent call last):
        bpdiag.config.UsageError: squihs: unknown key; known: a0, y, w, b, squish, last, lr, steps; did ...
    """
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"{_cut(word)}: not KEY=VALUE{AS_IN}")
        if key not in READERS:
            raise UsageError(f"{_cut(key) or repr(key)}: unknown key; {nearest(key, READERS)}")
        if key in given:
            raise UsageError(f"{key}: given twice")
        given[key] = READERS[key](key, text)
    of_lesson = {key: given.pop(key) for key in ("lr", "steps") if key in given}
    lesson = Lesson(Chain(**given), **of_lesson)
    if lesson.steps * lesson.chain.depth > MOST_SWEPT:
        raise UsageError(
            f"steps={lesson.steps}: layers times steps may be {MOST_SWEPT:,} at most; "
            f"{lesson.chain.depth:,} layers can take {MOST_SWEPT // lesson.chain.depth:,} steps"
        )
    return lesson


def _cut(text: str) -> str:
    """A word short enough to be repeated in a message."""
    return text if len(text) <= 40 else f"{text[:40]}..."


def _word(key: str, text: str) -> str:
    return _cut(text)


def _number(key: str, text: str) -> float:
    try:
        if not text.isascii() or "_" in text:  # Python's own spellings of digits
            raise ValueError(text)
        value = float(text)
    except ValueError:
        raise UsageError(f"{key}: {_cut(text)!r} is not a number{AS_IN}") from None
    if not math.isfinite(value):
        raise UsageError(f"{key}: {_cut(text)!r} is not finite{AS_IN}")
    return value


def _numbers(key: str, text: str) -> tuple[float, ...]:
    """Numbers between commas, each perhaps with how many times it stands there."""
    told: list[float] = []
    for part in text.split(","):
        number, times, count = part.partition("x")
        value, many = _number(key, number), _whole(key, count, 1, math.inf) if times else 1
        if len(told) + many > MOST_LAYERS:
            raise UsageError(f"{key}: more than {MOST_LAYERS:,} layers")
        told += [value] * many
    return tuple(told)


def _whole(key: str, text: str, low: float, high: float) -> int:
    value = _number(key, text)
    if not low <= value <= high or value != int(value):
        span = f"from {low} to {high:,}" if math.isfinite(high) else f"of {low} or more"
        raise UsageError(f"{key}: {_cut(text)!r} is not a whole number {span}")
    return int(value)


def _rate(key: str, text: str) -> float:
    value, (low, high) = _number(key, text), RANGES["optimizer.lr"]
    if not low <= value <= high:
        raise UsageError(f"{key}={_cut(text)}: must be from {low:g} to {high:.10g}")
    return value


READERS: dict[str, Callable[[str, str], Any]] = {
    "a0": _number,
    "y": _number,
    "w": _numbers,
    "b": _numbers,
    "squish": _word,
    "last": _word,
    "lr": _rate,
    "steps": lambda key, text: _whole(key, text, 0, MOST_STEPS),
}


# ---- words on a page --------------------------------------------------------------------------------------

WIDTH = 100  # columns
MANY, MANY_STEPS, ENDS = 6, 12, 2  # layers, factors (steps) that are all shown; of more so many at either end
BAR, BARS = 40, 20  # cells of the widest bar; bars of a deep chain, about
NUDGE = 0.001  # of a weight, to see its derivative come true
Row = tuple[str, ...]


def render(lesson: Lesson) -> str:
    """Forwards, the factors, each weight's product, the sweep that shares them, the decades, what a step does."""
    chain, values = lesson.chain, lesson.chain.values()
    parts = [section(chain, values) for section in (_forwards, _factors, _products, _sweep, _decades)]
    parts.append(_descent(lesson))
    parts.append([line for remark in chain.remarks(values) for line in textwrap.wrap(remark, WIDTH)])
    return "\n\n".join("\n".join(part) for part in parts if part)


def to_data(lesson: Lesson) -> dict[str, Any]:
    """The same as numbers by name."""
    chain, values, (sweep, apart) = lesson.chain, lesson.chain.values(), lesson.chain.multiplications()
    steps = enumerate(descend(chain, lesson.lr, lesson.steps))
    return {
        "chain": dataclasses.asdict(chain),
        "forward": values.forward,
        "factors": values.factors,
        "backward": values.backward,
        "multiplications": {"sweep": sweep, "apart": apart},
        "decades": values.decades,
        "lr": lesson.lr,
        "steps": [
            {"step": i, "C": cost, "foretold": foretold, "w": c.w} for i, (c, cost, foretold) in steps
        ],  # foretold: of the step that follows
        "remarks": chain.remarks(values),
    }


def short(x: float, digits: int = 7) -> str:
    """A number to read: so many significant digits, no zeros behind them.

    Example:
        >>> short(3.0), short(-0.0064126851), short(1e-63), short(2.5e-7)
        ('3', '-0.006412685', '1e-63', '2.5e-7')
    """
    return f"{x + 0.0:.{digits}g}".replace("e-0", "e-").replace("e+0", "e+")


def bar(decades: float, deepest: float) -> str:
    """As long as what is lost (█) or gained (▒), BAR cells for ``deepest``.

    Example:
        >>> bar(-1.0, 8.0), bar(0.5, 4.0), bar(-math.inf, 1.0)
        ('█████', '▒▒▒▒▒', 'exactly 0')
    """
    if math.isnan(decades):
        return "not a number"
    if math.isinf(decades):
        return "exactly 0" if decades < 0 else "infinite"
    return ("█" if decades < 0 else "▒") * round(abs(decades) / deepest * BAR)


def bars(decades: Sequence[float]) -> list[str]:
    """A bar each, the longest full; under one decade it is not."""
    deepest = max((abs(d) for d in decades if math.isfinite(d)), default=0.0)
    return [bar(d, max(deepest, 1.0)) for d in decades]


def _inner(x: float) -> str:
    """A number within a formula: in brackets where it is negative."""
    return f"({short(x)})" if x < 0 else short(x)


def _times(numbers: Sequence[float]) -> str:
    return " · ".join([*map(short, numbers[:1]), *map(_inner, numbers[1:])])


def _some(things: Sequence[Any], many: int = MANY) -> list[Any]:
    """All, or of more than ``many`` the first and the last with None between."""
    return [*things] if len(things) <= many else [*things[:ENDS], None, *things[-ENDS:]]


def table(rows: Sequence[Row], right: bool = False) -> list[str]:
    """Cells one below the other; a row of one cell is left as it is, a column without a word is left out.

    ``right``: each cell at the right of its column, as numbers stand, two spaces apart.

    Example:
        >>> table([("step", "C"), ("...",), ("9", "0.25")], right=True)
        ['  step     C', '  ...', '     9  0.25']
    """
    whole = [row for row in rows if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    justify, gap = (str.rjust, "  ") if right else (str.ljust, " ")
    told = []
    for row in rows:
        cells = [justify(cell, n) for cell, n in zip(row, widths, strict=True) if n] if len(row) > 1 else row
        told.append(f"  {gap.join(cells)}".rstrip())
    return told


def _fitted(rows: Sequence[Row]) -> list[str]:
    """A table; where it is too wide for the page, each row on lines of its own, the numbers below the names."""
    told = table(rows)
    return told if _fits(told) else table([line for row in rows for line in _folded(row)])


def _fits(lines: Sequence[str]) -> bool:
    return max(map(len, lines)) <= WIDTH


def _folded(row: Row) -> list[Row]:
    if len(row) == 1:
        return [row]
    name, first, *others = filter(None, row)
    below = " " * (len(name) + 1)
    lines = textwrap.wrap(
        " ".join(others), WIDTH - 2, initial_indent=below, subsequent_indent=below, break_on_hyphens=False
    )
    return [(f"{name} {first}",), *((line,) for line in lines)]


def _each(
    things: Sequence[int], rows_of: Callable[[int], list[Row]], what: str = "layers", many: int = MANY
) -> list[Row]:
    """The rows of each layer (or step) that is shown."""
    told: list[Row] = []
    for thing in _some(things, many):
        told += [(f"... {len(things) - 2 * ENDS} {what} more ...",)] if thing is None else rows_of(thing)
    return told


def _upwards(chain: Chain) -> range:
    return range(1, chain.depth + 1)


def _downwards(chain: Chain) -> range:
    return range(chain.depth, 0, -1)


def _forwards(chain: Chain, values: Values) -> list[str]:
    v, top = values.forward, chain.depth

    def rows(layer: int) -> list[Row]:
        squish, x = chain.squish_of(layer), [chain.w[layer - 1], v[f"a{layer - 1}"]]
        symbols, numbers = f"w{layer} · a{layer - 1}", _times(x)
        if chain.b:
            symbols, numbers = f"{symbols} + b{layer}", f"{numbers} + {_inner(chain.b[layer - 1])}"
        if squish != "none":
            symbols, numbers = f"{squish}({symbols})", f"{squish}({numbers})"
        return [(f"a{layer}", f"= {symbols}", f"= {numbers}", f"= {short(v[f'a{layer}'])}")]

    cost = f"({short(v[f'a{top}'])} - {_inner(chain.y)})²"
    first, last = ("a0", "", "", f"= {short(chain.a0)}"), ("C", f"= (a{top} - y)²", f"= {cost}", f"= {short(v['C'])}")
    return [
        "Forwards: each layer takes what the one below gives out.",
        *_fitted([first, *_each(_upwards(chain), rows), last]),
    ]


def _factors(chain: Chain, values: Values) -> list[str]:
    f, v, top = values.factors, values.forward, chain.depth

    def row(name: str, symbols: str, numbers: str, whose: str) -> Row:
        return name, f"= {symbols}", numbers and f"= {numbers}", f"= {short(f[name])}", f"  {whose}"

    def rows(layer: int) -> list[Row]:
        slope, squish = f"da{layer}/dz{layer}", chain.squish_of(layer)
        told, names, numbers = [], "", []
        if squish != "none":
            told.append(row(slope, SQUISHES[squish].formula.format(l=layer), "", _sharers(layer)))
            names, numbers = f"{slope} · ", [f[slope]]
        for below, other, x, whose in (
            (f"a{layer - 1}", f"w{layer}", chain.w[layer - 1], _sharers(layer - 1)),
            (f"w{layer}", f"a{layer - 1}", v[f"a{layer - 1}"], f"w{layer} alone"),
        ):
            if below != "a0":
                told.append(row(f"da{layer}/d{below}", names + other, _times([*numbers, x]) if numbers else "", whose))
        return told

    first = row(f"dC/da{top}", f"2 · (a{top} - y)", f"2 · ({short(v[f'a{top}'])} - {_inner(chain.y)})", _sharers(top))
    heading = "Factors: how far each thing moves for a small move of the one below it; whose chains hold it."
    return [heading, *_fitted([first, *_each(_downwards(chain), rows)])]


def _sharers(highest: int) -> str:
    """Whose chains hold a factor: the weights from ``highest`` down."""
    if highest == 1:
        return "w1 alone"
    names = [f"w{layer}" for layer in range(highest, 0, -1)]
    return f"shared by {', '.join(names) if highest <= 3 else f'{names[0]} to w1'}"


def _products(chain: Chain, values: Values) -> list[str]:
    f, swept = values.factors, values.backward

    def rows(layer: int) -> list[Row]:
        names = _some(chain.path(layer))
        symbols = " · ".join(name or "..." for name in names)
        numbers = [_inner(f[name]) if name else "..." for name in names]
        numbers[0] = short(f[names[0]])
        return [(f"dC/dw{layer}", f"= {symbols}", f"= {' · '.join(numbers)}", f"= {short(swept[f'dC/dw{layer}'])}")]

    return [
        "Backwards: dC/dw is the product of the factors on the way from the cost down to that weight.",
        *_fitted(_each(_downwards(chain), rows)),
        *_tried(chain, values),
    ]


def _tried(chain: Chain, values: Values) -> list[str]:
    """A derivative come true: the cost, computed anew with w1 a little larger."""
    moved = dataclasses.replace(chain, w=(chain.w[0] + NUDGE, *chain.w[1:])).forward()["C"] - values.forward["C"]
    slope = values.backward["dC/dw1"]
    if not (math.isfinite(slope) and math.isfinite(moved)):
        return []
    return [f"  Try it: w1 + {NUDGE:g} moves C by {short(moved)}; {NUDGE:g} · dC/dw1 is {short(NUDGE * slope)}."]


def _sweep(chain: Chain, values: Values) -> list[str]:
    f, swept, top = values.factors, values.backward, chain.depth

    def row(name: str, carried: str, factor: str) -> Row:
        return name, f"= {carried} · {factor}", f"= {_times([swept[carried], f[factor]])}", f"= {short(swept[name])}"

    def rows(layer: int) -> list[Row]:
        told = [row(f"dC/dw{layer}", f"dC/da{layer}", f"da{layer}/dw{layer}")]
        if layer > 1:
            told.append(row(f"dC/da{layer - 1}", f"dC/da{layer}", f"da{layer}/da{layer - 1}"))
        return told

    first = (f"dC/da{top}", "", "", f"= {short(swept[f'dC/da{top}'])}")
    once, apart = chain.multiplications()
    plural = "s" if once > 1 else ""
    return [
        "Sweep: what is shared is multiplied once. dC/da is carried down, each weight takes it from there.",
        *_fitted([first, *_each(_downwards(chain), rows)]),
        f"  {once:,} multiplication{plural} of factors; each weight's product by itself would take {apart:,}.",
        "  With L layers 2 L - 1 against L (L + 1) / 2" + ("." if top >= 100 else ": at L = 100, 199 against 5,050."),
    ]


def _decades(chain: Chain, values: Values) -> list[str]:
    if chain.depth == 1:
        return []
    told, top = values.decades, chain.depth
    every = math.ceil(top / BARS)
    shown = [f"a{layer}" for layer in [*range(top, 1, -every), 1]]
    rows = [(a, f"{told[a] + 0.0:8.2f}", b) for a, b in zip(shown, bars([told[a] for a in shown]), strict=True)]
    return [
        f"Decades: log10 |dC/da / dC/da{top}|, the sum of the logs of the factors passed (█ lost, ▒ gained).",
        *table(rows),
    ]


def _descent(lesson: Lesson) -> list[str]:
    """C and the weights step by step: of the weights as many as fit."""
    if not lesson.steps:
        return []
    steps = [*descend(lesson.chain, lesson.lr, lesson.steps)]
    shown = [layer for layer in _some(_upwards(lesson.chain), MANY - 2) if layer]

    def rows(i: int) -> list[Row]:
        chain, cost, _ = steps[i]
        moves = (short(steps[i - 1].foretold), short(cost - steps[i - 1].cost)) if i else ("", "")
        return [(f"{i}", short(cost), *moves, *(short(chain.w[layer - 1]) for layer in shown))]

    def lines() -> list[str]:
        first = ("step", "C", "foretold", "came", *(f"w{layer}" for layer in shown))
        return table([first, *_each(range(len(steps)), rows, "steps", MANY_STEPS)], right=True)

    while not _fits(lines()):
        del shown[len(shown) // 2]
    told = lines()
    if math.isfinite(steps[0].cost) and not steps[-1].cost <= steps[0].cost:  # nan is no fall
        told.append("  C has grown: such steps leap across the valley; try a smaller lr.")
    rate = short(lesson.lr)
    heading = f"Steps: w becomes w - {rate} · dC/dw; the slopes foretell that C moves by -{rate} · Σ (dC/dw)²."
    return [*textwrap.wrap(heading, WIDTH), *told]
