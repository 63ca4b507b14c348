"""The gradient of fake quantization is written out; here it is compared with autograd of the straight-through definition."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat import TensorSpec, fake_quantize
from lightning_qat.numerics.fake_quantize import fake_quantize_with
from lightning_qat.numerics.grid import Grid
from lightning_qat.numerics.ranges import AbsMax
from lightning_qat.numerics.rounding import Rounding

CLIP = {"ste": "clip"}
INTEGER = Grid(qmin=0, qmax=3, divisor=3, zero="integer")
GRIDS = {
    "signed": Grid(qmin=-4, qmax=3, divisor=3),
    "unsigned": Grid(qmin=0, qmax=7, divisor=7),
    "half-levels": Grid(qmin=-2, qmax=1, divisor=1, offset=0.5),
    "integer-zero": Grid(qmin=0, qmax=7, divisor=7, zero="integer"),
    "float-zero": Grid(qmin=0, qmax=7, divisor=7, zero="float"),
    "reciprocal": Grid(qmin=0, qmax=7, divisor=7, zero="integer", round_via="reciprocal"),
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def straight(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """(values, mask) in which only rounding is passed straight through; where a code is clamped it is a constant."""
    shift = zero if grid.zero == "float" else 0.0
    steps = (x - shift) / scale - grid.offset
    codes = (zero if grid.zero == "integer" else 0.0) + steps + (steps.round() - steps).detach()
    inside = (codes >= grid.qmin) & (codes <= grid.qmax)
    codes = torch.where(inside, codes, codes.detach().clamp(grid.qmin, grid.qmax))
    return (codes - (zero if grid.zero == "integer" else 0.0) + grid.offset) * scale + shift, inside


def leaves(grid: Grid, rows: int = 40, columns: int = 12) -> list[Tensor]:
    """x, scale and zero point in float64; half of each row lies outside the grid."""
    x = torch.randn(rows, columns, dtype=torch.float64) * 2
    scale = torch.rand(rows, 1, dtype=torch.float64) * 0.4 + 0.1
    zero = torch.randint(0, 8, (rows, 1)).double() if grid.zero == "integer" else torch.randn(rows, 1, dtype=torch.float64) - 1
    return [t.requires_grad_() for t in ((x, scale) if grid.zero == "none" else (x, scale, zero))]


@pytest.mark.parametrize("ste", ["identity", "mask", "clip"])
@every_grid
def test_every_gradient_is_that_of_the_definition(grid: Grid, ste: str) -> None:
    given_leaves = leaves(grid)
    x, scale, zero = (*given_leaves, None)[:3]
    upstream = torch.randn_like(x)
    y = fake_quantize_with(x, scale, zero, Rounding(grid=grid, ste=ste, clip_value=1.5))
    ours = torch.autograd.grad(y, given_leaves, upstream)
    values, inside = straight(x, scale, zero, grid)
    expected = list(torch.autograd.grad(values, given_leaves, upstream))
    torch.testing.assert_close(expected[0], upstream * inside)  # the definition is a mask by itself
    expected[0] = {"identity": upstream, "mask": upstream * inside, "clip": upstream * (x.abs() < 1.5)}[ste]
    assert 0.1 < inside.double().mean() < 0.95
    torch.testing.assert_close(y, values, rtol=1e-12, atol=1e-12)
    for mine, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)
        assert mine.shape == wanted.shape
    assert torch.equal(ours[0], expected[0])


@every_grid
def test_only_what_asks_gets_a_gradient(grid: Grid) -> None:
    for asks in range(len(leaves(grid))):
        given_leaves = [t.detach().requires_grad_(i == asks) for i, t in enumerate(leaves(grid))]
        x, scale, zero = (*given_leaves, None)[:3]
        fake_quantize_with(x, scale, zero, Rounding(grid=grid, ste="mask")).sum().backward()
        values, _ = straight(x, scale, zero, grid)
        (wanted,) = torch.autograd.grad(values.sum(), [given_leaves[asks]])
        assert [t.grad is not None for t in given_leaves] == [i == asks for i in range(len(given_leaves))]
        torch.testing.assert_close(given_leaves[asks].grad, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_grid
def test_gradients_of_scales_are_float32_whatever_the_dtype_of_the_values(grid: Grid, dtype: torch.dtype) -> None:
    x, *rest = (t.detach() for t in leaves(grid))
    x = x.to(dtype).requires_grad_()
    scale, zero = (*(t.float().requires_grad_() for t in rest), None)[:2]
    y = fake_quantize_with(x, scale, zero, Rounding(grid=grid, ste="mask"))
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert (y.dtype, x.grad.dtype, scale.grad.dtype) == (dtype, dtype, torch.float32)
    wide = [x.detach().float().requires_grad_(), *(t.detach().requires_grad_() for t in (scale, zero) if t is not None)]
    values, _ = straight(wide[0], wide[1], (*wide, None)[2], grid)
    if grid.round_via == "divide":
        wanted = torch.autograd.grad(values, wide, upstream.float())
        torch.testing.assert_close(scale.grad, wanted[1], rtol=1e-4, atol=1e-4)
        assert zero is None or torch.allclose(zero.grad, wanted[2], rtol=1e-4, atol=1e-4)


def vector(values: list[float], scale: float, zero: float | None, how: Rounding) -> tuple[Tensor, ...]:
    """(y, gradient of w, of the scale, of the zero point) of one row with an upstream gradient of ones, float64."""
    w, s = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (values, [scale]))
    z = None if zero is None else torch.tensor([[zero]], dtype=torch.float64, requires_grad=True)
    y = fake_quantize_with(w, s, z, how)
    y.sum().backward()
    return y.detach(), w.grad, s.grad, None if z is None else z.grad


def terms(values: list[float], scale: float, zero: float | None, how: Rounding, which: int) -> list[float]:
    """The gradient of the scale (2) or the zero point (3), element by element."""
    return [vector([v], scale, zero, how)[which].item() for v in values]


def test_vector_everything_inside() -> None:
    """EfficientQAT: codes 0, 1, 1, 3. Autograd of a clamp after rounding gives 0 or 1 at codes 0 and 3, by the version of torch."""
    w, args = [-0.5, -0.15, 0.1, 0.7], (0.4, 1.0, Rounding(grid=INTEGER, ste="mask"))
    y, gw, gs, gz = vector(w, *args)
    assert y[0].tolist() == pytest.approx([-0.4, 0, 0, 0.8])
    assert gw.tolist() == [[1, 1, 1, 1]]
    assert terms(w, *args, which=2) == pytest.approx([0.25, 0.375, -0.25, 0.25])
    assert gs.item() == pytest.approx(0.625)
    assert gz.item() == 0


def test_vector_ends_outside() -> None:
    w, args = [-0.9, -0.15, 0.1, 1.5], (0.4, 1.0, Rounding(grid=INTEGER, ste="mask"))
    y, gw, gs, gz = vector(w, *args)
    assert y[0].tolist() == pytest.approx([-0.4, 0, 0, 0.8])
    assert gw.tolist() == [[0, 1, 1, 0]]
    assert gs.item() == pytest.approx(1.125)
    assert terms(w, *args, which=3) == pytest.approx([-0.4, 0, 0, -0.4])
    assert gz.item() == pytest.approx(-0.8)
    identity = vector(w, 0.4, 1.0, Rounding(grid=INTEGER))
    assert identity[1].tolist() == [[1, 1, 1, 1]]
    assert (identity[2].item(), identity[3].item()) == (gs.item(), gz.item())


def test_vector_quantizing_again_changes_nothing() -> None:
    for w in ([-0.5, -0.15, 0.1, 0.7], [-0.9, -0.15, 0.1, 1.5]):
        y = vector(w, 0.4, 1.0, Rounding(grid=INTEGER, ste="mask"))[0]
        assert torch.equal(vector(y[0].tolist(), 0.4, 1.0, Rounding(grid=INTEGER, ste="mask"))[0], y)


def test_vector_learned_step_size() -> None:
    v, args = [-3, -0.7, 0.2, 0.55, 1.2, 5], (0.5, None, Rounding(grid=GRIDS["signed"], ste="mask"))
    y, gv, gs, _ = vector(v, *args)
    assert y.tolist() == [[-2, -0.5, 0, 0.5, 1, 1.5]]
    assert gv.tolist() == [[0, 1, 1, 1, 1, 0]]
    assert terms(v, *args, which=2) == pytest.approx([-4, 0.4, -0.4, -0.1, -0.4, 3])
    assert gs.item() == pytest.approx(-1.5)


@settings(deadline=None, max_examples=150)
@given(x=st.floats(-50, 50), scale=st.floats(0.01, 5), code=st.integers(0, 7), name=st.sampled_from(list(GRIDS)))
def test_values_are_homogeneous_so_their_gradients_add_up_to_them(x: float, scale: float, code: int, name: str) -> None:
    """Euler: x dy/dx + s dy/ds = y, and with a float zero point + z dy/dz, element by element; an integer one has degree 0."""
    grid = GRIDS[name]
    zero = None if grid.zero == "none" else float(code) if grid.zero == "integer" else code * 0.3 - 1
    y, gx, gs, gz = vector([x], scale, zero, Rounding(grid=grid, ste="mask"))
    total = x * gx + scale * gs + (zero * gz if grid.zero == "float" else 0)
    torch.testing.assert_close(total, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("code", [-4, 3])
def test_the_mask_includes_what_rounds_onto_the_last_code(code: int) -> None:
    """Half a step outside still rounds to the bound (to even at -4.5, away at 3.5): whether the code was clamped decides."""
    side = 1 if code > 0 else -1
    x = [code, code + 0.49 * side, code + 0.5 * side, code + 0.51 * side]
    gradient = vector([float(v) for v in x], 1.0, None, Rounding(grid=GRIDS["signed"], ste="mask"))[1]
    assert gradient.tolist() == [[1, 1, float(code == -4), 0]]


def test_a_range_found_on_the_way_has_the_gradient_of_x_only() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    how = Rounding(grid=replace(GRIDS["signed"], qmin=-3), finder=AbsMax())
    y = fake_quantize_with(x, None, None, how)
    scale = x.detach().abs().amax(1, keepdim=True) / 3
    assert torch.equal(y, fake_quantize_with(x, scale, None, how))
    y.sum().backward()
    assert bool((x.grad == 1).all())


@pytest.mark.parametrize("finder", ["percentile", "mse"])
@pytest.mark.parametrize("ste", ["identity", "mask"])
def test_a_closer_range_clips_and_only_the_mask_shows_it(finder: str, ste: str) -> None:
    spec = TensorSpec(bits=4, range_finder=finder, options={"ste": ste, "percentile": 0.9})
    x = torch.randn(4, 100)
    x[:, 7] = 40.0
    x.requires_grad_()
    y = fake_quantize(x, spec)
    y.sum().backward()
    assert bool((y[:, 7] < 20).all()) == (finder == "percentile")
    clamped = x.grad == 0
    assert bool(clamped.any()) == (ste == "mask" and bool((y[:, 7] < 39).any()))
    assert ste == "identity" or bool((clamped <= (x.detach().abs() > y.detach().abs())).all())
