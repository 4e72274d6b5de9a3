"""Is a recommended remedy's promise kept, and is one found where there is one?

    python benchmarks/remedies.py              40 sick configurations; writes docs/remedies.md; half an hour on one core
    python benchmarks/remedies.py --count 5    fewer of the same; prints only

Each configuration is drawn at random, trained, and taken if the judge finds harm.  The search is the product's: as long
as the run took, no longer.  A promise is checked by plain training calls on three seeds that the search has not seen,
on the test digits.  Where nothing was found, every single change and every pair is tried for all its steps on the same
three seeds as the search's, until one works: the search should have found that one.

What is done is kept in a file of lines, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bpdiag import training
from bpdiag.config import Config, ModelConfig, OptimizerConfig, RemedyConfig
from bpdiag.diagnosis import Finding
from bpdiag.remedy import Cure, candidates, cure_run, exhaustive
from bpdiag.remedy.overrides import applied

ROOT = Path(__file__).parents[1]
UNSEEN = (1001, 1002, 1003)
PATIENCE = 3600.0  # seconds of the clock: what counts here is the processor's time, and the machine may be busy
SLACK = 0.05  # of the accuracy promised
ACTIVATIONS = ("relu", "tanh", "sigmoid", "gelu", "silu", "elu", "selu", "softsign", "leaky_relu", "softplus")


def drawn(number: int) -> Config:
    """Configuration number so-and-so; rates and variances are spread evenly over their logarithms."""
    draw = random.Random(number)
    sgd = draw.random() < 0.7
    low, high = (1e-3, 0.3) if sgd else (1e-4, 1e-2)
    return Config(
        model=ModelConfig(
            activation=draw.choice(ACTIVATIONS),
            depth=draw.randint(8, 40),
            weight_variance=f"{10 ** draw.uniform(math.log10(0.1), math.log10(4)):.3g}",
        ),
        optimizer=OptimizerConfig(
            name="sgd" if sgd else "adam", lr=float(f"{10 ** draw.uniform(math.log10(low), math.log10(high)):.2g}")
        ),
        remedy=RemedyConfig(seconds=PATIENCE),
        seed=number,
    )


def told(config: Config) -> str:
    """A configuration in a few words."""
    m, o = config.model, config.optimizer
    return f"{m.activation} {m.depth}, σ_w² {m.weight_variance}, {o.name} {o.lr:g}"


def settings_of(overrides: list[str]) -> dict[str, Any]:
    """Overrides as settings, each of the type that the key has."""
    from bpdiag.config import flat

    kinds = {key: type(value) for key, value in flat(Config()).items()}
    pairs = [word.split("=", 1) for word in overrides]
    return {key: kinds[key](value.strip("'")) for key, value in pairs}


def promise(config: Config, cure: Cure) -> list[float]:
    """Test accuracy on the unseen seeds of what was recommended."""
    best = cure.recommended
    assert best is not None
    mended = applied(config, {**settings_of(best.overrides), "training.steps": best.steps})
    return [training.train(applied(mended, {"seed": seed})).metrics["test_accuracy"] for seed in UNSEEN]


def one(number: int) -> dict[str, Any]:
    """One configuration, whole; without ``cure`` if it is not sick."""
    config = drawn(number)
    run = training.train(config)
    harm = [finding for finding in run.findings if finding.severity == "harm"]
    line: dict[str, Any] = {
        "number": number,
        "config": told(config),
        "seconds_run": run.metrics["processor_seconds_planned"],
    }
    if not harm:
        return {**line, "sick": False}
    start = time.process_time()
    cure = cure_run(config, run.trace, run.findings, run.metrics, no_dearer=True)
    line |= {
        "sick": True,
        "kinds": sorted({finding.kind for finding in harm}),
        "seconds_search": time.process_time() - start,
        "tried": len(cure.remedies),
        "notes": cure.notes,
    }
    best = cure.recommended
    if best is None:
        return {**line, "missed": _missed(config, run.findings)}
    got = promise(config, cure)
    return line | {
        "remedy": best.name,
        "overrides": best.overrides,
        "before": best.before["accuracy"],
        "promised": best.after["accuracy"],
        "got": got,
        "kept": min(got) >= best.after["accuracy"] - SLACK,
    }


def _missed(config: Config, findings: list[Finding]) -> str:
    """What the search should have found; empty where nothing works."""
    found = exhaustive(config, candidates(config, findings))
    return found.name if found is not None else ""


def page(lines: list[dict[str, Any]]) -> str:
    """docs/remedies.md."""
    sick = [line for line in lines if line["sick"]]
    found = [line for line in sick if "remedy" in line]
    kept = [line for line in found if line["kept"]]
    missed = [line for line in sick if line.get("missed")]
    seeds = [x >= line["promised"] - SLACK for line in found for x in line["got"]]
    cost = sorted(line["seconds_search"] / line["seconds_run"] for line in sick)
    there = len(found) + len(missed)
    rows = []
    for line in sick:
        kinds = ", ".join(line["kinds"])
        if "remedy" in line:
            got = ", ".join(f"{100 * x:.0f}" for x in line["got"])
            before = f"{100 * line['before']:.0f}" if line["before"] >= 0 else "not finite by then"
            end = (
                f"{line['remedy']} | {before} | {100 * line['promised']:.0f} | {got} | "
                f"{'yes' if line['kept'] else 'NO'}"
            )
        else:
            end = f"none found; {line['missed'] or 'nothing'} works |  |  |  | "
        rows.append(f"| {line['config']} | {kinds} | {end} |")
    return f"""# Remedies: are their promises kept?

Written by `python benchmarks/remedies.py`. {len(lines)} configurations were drawn (activation,
depth 8 to 40, weight variance 0.1 to 4, SGD with momentum 0.9 or Adam, rate; one epoch of 860 steps, width 128, batches
of 64); {len(sick)} of them are sick by the judge's word, and the rest are left out. The search had as much of the
processor's time as the run took, or, stopped early, would have taken. What is promised is the worst of three seeds, on
validation digits, after 200 steps; it is kept if three plain trainings on seeds that the search has not seen reach it
on the test digits, each of them, within {100 * SLACK:.0f} points.

| | |
|---|---|
| sick configurations | {len(sick)} |
| a remedy was recommended | {len(found)} |
| its promise was kept on all three unseen seeds | {_share(len(kept), len(found))} |
| seeds on which it was kept | {_share(sum(seeds), len(seeds))} |
| found, of those that have one among the candidates and their pairs | {_share(len(found), there)} |
| processor time of the search over that of the run, median and most | {cost[len(cost) // 2]:.2f}, {cost[-1]:.2f} |

Machine: {platform.processor() or platform.machine()}, one thread, torch {torch.__version__}.

| configuration | harm found | remedy | before % | promised % | unseen seeds % | kept |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / max(whole, 1):.0f} %)"


def main() -> None:
    """Go on with what is done, until there are so many sick ones."""
    parser = argparse.ArgumentParser(description="Are the promises of remedies kept?")
    parser.add_argument("--count", type=int, default=40, help="sick configurations")
    parser.add_argument("--state", default=Path(tempfile.gettempdir()) / "bpdiag-remedies.jsonl", type=Path)
    parser.add_argument("--write", action="store_true", help="docs/remedies.md also of fewer than 40")
    asked = parser.parse_args()
    lines = [json.loads(line) for line in asked.state.read_text().splitlines()] if asked.state.exists() else []
    while sum(line["sick"] for line in lines) < asked.count:
        lines.append(one(len(lines)))
        with asked.state.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        told = {k: v for k, v in lines[-1].items() if k not in ("number", "overrides")}
        print(len(lines), told, flush=True)
    text = page(lines)
    print(text)
    if asked.count >= 40 or asked.write:
        (ROOT / "docs" / "remedies.md").write_text(text)


if __name__ == "__main__":
    main()
