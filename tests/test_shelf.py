"""What waits on a shelf: copies, measured together, equal to what is measured at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import bpdiag
from bpdiag.hooks.reading import Reading
from bpdiag.hooks.shelf import ROOM, Held, Shelf


def ready(*kinds: tuple[torch.Tensor, object]) -> Shelf:
    """A shelf whose last sample had these."""
    shelf = Shelf()
    for x, what in kinds:
        assert shelf.hold(x, what) is None  # of the first sample nothing waits
    shelf.forget()
    return shelf


def read(table: dict) -> dict:
    Reading().read([table])
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 5, 2), (1, 7)])
def test_what_waits_has_the_norm_that_torch_finds(shape, dtype):
    tensors = [torch.randn(shape).to(dtype) * 10.0**-k for k in range(3)]
    shelf = ready(*((x, "g") for x in tensors))
    table = read({i: shelf.hold(x, "g") for i, x in enumerate(tensors)})
    assert table == {i: pytest.approx(x.double().norm().item(), rel=1e-13) for i, x in enumerate(tensors)}


def test_what_waits_is_a_copy():
    x = torch.tensor([[3.0, 4.0]])
    shelf = ready((x, "g"), (x, "g"))
    before = shelf.hold(x, "g")
    x.zero_()
    assert read({"before": before, "after": shelf.hold(x, "g")}) == {"before": 5.0, "after": 0.0}


def test_more_than_there_is_room_for_is_measured_at_once():
    x, small = torch.ones(1, 2**16), torch.ones(2, 2)
    shelf = ready(*((x, "g") for _ in range(ROOM // x.numel() + 1)), (small, "g"))
    assert shelf.hold(x, "g") is None  # not all of a kind: none of it
    assert isinstance(shelf.hold(small, "g"), Held)
    assert shelf.hold(small, "g") is None  # one more than last time
    assert shelf.hold(torch.ones(1, 2**16 + 1), "g") is None


@pytest.mark.parametrize(
    "strange", [torch.tensor(1.0), torch.ones(0, 3), torch.ones(2, 2).to_sparse(), torch.ones(2) * 1j]
)
def test_what_cannot_stand_in_a_row_is_measured_at_once(strange):
    shelf = ready((strange, "g"))
    assert shelf.hold(strange, "g") is None


def test_a_later_sample_says_what_the_first_said():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3), nn.Sigmoid())
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.0), torch.randn(5, 6)
    outputs = []
    for layer in model:
        layer.register_forward_hook(lambda _, __, out: outputs.append(out.detach().double().norm().item()))
    with bpdiag.watch(model, optimizer) as watching:
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for name in ("z_norm", "z_cosine", "a_norm", "a_saturated_fraction", "slope_rms", "g_z_norm", "g_a_norm", "x_norm"):
        values, there = watching.trace.column(name)
        assert there[0].any()
        for step in (1, 2):  # the first is measured at once, the second and the third wait
            assert (there[step] == there[0]).all()
            assert values[step][there[0]] == pytest.approx(values[0][there[0]], rel=1e-12)
    z, a = (watching.trace.column(name)[0][2] for name in ("z_norm", "a_norm"))
    assert [v if math.isnan(u) else u for u, v in zip(z, a, strict=True)] == pytest.approx(outputs[-6:], rel=1e-12)


def test_the_sample_that_is_not_finite_is_named_where_it_waited():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.0), torch.randn(6, 4)
    with bpdiag.watch(model, optimizer) as watching:
        for step in range(3):
            optimizer.zero_grad()
            x[3, 0] = torch.nan if step == 2 else 0.0
            model(x).sum().backward()
            optimizer.step()
    values, there = watching.trace.column("nonfinite_sample")
    assert not there[:2].any()
    assert values[2, 0] == 3
