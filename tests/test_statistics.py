"""Statistics: their declarations, their values beside float64 oracles, and the edges their docstrings name."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bpdiag.statistics import (
    LARGE,
    PART,
    STATISTICS,
    Statistic,
    by_sample,
    dense,
    histogram,
    largest_of_units,
    lengths,
    mean_cosine,
    norm,
    passing,
    rms,
    saturated_fraction,
    sum_of_units,
    update_ratio,
)

torch.set_num_threads(1)

INF, NAN = math.inf, math.nan
SCALES = [7.0, 2.0**-3]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def inputs(of: str, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """(the tensor a statistic measures, what else it needs): a batch of the kind that it declares."""
    x = torch.randn(32, 12, generator=rng, dtype=torch.float64)
    match of:
        case "any":
            return (x,)
        case "slope":
            return (torch.sigmoid(3 * x) * torch.sigmoid(-3 * x),)
        case "preactivation":
            return (x + 0.5,)
        case "update":
            return 1e-3 * x, torch.randn(32, 12, generator=rng, dtype=torch.float64)
    raise AssertionError(f"no input of kind {of!r}: add one here")


def check_degree(statistic: Statistic, t: float, rng: torch.Generator) -> None:
    x, *rest = inputs(statistic.of, rng)
    before, after = statistic.function(x, *rest), statistic.function(t * x, *rest)
    assert before.isfinite()
    assert before != 0
    assert after.item() == pytest.approx(t**statistic.degree * before.item(), rel=1e-12)


ORACLES = {
    "norm": lambda x: np.sqrt((x**2).sum()),
    "rms": lambda x: np.sqrt((x**2).mean()),
    "saturated_fraction": lambda s: (np.abs(s) < 0.05 * np.abs(s).max()).mean(),
    "mean_cosine": lambda z: np.mean(
        [a @ b / np.sqrt((a @ a) * (b @ b)) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
    ),
    "update_ratio": lambda u, w: np.sqrt((u**2).mean()) / np.sqrt((w**2).mean()),
}


def test_every_statistic_has_an_oracle():
    assert ORACLES.keys() == STATISTICS.keys()


@pytest.mark.parametrize("t", SCALES)
@pytest.mark.parametrize("name", STATISTICS)
def test_declared_degree(name, t, rng):
    check_degree(STATISTICS[name], t, rng)


@pytest.mark.parametrize("t", SCALES)
@pytest.mark.parametrize("name", STATISTICS)
def test_wrong_declaration_is_caught(name, t, rng):
    wrong = replace(STATISTICS[name], degree=STATISTICS[name].degree + 1)
    with pytest.raises(AssertionError):
        check_degree(wrong, t, rng)


@pytest.mark.parametrize("name", STATISTICS)
def test_value_shape_and_gradient(name, rng):
    statistic = STATISTICS[name]
    tensors = [x.clone().requires_grad_() for x in inputs(statistic.of, rng)]
    value = statistic.function(*tensors)
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert not value.requires_grad
    oracle = ORACLES[name](*[x.detach().numpy() for x in tensors])
    assert value.item() == pytest.approx(oracle, rel=1e-13)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", STATISTICS)
def test_every_dtype_and_stride(name, dtype, rng):
    function = STATISTICS[name].function
    wide = [x.to(dtype) for x in inputs(STATISTICS[name].of, rng)]
    strided = [torch.empty(12, 64, dtype=dtype).t()[::2].copy_(x) for x in wide]
    assert not strided[0].is_contiguous()
    value = function(*strided)
    assert value.dtype == torch.float64
    assert value.shape == ()
    exact = name != "mean_cosine" or dtype == torch.float64  # float32 rows suffice it
    oracle = ORACLES[name](*[x.double().numpy() for x in wide])
    assert value.item() == pytest.approx(oracle, rel=1e-12 if exact else 1e-5)


@pytest.mark.parametrize("name", STATISTICS)
def test_empty(name):
    empty = [torch.empty(0, 3)] * (2 if name == "update_ratio" else 1)
    value = STATISTICS[name].function(*empty)
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert value.item() == 0 if name == "norm" else value.isnan()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("function", [norm, rms])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, -0.0], 0.0),
        ([1.0, NAN], NAN),
        ([INF, NAN], NAN),
        ([1.0, -INF], INF),
        ([INF, 0.0], INF),
        ([0.0, NAN], NAN),
    ],
)
def test_zero_nan_and_infinity(function, values, expected, dtype):
    assert function(torch.tensor(values, dtype=dtype)).item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (6e-8, torch.float16),
        (60000.0, torch.float16),
        (1e-38, torch.bfloat16),
        (3e38, torch.bfloat16),
        (1e-30, torch.float32),
        (1e-23, torch.float32),
        (3e38, torch.float32),
        (1e-200, torch.float64),
        (1e-310, torch.float64),
        (1e300, torch.float64),
    ],
)
def test_squares_neither_vanish_nor_overflow(value, dtype):
    x = torch.full((3, 3), value, dtype=dtype)
    stored = x[0, 0].double().item()
    assert stored > 0
    assert norm(x).item() == pytest.approx(3 * stored, rel=1e-12)
    assert rms(x).item() == pytest.approx(stored, rel=1e-12)
    assert update_ratio(x / 4, x).item() == pytest.approx((x / 4)[0, 0].double().item() / stored, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_count_as_numbers(dtype):
    x = torch.tensor([[1, 0], [1, 1]]).to(dtype)
    assert norm(x).item() == pytest.approx(math.sqrt(3))
    assert rms(x).item() == pytest.approx(math.sqrt(3) / 2)


def test_complex_is_measured_by_its_moduli():
    x = torch.tensor([3 + 4j, 0j], dtype=torch.complex64)
    assert norm(x).item() == 5.0
    assert rms(x).item() == pytest.approx(5 / math.sqrt(2))
    assert saturated_fraction(x).item() == 0.5
    assert norm(x.to(torch.complex128) * 1e-200).item() == pytest.approx(5e-200)
    assert dense(x).tolist() == [5.0, 0.0]


@pytest.mark.parametrize("halves", [True, False], ids=["duplicates", "coalesced"])
def test_sparse(halves):
    first = ([1.0, 2.0], [0, 0], [1, 1]) if halves else ([3.0], [0], [1])  # one entry, perhaps stored in two parts
    values, rows, columns = (a + b for a, b in zip(first, ([-2.0, 6.0], [2, 3], [0, 2]), strict=True))
    x = torch.sparse_coo_tensor([rows, columns], values, (4, 3), check_invariants=True)
    assert norm(x).item() == pytest.approx(7.0)
    assert rms(x).item() == pytest.approx(rms(x.to_dense()).item())  # per element of the tensor, as its shape says
    assert update_ratio(x, torch.ones(4, 3)).item() == pytest.approx(7 / math.sqrt(12))
    assert norm(x.requires_grad_()).requires_grad is False


# ---- update ratio ------------------------------------------------------------------------------------


def test_update_ratio_at_zero_weights():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert update_ratio(one, zero).item() == INF
    assert update_ratio(zero, zero).isnan()
    assert update_ratio(zero, one).item() == 0


def test_update_ratio_of_different_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        update_ratio(torch.ones(2, 3), torch.ones(3, 2))


def test_first_adam_step():
    # 128 inputs, torch's default (weight variance 1/3), lr 1e-3: 1.96e-2
    weight = torch.empty(4096, 128).uniform_(-(128**-0.5), 128**-0.5, generator=torch.Generator().manual_seed(0))
    ratio = update_ratio(torch.full_like(weight, 1e-3), weight).item()
    assert ratio == pytest.approx(1e-3 * math.sqrt(128) / math.sqrt(1 / 3), rel=5e-3)
    assert ratio == pytest.approx(1.96e-2, rel=5e-3)


# ---- slopes ------------------------------------------------------------------------------------------


def test_saturated_fraction_of_rules():
    z = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    tanh, sigmoid = 1 - torch.tanh(z) ** 2, torch.sigmoid(z) * torch.sigmoid(-z)
    # tanh saturates beyond 2.178, sigmoid beyond 4.357, relu on half the line
    assert saturated_fraction(tanh, 1.0).item() == pytest.approx(1 - 2.178 / 8, abs=1e-4)
    assert saturated_fraction(sigmoid, 0.25).item() == pytest.approx(1 - 4.357 / 8, abs=1e-4)
    assert saturated_fraction((z > 0).double(), 1.0).item() == pytest.approx(0.5, abs=1e-4)


def test_saturated_fraction_takes_the_size_of_a_slope():
    slope = torch.tensor([-1.0, -0.06, 0.04, -0.04])
    assert saturated_fraction(slope, 1.0).item() == 0.5
    assert saturated_fraction(slope).item() == 0.5  # the largest element is 1 in size
    assert saturated_fraction(slope, 0.5).item() == 0.0


def test_nan_slopes_are_not_saturated():
    assert saturated_fraction(torch.tensor([NAN, 0.0, 0.0, 1.0]), 1.0).item() == 0.5


@pytest.mark.parametrize(
    ("shape", "unit_dim", "units"),
    [((5, 3), 1, 3), ((5, 3, 4, 4), 1, 3), ((5, 7, 3), -1, 3), ((5, 7, 3), 2, 3), ((3,), 0, 3), ((3,), -1, 3)],
)
def test_largest_slope_of_units(shape, unit_dim, units):
    slope = torch.zeros(shape)
    assert largest_of_units(slope, unit_dim).tolist() == [0] * units
    unit = slope.select(unit_dim, 1)
    unit[(-1,) * unit.dim()] = -1e-30  # one sample, one position
    largest = largest_of_units(slope.requires_grad_(), unit_dim)
    assert largest.tolist() == torch.tensor([0, 1e-30, 0]).tolist()
    assert not largest.requires_grad


@pytest.mark.parametrize("largest", [1.0, 0.25, 1.758])
@pytest.mark.parametrize("dtype", FLOATS)
def test_passing_is_the_rest_of_what_is_saturated(largest, dtype, rng):
    limit = torch.tensor(0.05 * largest, dtype=dtype)
    slope = torch.cat([torch.randn(999, generator=rng).to(dtype) * 0.1, limit[None], -limit[None], limit[None] * 0.9])
    ones = passing(slope, largest)
    assert ones.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert set(ones.tolist()) == {0.0, 1.0}
    assert ones[-1] == 0
    on_it = slope.element_size() >= 4 or limit.item() >= 0.05 * largest  # a narrow number is compared as it is
    assert ones[-3:-1].tolist() == [on_it, on_it]
    assert 1 - ones.double().mean().item() == pytest.approx(
        saturated_fraction(slope, largest).item(), abs=2e-3 if slope.element_size() >= 4 else 1e-2
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_lengths_are_the_norms_of_the_rows(dtype, size, rng):
    x = (torch.randn(5, 3, 4, generator=rng, dtype=torch.float64) * size).to(dtype)
    parts = lengths(by_sample(x))
    assert parts.tolist() == pytest.approx([norm(row).item() for row in x], rel=1e-12)
    assert norm(parts).item() == pytest.approx(norm(x).item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 700_000), (5_000, 300), (1, 1_500_000), (1_500_000,), (64, 8, 60, 60)])
def test_a_large_tensor_is_reduced_in_parts_to_the_same(shape, rng):
    x = torch.randn(shape, generator=rng) * 1e-25
    wide = x.double()
    assert x.numel() > PART
    assert norm(x).item() == pytest.approx(wide.square().sum().sqrt().item(), rel=1e-12)
    rows = by_sample(x)
    true = wide.reshape(rows.shape)
    torch.testing.assert_close(lengths(rows), true.square().sum(1).sqrt(), rtol=1e-12, atol=0)
    units = (true / true.square().sum(1, keepdim=True).sqrt()).sum(0)
    torch.testing.assert_close(sum_of_units(rows, lengths(rows)).double(), units, rtol=1e-4, atol=1e-6 * len(rows))


@pytest.mark.parametrize("columns", [4096 * 20, 28_561, 512])
def test_a_large_row_is_squared_in_float32_only_where_that_is_right(columns, rng):
    """Rows of every size, of nothing, of what is no number; the twin: float32's own squares."""
    sizes = torch.tensor([1.0, 1e-3, 1e12, 1e-14, 1e-25, 1e-40, 1e22, 1e37, 0.0]).unsqueeze(1)
    x = torch.randn(len(sizes), columns, generator=rng) * sizes
    x = torch.cat([x, x[:1].clone().fill_diagonal_(math.nan), x[:1].clone().fill_diagonal_(-math.inf)])
    x = torch.cat([x] * (LARGE // columns // len(x) + 1))
    assert x.numel() >= LARGE
    true = torch.linalg.vector_norm(x.double(), dim=1)
    torch.testing.assert_close(lengths(x), true, rtol=1e-6, atol=0, equal_nan=True)
    plain = torch.linalg.vector_norm(x, dim=1)
    assert plain[4] == 0 < true[4]
    assert plain[6] == math.inf > true[6]


# ---- cosine ------------------------------------------------------------------------------------------


def test_mean_cosine_of_angles():
    turn = torch.tensor([0.0, math.pi / 3, math.pi], dtype=torch.float64)
    z = torch.stack([turn.cos(), turn.sin()], 1) * torch.tensor([[1.0], [20.0], [3.0]])
    assert mean_cosine(z).item() == pytest.approx((0.5 - 1 - 0.5) / 3, abs=1e-12)


@pytest.mark.parametrize("z", [torch.zeros(()), torch.ones(1, 3), torch.tensor([[1.0, 0.0], [0.0, 0.0]])])
def test_mean_cosine_of_too_little(z):
    assert mean_cosine(z).isnan()
    assert mean_cosine(z).dtype == torch.float64


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_mean_cosine_not_finite(value):
    assert mean_cosine(torch.tensor([[1.0, 2.0], [value, 1.0], [1.0, 1.0]])).isnan()


def test_mean_cosine_flattens_a_sample(rng):
    z = torch.randn(6, 3, 4, 5, generator=rng)
    assert mean_cosine(z).item() == pytest.approx(mean_cosine(z.reshape(6, -1)).item(), rel=1e-6)
    assert mean_cosine(torch.tensor([[1, 0], [1, 1]])).item() == pytest.approx(0.5**0.5)  # integers too


def test_mean_cosine_sees_samples_that_are_nearly_alike(rng):
    z = 1 + 0.01 * torch.randn(16, 4096, generator=rng)
    oracle = ORACLES["mean_cosine"](z.double().numpy())
    assert 1 - mean_cosine(z).item() == pytest.approx(1 - oracle, rel=0.02)  # 1e-4


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1e-30, torch.float32), (1e30, torch.float32), (1e-200, torch.float64), (1e200, torch.float64)],
)
def test_mean_cosine_at_any_size(scale, dtype):
    """Degree 0 also where squares leave the format: neither is an exploding forward pass a net of c = -1/(B-1)."""
    z = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=dtype) * scale
    assert mean_cosine(z).item() == pytest.approx(0.5**0.5, rel=1e-6)


# ---- vmap: a stack of members -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [norm, rms, saturated_fraction, mean_cosine])
def test_vmap(function, dtype, rng):
    stack = torch.randn(4, 8, 5, generator=rng, dtype=dtype)
    together = torch.vmap(function)(stack)
    assert together.shape == (4,)
    torch.testing.assert_close(together, torch.stack([function(x) for x in stack]), rtol=1e-6, atol=0)


def test_vmap_update_ratio(rng):
    update, weight = torch.randn(2, 4, 8, 5, generator=rng)
    together = torch.vmap(update_ratio)(update, weight)
    torch.testing.assert_close(together, torch.stack([update_ratio(u, w) for u, w in zip(update, weight, strict=True)]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_histogram_is_numpys(dtype):
    x = (torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    low, high, strangers, *counts = histogram(x, bins=17).tolist()
    theirs, edges = np.histogram(x.double().numpy(), bins=17)
    assert (low, high, strangers) == (edges[0], edges[-1], 0)
    assert sum(counts) == 2000
    assert np.abs(np.array(counts) - theirs).sum() <= 2  # one on an edge may fall to either side


@pytest.mark.parametrize(
    ("elements", "told"),
    [
        ([1.0, math.nan, math.inf, 3.0], [1, 3, 2, 1, 1]),
        ([math.nan, math.inf], [0, 0, 2, 0, 0]),
        ([2.0, 2.0], [2, 2, 0, 2, 0]),
        ([], [0, 0, 0, 0, 0]),
        ([-1.7e308, 1.7e308], [-1.7e308, 1.7e308, 0, 1, 1]),
        ([5e-324, 0.0], [0, 5e-324, 0, 2, 0]),  # ends so near that their half is 0: one bin
    ],
    ids=["some not finite", "none finite", "all equal", "empty", "the ends of float64", "denormal"],
)
def test_a_histogram_survives(elements, told):
    assert histogram(torch.tensor(elements, dtype=torch.float64), bins=2).tolist() == told
