"""Layers that torch does not know: which side of their weight is summed over."""

import pytest
import torch
from torch import nn

from bpdiag import watch

torch.set_num_threads(1)


class InOut(nn.Module):
    """x W with W (N_in, N_out), as some libraries keep it."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) / n_in**0.5)

    def forward(self, x):
        return x @ self.weight


class Positions(nn.Module):
    """A table, of which some rows are added."""

    def __init__(self, rows, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, width))

    def forward(self, x):
        return x + self.weight[: x.shape[1]]


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [(InOut(4, 7), 4), (InOut(5, 5), 5), (Positions(9, 4), None), (nn.Linear(4, 7), 4), (nn.Conv1d(3, 2, 1), 3)],
)
def test_the_fan_in_of_a_foreign_layer_is_what_it_sums_over(layer, fan_in):
    x = torch.randn(2, 3, 5 if isinstance(layer, InOut) and fan_in == 5 else 4)
    with watch(layer) as watching:
        layer(x).sum().backward()
        watching.step()
    assert [line.fan_in for line in watching.trace.layers] == [fan_in]
