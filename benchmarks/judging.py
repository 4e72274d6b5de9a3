"""How long judging takes: a stored trace of 50 layers and 1,000 sampled steps, without torch.

    python benchmarks/judging.py

Prints the median and the least of nine runs in milliseconds: of diagnose alone, and with the reading of the trace.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time

import numpy as np

from bpdiag.diagnosis import diagnose
from bpdiag.trace import COLUMNS, Layer, Sample, Trace

DEPTH, STEPS, REPEATS = 50, 1_000, 9


def trace() -> Trace:
    """A plain chain of linear layers and relus, every column filled, loss falling."""
    layers = []
    for n in range(DEPTH):
        at, last = len(layers), n == DEPTH - 1
        up = {} if last else {"next": at + 2, "via": (at + 1,)}
        layers.append(Layer(f"z{n}", 0, "linear", (64, 100), (at - 1,) if n else (), fan_in=100, units=100, **up))
        if not last:
            relu = {"activation": "relu", "largest_slope": 1.0, "r": math.sqrt(0.5), "window": 8}
            layers.append(Layer(f"a{n}", 0, "relu", (64, 100), (at,), **relu))
    draw = np.random.default_rng(0)
    samples = []
    for step in range(STEPS):
        rows = []
        for i, layer in enumerate(layers):
            own = ("z_", "W", "g_z", "g_W", "dW", "update") if layer.fan_in else ("a_", "g_a", "slope_rms")
            values = {c: float(draw.uniform(0.5, 1.5)) for c in COLUMNS if c.startswith(own)}
            if layer.fan_in:
                values |= {"decades": -0.01 * (DEPTH - i / 2), "backward_gain": 0.98, "weight_factor": 1.0,
                           "slope_factor": 0.98, "update_ratio": 1e-3, "z_cosine": 0.5, "forward_gain": 1.0,
                           "g_W_stale_norm": 0.0}  # fmt: skip
            else:
                values |= {"a_dead_fraction": 0.02, "a_saturated_fraction": 0.5}
            rows.append((0, i, values))
        samples.append(Sample(step, layers, rows, [(step, 2.3 * math.exp(-step / 1000))], 0.1))
    return Trace.build(layers, samples, {"planned_steps": STEPS, "optimizer": {"sgd_like": True, "lr": 0.1}})


def main() -> int:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        trace().save(folder)
        read, judge = [], []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            stored = Trace.load(folder)
            loaded = time.perf_counter()
            found = diagnose(stored)
            judge.append(1e3 * (time.perf_counter() - loaded))
            read.append(1e3 * (loaded - begun))
    for name, times in (("diagnose", judge), ("Trace.load", read)):
        print(f"{name:<12}median {statistics.median(times):6.1f} ms   least {min(times):6.1f} ms")
    print(f"{DEPTH} layers, {STEPS:,} sampled steps, {len(found)} findings, torch loaded: {'torch' in sys.modules}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
