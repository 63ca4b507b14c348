"""Fake quantization is the values of the codes, and its gradient is written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat import TensorSpec, fake_quantize, quantize_tensor
from lightning_qat.numerics.fake_quantize import fake_quantize_with, straight_through
from lightning_qat.numerics.grid import Grid
from lightning_qat.quantizers import build_quantizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CLIP = {"ste": "clip"}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FEW_SPECS = {
    "symmetric": TensorSpec(bits=4),
    "asymmetric": TensorSpec(bits=8, symmetric=False),
    "runtime": TensorSpec(bits=8, code_range="full", divisor="half_range", round_via="reciprocal"),
    "group": TensorSpec(bits=3, granularity="group", group_size=4, scale_dtype="float16"),
    "tensor": TensorSpec(bits=5, granularity="tensor"),
    "binary": TensorSpec(bits=1, quantizer="mean_abs"),
    "four-level": TensorSpec(bits=2, quantizer="mean_abs", granularity="group", group_size=8),
}
few_specs = pytest.mark.parametrize("spec", FEW_SPECS.values(), ids=FEW_SPECS.keys())


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    quantizer = draw(st.sampled_from(["minmax", "minmax", "minmax", "mean_abs"]))
    symmetric = quantizer == "mean_abs" or draw(st.booleans())
    signed = quantizer == "minmax" and symmetric
    granularity = draw(st.sampled_from(["tensor", "channel", "group", "token", "token_head"]))
    return TensorSpec(
        bits=draw(st.integers(1, 2) if quantizer == "mean_abs" else st.integers(2 if symmetric else 1, 8)),
        quantizer=quantizer,
        symmetric=symmetric,
        granularity=granularity,
        group_size=draw(st.sampled_from([1, 2, 3, 6])) if granularity == "group" else None,
        code_range=draw(st.sampled_from(["narrow", "full"])) if signed else "narrow",
        divisor=draw(st.sampled_from(["qmax", "half_range"])) if signed else "qmax",
        scale_dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        round_via=draw(st.sampled_from(["divide", "reciprocal"])),
    )


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Last axis a multiple of 6; random numbers of any size, zeros, ties and repeated values."""
    shape = (*draw(st.lists(st.integers(1, 3), max_size=3)), 6 * draw(st.integers(1, 2)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-4, 3))
    flat = x.view(-1)
    for value in draw(st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.5, 7.0, -7.0, 127.5]), max_size=6)):
        flat[draw(st.integers(0, flat.numel() - 1))] = value
    return x.to(draw(st.sampled_from(DTYPES)))


@settings(deadline=None, max_examples=200)
@given(x=tensors(), spec=specs())
def test_fake_quantize_is_the_values_of_the_codes(x: Tensor, spec: TensorSpec) -> None:
    before, y, quantized = x.clone(), fake_quantize(x, spec), quantize_tensor(x, spec)
    assert torch.equal(y, quantized.dequantize())
    assert (y.dtype, y.shape, quantized.codes.shape) == (x.dtype, x.shape, x.shape)
    assert quantized.grid.qmin <= int(quantized.codes.min())
    assert int(quantized.codes.max()) <= quantized.grid.qmax
    blocks = {"tensor": 1, "group": x.numel() // (spec.group_size or 1)}.get(spec.granularity, x.numel() // x.shape[-1])
    assert quantized.scale.numel() == blocks == spec.scales_in(x.numel() // x.shape[-1], x.shape[-1])
    assert torch.equal(x, before)


@every_dtype
@few_specs
def test_the_same_over_a_thousand_seeds(spec: TensorSpec, dtype: torch.dtype) -> None:
    x = torch.stack([torch.randn(24, generator=torch.Generator().manual_seed(seed)) for seed in range(1000)]).to(dtype)
    assert torch.equal(fake_quantize(x, spec), quantize_tensor(x, spec).dequantize())


@few_specs
def test_memory_layout_does_not_matter(spec: TensorSpec) -> None:
    x = torch.randn(24, 16)
    views = {
        "transposed": x.t(),
        "strided": torch.randn(16, 48)[:, ::2],
        "expanded rows": x[:1].expand(5, 16),
        "expanded columns": x[:, :1].expand(24, 16),
        "permuted": torch.randn(8, 3, 16).permute(2, 1, 0),
    }
    for name, view in views.items():
        y = fake_quantize(view, spec)
        assert y.shape == view.shape, name
        assert torch.equal(y, quantize_tensor(view, spec).dequantize()), name
        contiguous = fake_quantize(view.clone(memory_format=torch.contiguous_format), spec)
        # A mean is summed in the order of the memory, so it may differ by an ulp; a largest value may not.
        tolerance = 0 if spec.quantizer == "minmax" else 1e-6
        torch.testing.assert_close(y, contiguous, rtol=tolerance, atol=0, msg=name)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0), (2, 0, 8)], ids=str)
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    for name, spec in FEW_SPECS.items():
        x = torch.empty(shape)
        assert fake_quantize(x, spec).shape == shape, name
        quantized = quantize_tensor(x, spec)
        assert quantized.codes.shape == quantized.dequantize().shape == shape, name


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_single_elements(shape: tuple[int, ...]) -> None:
    for spec in (TensorSpec(bits=4), TensorSpec(bits=4, symmetric=False), TensorSpec(bits=4, granularity="tensor")):
        x = torch.full(shape, -0.3)
        y = fake_quantize(x, spec)
        torch.testing.assert_close(y, x)
        assert torch.equal(y, quantize_tensor(x, spec).dequantize())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_only_floating_point_tensors(dtype: torch.dtype) -> None:
    for spec in (TensorSpec(bits=4), TensorSpec(bits=4, symmetric=False), TensorSpec(bits=2, quantizer="mean_abs")):
        with pytest.raises(TypeError, match="expected a floating-point tensor"):
            fake_quantize(torch.ones(4, dtype=dtype), spec)


def test_off() -> None:
    x = torch.randn(3)
    assert fake_quantize(x, TensorSpec(bits=None)) is x
    with pytest.raises(ValueError, match="this spec is off"):
        quantize_tensor(x, TensorSpec(bits=16))


# The ends of each row's range sit exactly on the first and last code; +-2 are the bounds of the clipped estimator.
ON_GRID = [[1.5, -1.5, 0.75, 0.0, 0.1, -0.2], [2.0, -2.0, 1.999, 2.001, -3.0, 0.5]]


@pytest.mark.parametrize("spec", [s for s in FEW_SPECS.values() if s.granularity == "channel"], ids=lambda s: f"{s.quantizer}{s.bits}")
def test_the_identity_estimator_passes_every_gradient(spec: TensorSpec) -> None:
    x = torch.tensor(ON_GRID, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 6, dtype=torch.float64)
    fake_quantize(x, spec).backward(upstream)
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bound", [2.0, 0.75], ids=str)
def test_the_clipped_estimator_masks_inclusively(symmetric: bool, bound: float) -> None:
    spec = TensorSpec(bits=4, symmetric=symmetric, options=CLIP | {"clip_value": bound})
    x = torch.tensor(ON_GRID, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 6, dtype=torch.float64)
    fake_quantize(x, spec).backward(upstream)
    mask = [[float(-bound < value < bound) for value in row] for row in ON_GRID]
    assert torch.equal(x.grad, upstream * torch.tensor(mask, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_codes_on_the_bounds_of_the_grid_keep_their_gradient(dtype: torch.dtype) -> None:
    """Autograd of a clamp after rounding gives 0 or 1 here, depending on the version of torch; two of four codes would stop learning."""
    w = torch.tensor([[-0.5, -0.15, 0.1, 0.7]], dtype=dtype, requires_grad=True)
    scale, zero_point = torch.tensor([[0.4]], dtype=dtype), torch.tensor([[1.0]], dtype=dtype)
    y = fake_quantize_with(w, scale, zero_point, Grid(qmin=0, qmax=3))
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([[-0.4, 0.0, 0.0, 0.8]], dtype=dtype))
    assert w.grad.tolist() == [[1, 1, 1, 1]]


@few_specs
def test_gradient_keeps_dtype_and_layout(spec: TensorSpec) -> None:
    x = torch.randn(16, 8, dtype=torch.bfloat16, requires_grad=True)
    fake_quantize(x.t(), spec).sum().backward()
    assert (x.grad.dtype, x.grad.shape) == (torch.bfloat16, x.shape)
    assert bool((x.grad == 1).all())


def test_identity_saves_nothing_and_the_mask_is_one_byte_an_element() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    for options, expected in ((None, []), (CLIP, [(torch.bool, (4, 8))])):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: kept.append(t) or t, lambda t: t):
            fake_quantize(x, TensorSpec(bits=4, options=options))
        assert [(t.dtype, tuple(t.shape)) for t in saved] == expected


def test_straight_through_has_the_values_of_one_and_the_gradient_of_the_other() -> None:
    x, values = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    upstream = torch.randn(3)
    y = straight_through(x, values)
    y.backward(upstream)
    assert torch.equal(y, values)
    assert torch.equal(x.grad, upstream)
    assert values.grad is None


def test_autocast_and_inference_mode_change_nothing() -> None:
    x = torch.randn(8, 16)
    expected = fake_quantize(x, TensorSpec(bits=8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fake_quantize(x, TensorSpec(bits=8)), expected)
    with torch.inference_mode():
        assert torch.equal(fake_quantize(x, TensorSpec(bits=8)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("via", ["function", "module"])
@pytest.mark.parametrize("name", ["symmetric", "asymmetric", "group", "binary"])
def test_compiles_without_graph_breaks(name: str, via: str) -> None:
    spec = FEW_SPECS[name]
    call = build_quantizer(spec) if via == "module" else lambda x: fake_quantize(x, spec)
    x = torch.randn(6, 16, requires_grad=True)
    y = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert torch.equal(y, fake_quantize(x, spec))
    assert bool((x.grad == 1).all())
