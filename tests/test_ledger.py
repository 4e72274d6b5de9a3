"""The ledger of real nets sums to the gain that autograd itself measures, to 1e-12 in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from bpdiag import watch
from bpdiag.diagnosis import profile

torch.set_num_threads(1)

Z = torch.float64


def mlp(seed):
    """Random widths, depth, activations, with or without a norm."""
    draw = torch.Generator().manual_seed(seed)
    pick = lambda *these: these[int(torch.randint(len(these), (1,), generator=draw))]  # noqa: E731
    widths = [6, *(pick(5, 8, 13) for _ in range(pick(3, 5))), 4]
    layers = []
    for n, k in pairwise(widths):
        norm = pick(nn.Identity(), nn.LayerNorm(k), nn.BatchNorm1d(k))
        layers += [nn.Linear(n, k), norm, pick(nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.PReLU())]
    return nn.Sequential(*layers, nn.Linear(4, 3)), torch.randn(7, 6, dtype=Z)


def convolutions(seed):
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, groups=2), nn.SiLU(),
        nn.AvgPool2d(2), nn.ConvTranspose2d(6, 3, 2), nn.ELU(), nn.Flatten(), nn.Linear(3 * 3 * 3, 5),
    )  # fmt: skip
    return net, torch.randn(3, 2, 14, 14, dtype=Z)


class Residual(nn.Module):
    """x + f(x), written as a function, twice."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.inner = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for f in self.inner:
            x = x + f(x)
        return self.head(x)


class Attention(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.up, self.down, self.head = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.mix(y, y, y, need_weights=False)[0]
        return self.head(x + self.down(nn.functional.gelu(self.up(x))))


class Recurrent(nn.Module):
    """A cell through five steps, of two layers and a tanh."""

    def __init__(self):
        super().__init__()
        self.into, self.again, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = torch.zeros(len(x), 6, dtype=Z)
        for t in range(x.shape[1]):
            h = (self.into(x[:, t]) + self.again(h)).tanh()
        return self.head(h)


NETS = {
    **{f"mlp {seed}": (lambda seed=seed: mlp(seed)) for seed in range(8)},
    "convolutions": lambda: convolutions(0),
    "residual": lambda: (Residual(), torch.randn(7, 6, dtype=Z)),
    "attention": lambda: (Attention(), torch.randn(3, 5, 4, dtype=Z)),
    "cells through time": lambda: (Recurrent(), torch.randn(7, 5, 4, dtype=Z)),
}


def own_cotangents(model, x):
    """Name and call of each module -> ‖dL/dz‖, by ``torch.autograd.grad`` on what it gave out."""
    outs, handles = {}, []
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):

            def keep(m, args, out, name=name):
                number = sum(key[0] == name for key in outs)
                outs[name, number] = out[0] if isinstance(out, tuple) else out

            handles.append(module.register_forward_hook(keep))
    loss = model(x).square().mean()
    for handle in handles:
        handle.remove()
    found = torch.autograd.grad(loss, list(outs.values()), allow_unused=True)
    return {key: g.norm().item() for key, g in zip(outs, found, strict=True) if g is not None}


@pytest.mark.parametrize("name", NETS)
def test_the_owners_sum_to_the_gain(name):
    torch.manual_seed(0)
    model, x = NETS[name]()
    model.to(Z)
    own = own_cotangents(model, x)
    with watch(model) as watching:
        watching.loss(model(x).square().mean()).backward()
        watching.step()
    p = profile(watching.trace)
    known = 0
    for at, line in enumerate(p.lines):
        layer = p.trace.layers[line]
        if layer.next is None:
            assert math.isnan(p.gain[0, at])
            continue
        above = p.trace.layers[layer.next]
        gain = own[layer.name, layer.call] / own[above.name, above.call]
        assert p.gain[0, at] == pytest.approx(gain, rel=1e-12)
        total = sum(p.ledger[owner][0, at] for owner in p.ledger)
        np.testing.assert_allclose(total, math.log10(gain), rtol=0, atol=1e-12)
        known += 1
    assert known >= 2 if name != "attention" else known >= 1


def test_an_owner_left_out_is_noticed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3)).to(Z)
    with watch(model) as watching:
        watching.loss(model(torch.randn(7, 6, dtype=Z)).square().mean()).backward()
        watching.step()
    p = profile(watching.trace)
    for owner in ("weights", "slopes", "alignment"):
        rest = sum(p.ledger[other][0, 1] for other in p.ledger if other != owner)
        assert abs(rest - math.log10(p.gain[0, 1])) > 1e-3
