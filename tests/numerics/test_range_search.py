"""Range finders against sorting, loops and means written out in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_qat import TensorSpec, fake_quantize, quantize_tensor
from lightning_qat.numerics.grid import Grid
from lightning_qat.numerics.range_search import LpSearch, MeanAbs, Percentile
from lightning_qat.numerics.ranges import AbsMax, MinMax

SIGNED = Grid(qmin=-7, qmax=7, divisor=7)
UNSIGNED = Grid(qmin=0, qmax=15, divisor=15)
INTEGER = Grid(qmin=0, qmax=15, divisor=15, zero="integer")
FLOAT = Grid(qmin=0, qmax=15, divisor=15, zero="float")
GRIDS = {"signed": SIGNED, "unsigned": UNSIGNED, "integer": INTEGER, "float": FLOAT}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
FINDERS = [AbsMax(), MinMax(), MeanAbs(), Percentile(0.9), LpSearch(candidates=6), LpSearch(p=2.4, candidates=6)]
every_finder = pytest.mark.parametrize("finder", FINDERS, ids=str)


def rows(count: int = 60, columns: int = 50) -> Tensor:
    x = torch.randn(count, columns) * 10 ** torch.empty(count, 1).uniform_(-3, 2)
    x[::4] += x[::4].abs().amax(1, keepdim=True) * 1.5  # far from zero
    x[1::4, columns // 2] *= 30  # outliers
    return x


@every_grid
@pytest.mark.parametrize("share", [1.0, 0.999, 0.95, 0.9, 0.5, 0.01])
def test_percentile_against_sorting(grid: Grid, share: float) -> None:
    for columns in (1, 2, 7, 20, 50):
        x = rows(columns=columns)
        low, high = Percentile(share)(x, grid)
        values, left_out = x.numpy(), round((1 - share) * columns, 6)
        if grid.zero == "none":
            values = np.sort(np.abs(values) if grid.qmin < 0 else values, 1)
            top = values[:, columns - 1 - int(left_out)]
            bottom = -top if grid.qmin < 0 else None
        else:
            values = np.sort(values, 1)
            top, bottom = values[:, columns - 1 - int(left_out / 2)], values[:, int(left_out / 2)]
        if grid.zero != "float":
            top, bottom = np.maximum(top, 0), None if bottom is None else np.minimum(bottom, 0)
        assert np.array_equal(high[:, 0].numpy(), top), columns
        assert bottom is None or np.array_equal(low[:, 0].numpy(), bottom), columns


def numpy_error(x: np.ndarray, low: np.ndarray, high: np.ndarray, grid: Grid, p: float) -> np.ndarray:
    """Sum of |x - x_q|^p of each row, float32 until the sum."""
    f = np.float32
    scale = ((high / f(2) - low / f(2)) / f(grid.divisor / 2) if grid.zero != "none" else high / f(grid.divisor)).astype(f)
    safe = np.where(scale == 0, f(1), scale)
    if grid.zero == "float":
        values = np.clip(np.rint((x - low) / safe), grid.qmin, grid.qmax) * scale + low
    else:
        zero = np.clip(np.rint(-low / safe), grid.qmin, grid.qmax) if grid.zero == "integer" else f(0)
        values = (np.clip(np.rint(x / safe) + zero, grid.qmin, grid.qmax) - zero) * scale
    return (np.abs(values - x) ** f(p)).sum(1, keepdims=True, dtype=np.float64)


@pytest.mark.parametrize("p", [2.0, 2.4, 1.0])
@every_grid
def test_lp_search_is_the_best_of_a_loop(grid: Grid, p: float) -> None:
    x = rows()
    low, high = (t.numpy() for t in LpSearch(p=p, candidates=20, smallest=0.3)(x, grid))
    full_low, full_high = (t.numpy() for t in (MinMax() if grid.zero != "none" or grid.qmin == 0 else AbsMax())(x, grid))
    centre = (full_low + full_high) / np.float32(2) if grid.zero == "float" else np.zeros_like(full_low)
    shares = [1 - i * 0.7 / 19 for i in range(20)]
    tried = [(centre + (full_low - centre) * np.float32(s), centre + (full_high - centre) * np.float32(s)) for s in shares]
    errors = np.stack([numpy_error(x.numpy(), a, b, grid, p) for a, b in tried])
    mine = numpy_error(x.numpy(), low, high, grid, p)
    assert (mine <= errors.min(0) * (1 + 1e-5)).all()
    assert (mine <= errors[0] * (1 + 1e-6)).all()  # never worse than the full range
    first = errors.argmin(0)[:, 0]
    clear = np.sort(errors, 0)[1] > errors.min(0) * (1 + 1e-4)
    chosen = np.stack([b for _, b in tried])[first, np.arange(len(first))]
    assert clear.mean() > 0.5
    np.testing.assert_allclose(high[clear], chosen[clear], rtol=3e-7)


def test_the_first_of_equal_errors_is_kept() -> None:
    """A constant row on the grid has no error at the full range."""
    low, high = LpSearch(candidates=30)(torch.full((1, 9), 3.5), SIGNED)
    assert (low.item(), high.item()) == (-3.5, 3.5)


@pytest.mark.parametrize("finder", ["mse", "lp"])
def test_a_search_beats_the_extremes_where_there_are_outliers(finder: str) -> None:
    """On a grid of few bits one outlier makes all other steps too long."""
    x = torch.randn(200, 256)
    x[:, 0] = 12.0
    plain, searched = (fake_quantize(x, TensorSpec(bits=4, range_finder=name)) for name in ("absmax", finder))
    error = [(y - x).square().mean(1) for y in (plain, searched)]
    assert bool((error[1] <= error[0] * (1 + 1e-6)).all())
    assert float(error[1].mean() / error[0].mean()) < 0.8


def test_mean_abs_against_numpy() -> None:
    x = rows()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low, high = MeanAbs()(x.to(dtype), SIGNED)
        wanted = np.abs(x.to(dtype).double().numpy()).mean(1).astype(np.float32)
        np.testing.assert_allclose(high[:, 0].numpy(), wanted, rtol=1.2e-7)
        assert torch.equal(low, -high)


@every_grid
@every_finder
def test_ranges_are_columns_of_at_least_fp32(finder: object, grid: Grid) -> None:
    for dtype, wide in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        for low_or_high in finder(rows(5, 9).to(dtype), grid):
            assert (low_or_high.dtype, tuple(low_or_high.shape)) == (wide, (5, 1))
    deep_low, deep_high = finder(rows(6, 9).view(2, 3, 9), grid)
    assert deep_low.shape == deep_high.shape == (2, 3, 1)
    assert bool((deep_low <= deep_high).all())


@every_grid
@every_finder
def test_zeros_and_constants(finder: object, grid: Grid) -> None:
    x = torch.tensor([[0.0] * 8, [3.0] * 8, [-3.0] * 8])
    low, high = finder(x, grid)
    assert bool(low.isfinite().all() and high.isfinite().all())
    assert (low[0].item(), high[0].item()) == (0, 0)
    assert bool((low <= high).all())
    if grid is SIGNED and finder != MinMax():
        assert high[:, 0].tolist() == [0, 3, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@every_grid
@every_finder
def test_what_is_not_finite_shows_in_its_row_alone(finder: object, grid: Grid, bad: float) -> None:
    x = rows(4, 40)
    clean = finder(x, grid)
    x[2, 5] = bad
    found = finder(x, grid)
    keep = [0, 1, 3]
    assert all(torch.equal(a[keep], b[keep]) for a, b in zip(found, clean, strict=True))
    assert not (found[0][2].isfinite() & found[1][2].isfinite()).item()


@pytest.mark.parametrize("name", ["absmax", "percentile", "mse", "lp"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_a_row_that_is_not_finite_becomes_nan(name: str, symmetric: bool) -> None:
    spec = TensorSpec(bits=4, symmetric=symmetric, range_finder=name)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = rows(3, 20)
        x[1, 4] = bad
        assert fake_quantize(x, spec).isnan().all(1).tolist() == [False, True, False]
        with pytest.raises(ValueError, match="NaN or inf"):
            quantize_tensor(x, spec)


@pytest.mark.parametrize(
    ("options", "finder", "message"),
    [
        ({"percentile": 0}, "percentile", "options.percentile: got 0"),
        ({"percentile": 1.5}, "percentile", "options.percentile: got 1.5"),
        ({"p": 0}, "lp", "options: got p=0"),
        ({"candidates": 0}, "mse", "candidates=0"),
        ({"momentum": 1.0}, "absmax", "options.momentum: got 1.0"),
        ({"momentum": -0.1}, "absmax", "options.momentum: got -0.1"),
        ({"percentil": 0.9}, "absmax", "unknown key 'percentil'.*did you mean 'percentile'"),
    ],
    ids=str,
)
def test_settings_are_refused_by_name(options: dict, finder: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fake_quantize(torch.ones(3), TensorSpec(bits=4, range_finder=finder, options=options))
