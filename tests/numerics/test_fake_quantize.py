"""Fake quantization is the values of the codes, whatever the tensor looks like."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat import TensorSpec, fake_quantize, quantize_tensor
from lightning_qat.quantizers import build_quantizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FEW_SPECS = {
    "symmetric": TensorSpec(bits=4),
    "asymmetric": TensorSpec(bits=8, symmetric=False),
    "runtime": TensorSpec(bits=8, code_range="full", divisor="half_range", round_via="reciprocal"),
    "group": TensorSpec(bits=3, granularity="group", group_size=4, scale_dtype="float16"),
    "tensor": TensorSpec(bits=5, granularity="tensor"),
    "binary": TensorSpec(bits=1, quantizer="mean_abs"),
    "float-zero": TensorSpec(bits=4, symmetric=False, zero_point="float"),
    "last-axis": TensorSpec(bits=6, axis=-1, code_range="unsigned"),
    "mse": TensorSpec(bits=3, range_finder="mse", options={"candidates": 5, "ste": "mask"}),
    "percentile": TensorSpec(bits=4, symmetric=False, range_finder="percentile", options={"percentile": 0.9}),
    "four-level": TensorSpec(bits=2, quantizer="mean_abs", granularity="group", group_size=8),
}
few_specs = pytest.mark.parametrize("spec", FEW_SPECS.values(), ids=FEW_SPECS.keys())


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    """Any spec that a tensor of `tensors` can take; axes are counted from the end, so that one has to be there."""
    quantizer = draw(st.sampled_from(["minmax", "minmax", "minmax", "mean_abs"]))
    minmax = quantizer == "minmax"
    symmetric = not minmax or draw(st.booleans())
    granularity = draw(st.sampled_from(["tensor", "channel", "group", "token", "token_head"]))
    code_range = draw(st.sampled_from(["narrow", "full", "unsigned"])) if minmax and symmetric else "narrow"
    return TensorSpec(
        bits=draw(st.integers(1, 2) if not minmax else st.integers(2 if symmetric else 1, 8)),
        quantizer=quantizer,
        symmetric=symmetric,
        zero_point="integer" if symmetric else draw(st.sampled_from(["integer", "float"])),
        granularity=granularity,
        group_size=draw(st.sampled_from([1, 2, 3, 6])) if granularity == "group" else None,
        axis=draw(st.sampled_from([None, -1])) if granularity == "channel" else None,
        code_range=code_range,
        divisor=draw(st.sampled_from(["qmax", "half_range"])) if minmax and symmetric and code_range != "unsigned" else "qmax",
        range_finder=draw(st.sampled_from(["absmax", "absmax", "percentile", "mse", "lp"])) if minmax else "absmax",
        options={"percentile": 0.8, "candidates": 4, "ste": draw(st.sampled_from(["identity", "mask", "clip"]))} if minmax else None,
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
    columns, rows = x.shape[-1], x.numel() // x.shape[-1]
    blocks = columns if spec.axis == -1 else {"tensor": 1, "group": x.numel() // (spec.group_size or 1)}.get(spec.granularity, rows)
    assert quantized.scale.numel() == blocks
    assert spec.axis is not None or blocks == spec.scales_in(rows, columns)
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


@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0), (2, 0, 8), (2, 3, 0)], ids=str)
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


def test_autocast_and_inference_mode_change_nothing() -> None:
    x = torch.randn(8, 16)
    expected = fake_quantize(x, TensorSpec(bits=8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fake_quantize(x, TensorSpec(bits=8)), expected)
    with torch.inference_mode():
        assert torch.equal(fake_quantize(x, TensorSpec(bits=8)), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "via"),
    # Building the quantizer in the graph is another thing than calling it there: with one whose scale is an op it cannot be traced.
    [
        (name, via)
        for name in ("symmetric", "asymmetric", "group", "binary")
        for via in ("function", "module")
        if (name, via) != ("binary", "function")
    ],
)
def test_compiles_without_graph_breaks(name: str, via: str) -> None:
    spec = FEW_SPECS[name]
    call = build_quantizer(spec) if via == "module" else lambda x: fake_quantize(x, spec)
    x = torch.randn(6, 16, requires_grad=True)
    y = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert torch.equal(y, fake_quantize(x, spec))
    assert bool((x.grad == 1).all())
