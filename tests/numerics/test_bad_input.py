"""Input that is empty, constant, tiny, huge, not finite, oddly laid out or of the wrong type: defined and finite, or refused by name."""

import pytest
import torch
from grids import DTYPES, FAMILIES, bits_of
from torch import Tensor

from lightning_qat import TensorSpec, fake_quantize, quantize_tensor
from lightning_qat.numerics.blocks import Blocking

every_family = pytest.mark.parametrize("family", FAMILIES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def specs(family: str, **fields: object) -> list[TensorSpec]:
    return [TensorSpec(bits=bits, **FAMILIES[family], **fields) for bits in bits_of(family)]


def checked(x: Tensor, spec: TensorSpec) -> Tensor:
    """The values, which are finite, of the dtype and shape of `x`, and those of the codes."""
    y = fake_quantize(x, spec)
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device), spec
    assert y.isfinite().all(), spec
    assert torch.equal(y, quantize_tensor(x, spec).dequantize()), spec
    return y


@pytest.mark.parametrize("size", [5, 7, 13])
def test_a_group_size_that_does_not_divide(size: int) -> None:
    spec = TensorSpec(bits=4, granularity="group", group_size=size)
    for call in (fake_quantize, quantize_tensor):
        with pytest.raises(ValueError, match=f"group_size: got {size} for a last axis of 12"):
            call(torch.ones(3, 12), spec)


@pytest.mark.parametrize("axis", [2, -3, 7])
def test_an_axis_that_is_not_there(axis: int) -> None:
    for call in (fake_quantize, quantize_tensor):
        with pytest.raises(ValueError, match=rf"axis: got {axis} for a tensor of shape \(3, 12\)"):
            call(torch.ones(3, 12), TensorSpec(bits=4, axis=axis))


def test_a_tensor_without_axes_has_one_scale() -> None:
    for family in FAMILIES:
        for fields in ({}, {"granularity": "token"}, {"granularity": "tensor"}):
            for spec in specs(family, **fields):
                y = checked(torch.tensor(0.3), spec)
                assert torch.equal(y, checked(torch.tensor([0.3]), spec)[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axis": 0}, r"axis: got 0 for a tensor of shape \(\)"),
        ({"axis": -1}, r"axis: got -1 for a tensor of shape \(\)"),
        ({"granularity": "group", "group_size": 1}, "group_size: got 1 for a last axis of no length"),
    ],
    ids=str,
)
def test_a_tensor_without_axes_has_no_groups(fields: dict, message: str) -> None:
    for call in (fake_quantize, quantize_tensor):
        with pytest.raises(ValueError, match=message):
            call(torch.tensor(0.3), TensorSpec(bits=4, **fields))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("fields", [{}, {"axis": 0}, {"granularity": "group", "group_size": 4}, {"granularity": "tensor"}], ids=str)
def test_tensors_without_elements(fields: dict, shape: tuple[int, ...]) -> None:
    for family in FAMILIES:
        x = torch.empty(shape, requires_grad=True)
        spec = specs(family, **fields)[-1]
        checked(x.detach(), spec)
        fake_quantize(x, spec).sum().backward()
        assert x.grad.shape == shape


@every_dtype
@every_family
def test_zeros_and_constants(family: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0] * 6, [2.5] * 6, [-2.5] * 6, [1e-3, 0, 0, 0, 0, 0]]).to(dtype)
    for fields in ({}, {"granularity": "group", "group_size": 3}, {"axis": 0}):
        for spec in specs(family, **fields):
            y = checked(x, spec)
            assert y[0].count_nonzero() == 0, spec
            rounded = spec.divisor == "half_range" or family == "mean_abs"  # 2.5 is half a step from the nearest level, or on it
            step = quantize_tensor(x, spec).scale.reshape(4, -1)[1, 0].item() if rounded else 0.0
            assert bool(((y[1] - 2.5).abs().double() <= step * 0.5 + 0.01).all()), spec
            wanted = 0.0 if family == "unsigned" else -2.5
            assert bool(((y[2] - wanted).abs().double() <= step * 0.5 + 0.01).all()), spec
    assert all(checked(torch.zeros(4, 6, dtype=dtype), spec).count_nonzero() == 0 for spec in specs(family, granularity="tensor"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@every_family
def test_what_is_not_finite_stays_in_its_block(family: str, bad: float) -> None:
    """Never a wrong number: the block that holds it is NaN, the others know nothing of it, and codes are refused."""
    blocks = {"rows": {}, "groups": {"granularity": "group", "group_size": 4}, "axis": {"axis": 1}, "tensor": {"granularity": "tensor"}}
    for name, fields in blocks.items():
        spec = specs(family, **fields)[-1]
        x = torch.randn(5, 8)
        clean = fake_quantize(x, spec)
        x[2, 5] = bad
        y, wanted = fake_quantize(x, spec), torch.zeros(5, 8, dtype=torch.bool)
        block = {"rows": (2, slice(None)), "groups": (2, slice(4, 8)), "axis": (slice(None), 5), "tensor": (slice(None), slice(None))}
        wanted[block[name]] = True
        assert torch.equal(y.isnan(), wanted), spec
        assert torch.equal(y[~wanted], clean[~wanted]), spec
        with pytest.raises(ValueError, match="NaN or inf"):
            quantize_tensor(x, spec)


@every_family
def test_float16_rows_of_tiny_range(family: str) -> None:
    """Subnormal halves: their scales are far below the smallest half, which must not matter unless scales are stored as halves."""
    x = torch.tensor([[6e-8, -6e-8, 0, 1.2e-7], [1e-6, -2e-6, 5e-7, 0], [1e-4, 1e-5, -1e-4, 2e-5]]).half()
    for spec in specs(family):
        y = checked(x, spec)
        step = quantize_tensor(x, spec).scale.unsqueeze(-1)
        inside = x >= 0 if family == "unsigned" else torch.ones_like(x, dtype=torch.bool)
        if family not in ("mean_abs", "narrow-half", "full-half", "float-zero", "integer-zero"):
            assert bool(((y.float() - x.float()).abs() <= step * 0.5 + 3e-8)[inside].all()), spec
    for spec in specs(family, scale_dtype="float16"):
        assert bool((checked(x, spec).abs() <= 2 * x.abs().amax(1, keepdim=True) + 6e-8).all()), spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_family
def test_the_ends_of_the_number_line(family: str, dtype: torch.dtype) -> None:
    """Half a step is the largest error, also where the ends of the range are the largest floats."""
    if (family, dtype) == ("mean_abs", torch.float64):
        pytest.skip("a sum of the largest doubles has no wider type to be taken in")
    top = torch.finfo(dtype).max
    x = torch.tensor([[1, -1, 0, 0.5], [1, 0, 0.25, 0.5], [-1, 0, -0.25, -0.5], [1, 1, 1, 1]], dtype=torch.float64).mul(top).to(dtype)
    if family == "float-zero" and dtype != torch.float16:
        assert all(fake_quantize(x, spec)[0].isnan().all() for spec in specs(family))  # wider than the largest float
        x = x[1:]
    for spec in specs(family):
        y = checked(x, spec)
        if family in ("narrow", "full", "integer-zero", "float-zero"):
            span = (x.double().amax(1, keepdim=True) / 2 - x.double().amin(1, keepdim=True) / 2) if family.endswith("zero") else top
            steps = (2.0**spec.bits - 1) / 2 if family.endswith("zero") else 2.0 ** (spec.bits - 1) - 1
            bound = (span / steps / 2) * (2 if family == "integer-zero" else 1)  # the rounded zero point moves the grid by half a step
            wrong = (y.double() / 2 - x.double() / 2).abs() > bound * 0.51 + torch.finfo(dtype).eps * x.double().abs() / 2
            assert not wrong.any(), (spec, x[wrong].tolist(), y[wrong].tolist())
    small = torch.finfo(dtype).tiny
    for scale in (small, small / 4, torch.finfo(dtype).smallest_normal * 3):
        for spec in specs(family):
            checked((torch.tensor([[1, -1, 0.5, 0.0]], dtype=torch.float64) * scale).to(dtype), spec)


@pytest.mark.parametrize("bits", [0, -1, 9, 15, 31, 2.5, "4"], ids=repr)
def test_bits_outside_the_range(bits: object) -> None:
    with pytest.raises(ValueError, match=r"TensorSpec\.bits: got"):
        fake_quantize(torch.ones(3), TensorSpec(bits=bits))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_tensors_that_are_not_floating_point(dtype: torch.dtype) -> None:
    for family in FAMILIES:
        for fields in ({}, {"granularity": "tensor"}):
            for call in (fake_quantize, quantize_tensor):
                with pytest.raises(TypeError, match=f"got a tensor of {dtype}, expected a floating-point tensor"):
                    call(torch.ones(2, 4, dtype=dtype), specs(family, **fields)[-1])


@every_family
def test_layouts(family: str) -> None:
    base = torch.randn(6, 8, 12)
    views = {
        "transposed": base.transpose(0, 2),
        "strided": torch.randn(6, 24)[:, ::2],
        "expanded": torch.randn(1, 12).expand(7, 12),
        "expanded-last": torch.randn(7, 1).expand(7, 12),
        "flipped-storage": base.permute(2, 1, 0)[3:, :, :4],
        "channels-last": torch.randn(2, 4, 3, 4).to(memory_format=torch.channels_last),
    }
    for fields in ({}, {"granularity": "group", "group_size": 2}, {"axis": 0}, {"axis": 1}, {"granularity": "tensor"}):
        spec = specs(family, **fields)[-1]
        for name, view in views.items():
            y = checked(view, spec) if view.shape[-1] % 2 == 0 else view
            copied = view.clone(memory_format=torch.contiguous_format)
            tolerance = 1e-6 if family == "mean_abs" else 0
            if view.shape[-1] % 2 == 0:
                torch.testing.assert_close(y, fake_quantize(copied, spec), rtol=tolerance, atol=0, msg=name)


def test_an_expanded_leaf_gets_its_gradient() -> None:
    x = torch.randn(1, 12, requires_grad=True)
    fake_quantize(x.expand(7, 12), TensorSpec(bits=4)).sum().backward()
    assert x.grad.tolist() == [[7.0] * 12]


@every_dtype
@every_family
def test_meta_tensors_keep_shape_and_dtype(family: str, dtype: torch.dtype) -> None:
    for fields in ({}, {"granularity": "group", "group_size": 4}, {"axis": 1}, {"granularity": "tensor"}):
        x = torch.empty(3, 8, dtype=dtype, device="meta", requires_grad=True)
        y = fake_quantize(x, specs(family, **fields)[-1])
        assert (y.shape, y.dtype, y.is_meta) == (x.shape, dtype, True)
        y.sum().backward()
        assert x.grad.is_meta
        with pytest.raises(ValueError, match="meta device"):
            quantize_tensor(x, specs(family, **fields)[-1])


@pytest.mark.parametrize(
    ("blocking", "blocks"),
    [
        (Blocking(), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (Blocking(share="group", size=2), [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
        (Blocking(share="axis", axis=0), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (Blocking(share="axis", axis=1), [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (Blocking(share="axis", axis=-1), [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (Blocking(share="all"), [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
    ids=str,
)
def test_blocks_by_hand_and_back(blocking: Blocking, blocks: list) -> None:
    x = torch.arange(8.0).view(2, 4)
    assert blocking.split(x).tolist() == blocks
    assert torch.equal(blocking.join(blocking.split(x), x.shape), x)
    assert torch.equal(blocking.join(blocking.rows(x), x.shape), x)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2])
def test_blocks_of_an_axis_of_many(axis: int) -> None:
    x, blocking = torch.randn(2, 3, 4, 5), Blocking(share="axis", axis=axis)
    blocks = blocking.split(x)
    assert all(torch.equal(blocks[i], x.select(axis, i).flatten()) for i in range(x.shape[axis]))
    assert torch.equal(blocking.join(blocks, x.shape), x)
