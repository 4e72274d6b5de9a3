"""What may be tried: one change of a training, how gentle it is, and which findings it is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bpdiag.diagnosis import Finding

# gentle first: what is only a slip of wiring, then numbers, then how weights begin, then what the network is made of
LEVELS = {
    "wiring": 0,
    "rate": 1,
    "initialization": 1,
    "optimizer": 2,
    "activation": 3,
    "normalization": 4,
    "residual": 5,
}
PACE = ("rate", "optimizer")  # how far a step goes; every other level is about what flows
WARM = 50  # steps of a warm-up: a quarter of a trial's 200
LONGEST = 1.0  # of a clipped gradient: Pascanu et al. 2013 name the idea, this length is what most recipes have
PLACES = ("model", "optimizer", "batch", "backward", "gradient", "step")  # in a training, in their order


@dataclass(frozen=True)
class Candidate:
    """One change: settings of a run of ours, or lines of Python by the place in a training where they stand.

    The lines are not a description: a trial executes them.  What is pasted is what was tried.
    """

    name: str
    level: str  # of LEVELS
    settings: Mapping[str, Any] = field(default_factory=dict)  # dotted key -> value
    code: Mapping[str, str] = field(default_factory=dict)  # one of PLACES -> its lines
    direction: int = 0  # of a change of the pace: -1 slower, +1 faster, 0 neither for sure

    @property
    def weight(self) -> int:
        """How much of a change it is: its level, of a pair the sum of both and one for being two.

        Example:
            >>> rate, norm = Candidate("a tenth of the rate", "rate"), Candidate("layer norm", "normalization")
            >>> rate.weight, norm.weight, pair(norm, rate).weight
            (1, 4, 6)
        """
        return sum(LEVELS[level] for level in self.level.split("+")) + self.level.count("+")

    @property
    def overrides(self) -> list[str]:
        """Hydra's words for the settings.

        Example:
            >>> Candidate("", "residual", {"model.branch_scale": "1/sqrt(blocks)", "optimizer.lr": 0.001}).overrides
            ["model.branch_scale='1/sqrt(blocks)'", 'optimizer.lr=0.001']
        """
        return [f"{key}={_word(value)}" for key, value in self.settings.items()]

    @property
    def change(self) -> str:
        """What to add to the command line, or to paste."""
        return " ".join(self.overrides) or "\n".join(
            f"{line}{WHERE[place] if n == 0 else ''}"
            for place in PLACES
            if place in self.code
            for n, line in enumerate(self.code[place].splitlines())
        )


WHERE = {
    "model": "",
    "optimizer": "  # after the optimizer is made",
    "batch": "  # before the forward pass",
    "backward": "  # before loss.backward()",
    "gradient": "  # between loss.backward() and optimizer.step()",
    "step": "  # after optimizer.step()",
}


def _word(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"'{text}'" if "(" in text else text


def pair(one: Candidate, other: Candidate) -> Candidate:
    """Both changes at once."""
    lines = {p: [c.code[p] for c in (one, other) if p in c.code] for p in PLACES}
    return Candidate(
        f"{one.name}, {other.name}",
        f"{one.level}+{other.level}",
        {**one.settings, **other.settings},
        {place: "\n".join(code) for place, code in lines.items() if code},
    )


def pairs(flow: Iterable[Candidate], pace: Sequence[Candidate]) -> list[Candidate]:
    """Every change of what flows with every change of the pace."""
    return [pair(one, other) for one in flow for other in pace]


def is_pace(candidate: Candidate) -> bool:
    """It changes how far a step goes, and nothing else."""
    return candidate.level in PACE


# ---- which findings ask for what ------------------------------------------------------------------------------

FLOW = ("initialization", "activation", "normalization", "residual")
# kind: groups of candidates, the likely ones first.  Rates and optimizers are tried for all of these: a rate that one
# net needs is ruin to another, and a depth that is mended often asks for another rate.
GROUPS: dict[str, tuple[str, ...]] = {
    "non_finite": (*FLOW, "input"),
    "disconnected": ("ownership",),
    "loss_interface": ("output",),
    "stale_gradient": ("clearing",),
    "update_too_small": ("precision",),
    "saturated": ("initialization", "input", "activation", "normalization"),
    "forward_scale": ("input", "initialization", "normalization", "residual"),
    "dead_units": ("activation", "initialization", "normalization"),
    "residual_mismatch": ("branch", "normalization"),
    "exploding": FLOW,
    "vanishing": FLOW,
    "update_too_large": FLOW,
    "over_regularized": ("decay", *FLOW),
    "linear_stack": ("activation",),
    "correlation_collapse": FLOW,
    "logits_saturated": ("input", "initialization", "normalization"),
    "input_scale": ("input", "normalization"),
    "symmetric_initialization": ("initialization",),
    "precision": ("precision", "input"),
    "dominating_layer": FLOW,
    "chance_level": FLOW,
    "targets": (),  # of the data, and of time: no change of a training mends them
    "data_order": (),
    "too_few_steps": (),
}
# cause of vanishing or exploding: the group to begin with
FIRST = {"slopes": "activation", "normalization": "residual", "depth": "residual", "alignment": "normalization"}


def groups(findings: Sequence[Finding]) -> list[str]:
    """Groups of candidates for these findings, in the order of trying; empty where no change of a training mends them.

    Example:
        >>> from bpdiag.diagnosis import Finding
        >>> told = dict(severity="harm", layers=(), onset_step=0, evidence={}, confidence=1, remedy="", expected="",
        ...             source="")
        >>> groups([Finding(kind="vanishing", cause="slopes", **told)])
        ['activation', 'initialization', 'normalization', 'residual']
        >>> groups([Finding(kind="targets", cause="unrelated", **told)])
        []
    """
    asked: list[str] = []
    for finding in findings:
        known = GROUPS.get(finding.kind, ())
        first = FIRST.get(finding.cause)
        asked += [first] if first in known else []
        asked += known
    return list(dict.fromkeys(asked))
