"""The activation grids of runtimes, by their own formulas and, where it is installed, by their own code.

compressed-tensors    arithmetic="input", code_range="full", divisor="half_range": the same bits in bf16, fp16 and fp32
torchao, int8 asymmetric per token    symmetric=False: the same bits in fp32; in half precision it computes in other steps
vLLM, int8 per token    the default grid; it multiplies by 127 / amax, which differs in a few ties
llama.cpp, blocks of 32 (Q8_0) and 256 (Q8_K)    group grids; scale_rounding="after": in C and
    NEON the same bits, on x86 all but a few ties
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_qat import QuantScheme, TensorSpec, fake_quantize, insert_quantizers, quantize_tensor
from lightning_qat.numerics.backends import choice, compiled
from lightning_qat.numerics.grid import Grid
from lightning_qat.quantizers import build_quantizer
from lightning_qat.quantizers.running_range import merge_ranges

Oracle = Callable[[Tensor, int], Tensor]
HALVES = (torch.bfloat16, torch.float16)
CT = {"granularity": "token", "code_range": "full", "divisor": "half_range", "arithmetic": "input"}
Q8_0 = TensorSpec(bits=8, granularity="group", group_size=32, scale_dtype="float16", round_via="reciprocal", scale_rounding="after")


def in_its_own_dtype(x: Tensor, bits: int) -> Tensor:
    """Every step in the dtype of `x`, as compressed-tensors computes."""
    scale = x.abs().amax(-1, keepdim=True) / torch.tensor((2**bits - 1) / 2, dtype=x.dtype)
    scale[scale == 0] = torch.finfo(x.dtype).eps
    return torch.round(x / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def by_compressed_tensors(x: Tensor, bits: int, strategy: str = "token", **settings: int) -> Tensor:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = quantization.QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy=strategy, dynamic=True, **settings)
    return forward.fake_quantize(x, *forward.compute_dynamic_scales_and_zp(x, args, nn.Module()), args)


def tokens(seed: int, dtype: torch.dtype, shape: tuple[int, ...] = (2, 5, 64), decades: tuple[int, int] = (-6, 3)) -> Tensor:
    """Tokens of very different size, one of zeros, one with ties."""
    generator = torch.Generator().manual_seed(seed)
    low, high = decades
    x = torch.randn(shape, generator=generator) * 10 ** (torch.rand(*shape[:-1], 1, generator=generator) * (high - low) + low)
    x[0, 0] = 0
    x[-1, -1] = torch.linspace(-8, 8, shape[-1]).round()
    return x.to(dtype)


@pytest.mark.parametrize("oracle", [in_its_own_dtype, by_compressed_tensors])
@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 2, st.integers(1, 130)),
    dtype=st.sampled_from([*HALVES, torch.float32]),
    bits=st.sampled_from([2, 3, 4, 6, 8]),
    seed=st.integers(0, 2**31),
)
def test_tokens_of_compressed_tensors(oracle: Oracle, shape: tuple[int, int, int], dtype: torch.dtype, bits: int, seed: int) -> None:
    x = tokens(seed, dtype, shape)
    assert torch.equal(fake_quantize(x, TensorSpec(bits=bits, **CT)), oracle(x, bits))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("strategy", "fields"), [("tensor", {}), ("group", {"group_size": 16})])
def test_tensors_and_groups_of_compressed_tensors(strategy: str, fields: dict[str, int], dtype: torch.dtype) -> None:
    for seed in range(10):
        x = tokens(seed, dtype)
        spec = TensorSpec(bits=8, **(CT | {"granularity": strategy} | fields))
        assert torch.equal(fake_quantize(x, spec), by_compressed_tensors(x, 8, strategy, **fields))


def test_half_precision_arithmetic_is_another_grid() -> None:
    """What the field is for: with fp32 arithmetic about a tenth of the codes are others."""
    for dtype in HALVES:
        x = tokens(0, dtype, (1, 64, 512), (-1, 2))
        one, other = (quantize_tensor(x, TensorSpec(bits=8, **(CT | {"arithmetic": kind}))) for kind in ("input", "float32"))
        differing = float((one.codes != other.codes).float().mean())
        assert (0.07 if dtype == torch.bfloat16 else 0.005) < differing < 0.12
        assert torch.equal(one.scale.to(dtype).float(), one.scale)


@pytest.mark.parametrize("x", [torch.randn(3, 40), torch.randn(3, 40, dtype=torch.float64)], ids=["fp32", "fp64"])
def test_wider_tensors_see_no_difference(x: Tensor) -> None:
    for scale_dtype in ("float32", "float16"):
        one, other = (quantize_tensor(x, TensorSpec(bits=8, scale_dtype=scale_dtype, arithmetic=kind)) for kind in ("input", "float32"))
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("via", ["divide", "reciprocal"])
def test_every_step_is_rounded(via: str, scale_dtype: str, dtype: torch.dtype) -> None:
    """First the scale to the type it is stored in, then everything to the dtype of the tensor."""
    x = tokens(1, dtype, (2, 5, 300), (-1, 2))
    scale = (x.float().abs().amax(-1, keepdim=True) / 127).to(getattr(torch, scale_dtype)).to(dtype)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = torch.round(x / safe if via == "divide" else x * (1 / safe)).clamp(-127, 127)
    quantized = quantize_tensor(x, TensorSpec(bits=8, scale_dtype=scale_dtype, round_via=via, arithmetic="input"))
    assert torch.equal(quantized.scale, scale.float().squeeze(-1))
    assert torch.equal(quantized.codes, codes.to(torch.int8))
    assert torch.equal(quantized.dequantize(), codes * scale)


SPECS = {
    "token": TensorSpec(bits=8, **CT),
    "group": TensorSpec(bits=4, granularity="group", group_size=8, arithmetic="input", round_via="reciprocal"),
    "axis": TensorSpec(bits=4, axis=1, arithmetic="input", scale_dtype="float16"),
    "unsigned": TensorSpec(bits=4, code_range="unsigned", arithmetic="input"),
    "mse": TensorSpec(bits=4, range_finder="mse", arithmetic="input", options={"candidates": 5}),
    "mask": TensorSpec(bits=4, range_finder="percentile", arithmetic="input", options={"percentile": 0.9, "ste": "mask"}),
    "static": TensorSpec(bits=8, granularity="tensor", dynamic=False, arithmetic="input"),
    "late": Q8_0,
    "late-mse": replace(Q8_0, bits=3, range_finder="mse", options={"candidates": 5, "ste": "mask"}, scale_dtype="bfloat16"),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_values_are_those_of_the_codes_and_gradients_pass_straight_through(name: str, dtype: torch.dtype) -> None:
    quantizer = build_quantizer(SPECS[name])
    quantizer(tokens(2, torch.float32))
    merge_ranges(quantizer)
    x = tokens(3, dtype).requires_grad_()
    y = quantizer(x)
    codes = quantizer.codes(x)
    assert y.dtype == dtype
    assert torch.equal(y, codes.dequantize())
    stored = dtype if quantizer.grid.arithmetic == "input" else getattr(torch, quantizer.grid.scale_dtype)
    assert torch.equal(codes.scale.to(stored).float(), codes.scale)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    if quantizer.how.ste != "mask":
        assert torch.equal(x.grad, upstream)
    else:
        assert bool(((x.grad == upstream) | (x.grad == 0)).all())
        assert 0 < int((x.grad == 0).sum()) < x.numel()


@pytest.mark.parametrize("name", ["token", "mask", "late", pytest.param("static", marks=pytest.mark.slow)])
def test_graphs_keep_the_roundings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor would leave out a cast to half precision and back."""
    monkeypatch.setattr(compiled, "_failed", True)
    quantizer = build_quantizer(SPECS[name])
    torch._dynamo.reset()
    call = torch.compile(quantizer, fullgraph=True)
    for seed in range(5):
        x = tokens(seed, torch.bfloat16, (2, 5, 256))
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, wanted = call(one), quantizer(other)
        assert torch.equal(y, wanted), seed
        upstream = torch.randn_like(y)
        y.backward(upstream)
        wanted.backward(upstream)
        assert torch.equal(one.grad, other.grad), seed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["token", "late"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_compiled_pass_keeps_the_roundings(dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_failed", False)
    how = build_quantizer(SPECS[name]).how
    rows = [tokens(seed, dtype, (3, 4, 200)).flatten(0, 1) for seed in range(5)]
    wanted = [(choice.fake_quantize_dynamic(x, how, dtype), *choice.encode_dynamic(x, how)[:2]) for x in rows]
    monkeypatch.setattr(compiled, "WORTH_COMPILING", 0)
    monkeypatch.setattr(compiled, "SMALL", 0)
    for x, (values, codes, scale) in zip(rows, wanted, strict=True):
        assert torch.equal(choice.fake_quantize_dynamic(x, how, dtype), values)
        got = choice.encode_dynamic(x, how)
        assert torch.equal(got[0], codes)
        assert torch.equal(got[1], scale)
    assert not compiled._failed


def test_what_is_not_exact_is_refused() -> None:
    with pytest.raises(ValueError, match=r"TensorSpec.arithmetic: got 'input' with symmetric=False"):
        TensorSpec(bits=8, symmetric=False, arithmetic="input")
    with pytest.raises(ValueError, match=r"TensorSpec.arithmetic: got 'input' with quantizer 'mean_abs'"):
        build_quantizer(TensorSpec(bits=2, quantizer="mean_abs", arithmetic="input"))
    for fields in ({"scale_dtype": "float32"}, {"symmetric": False}, {"arithmetic": "input"}):
        with pytest.raises(ValueError, match=f"TensorSpec.scale_rounding: got 'after' with {next(iter(fields))}="):
            replace(Q8_0, **fields)
    with pytest.raises(ValueError, match=r"TensorSpec.scale_rounding: got 'after' with quantizer 'mean_abs'"):
        build_quantizer(TensorSpec(bits=2, quantizer="mean_abs", scale_dtype="float16", scale_rounding="after"))
    with pytest.raises(ValueError, match=r"Grid.scale_rounding: got 'after' with zero='none', offset=0.0 and arithmetic='input'"):
        Grid(qmin=-7, qmax=7, divisor=7, scale_dtype="float16", scale_rounding="after", arithmetic="input")
    for zero, offset in (("integer", 0.0), ("float", 0.0), ("none", 0.5)):
        with pytest.raises(ValueError, match=f"Grid.arithmetic: got 'input' with zero='{zero}' and offset={offset}"):
            Grid(qmin=0, qmax=15, divisor=15, zero=zero, offset=offset, arithmetic="input")


def blocks(size: int, columns: int = 512) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Inputs fp32 [200, columns], their blocks, and the largest magnitude of each."""
    x = tokens(4, torch.float32, (4, 50, columns), (-2, 2)).flatten(0, 1)
    rows = x.numpy().reshape(-1, size)
    return x, rows, np.abs(rows).max(1, keepdims=True)


def q8_0(rows: np.ndarray, via: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scales, values) of llama.cpp's blocks of 32: x * (127 / amax) on x86, x * (1 / (amax / 127)) in C and NEON."""
    amax = np.abs(rows).max(1, keepdims=True)
    scale = amax / np.float32(127)
    inverse = np.float32(127) / np.where(amax > 0, amax, 1) if via == "x86" else np.float32(1) / np.where(scale > 0, scale, 1)
    codes, stored = np.rint(rows * inverse), scale.astype(np.float16).astype(np.float32)
    return codes, stored, codes * stored


@settings(deadline=None, max_examples=60)
@given(columns=st.integers(1, 8), seed=st.integers(0, 2**31), dtype=st.sampled_from([*HALVES, torch.float32]))
def test_blocks_of_llama_cpp(columns: int, seed: int, dtype: torch.dtype) -> None:
    """Bit for bit, also where the scale is below the smallest number of fp16, which takes the values to 0 and leaves the codes."""
    x = tokens(seed, dtype, (2, 5, 32 * columns), (-9, 3))
    codes, scale, values = q8_0(x.float().numpy().reshape(-1, 32), "C")
    quantized = quantize_tensor(x, Q8_0)
    assert np.array_equal(quantized.codes.numpy().reshape(-1, 32), codes)
    assert np.array_equal(quantized.scale.numpy().reshape(-1, 1), scale)
    assert torch.equal(quantized.dequantize(), torch.from_numpy(values).view(x.shape).to(dtype))


def test_blocks_of_llama_cpp_on_x86_differ_in_ties_only() -> None:
    x, rows, _ = blocks(32)
    codes, scale, _ = q8_0(rows, "x86")
    quantized = quantize_tensor(x, Q8_0)
    ours = quantized.codes.numpy().reshape(-1, 32)
    assert np.array_equal(quantized.scale.numpy().reshape(-1, 1), scale)
    largest = np.abs(rows).max(1, keepdims=True).astype(np.float64)
    steps = rows * np.divide(127, largest, out=np.zeros_like(largest), where=largest > 0)
    tie = np.abs(steps - np.floor(steps) - 0.5) < 1e-4
    assert np.array_equal(ours[~tie], codes[~tie])
    early = quantize_tensor(x, replace(Q8_0, scale_rounding="before")).codes.numpy().reshape(-1, 32)
    assert 0.001 < (early != codes).mean() < 0.02


def test_blocks_of_k_quants_differ_by_an_ulp_of_the_scale() -> None:
    """Q8_K: codes round(x * (-127 / m)) with the signed extreme m of 256 values, scale 1 / (-127 / m)."""
    x, rows, _ = blocks(256)
    extreme = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    inverse = np.divide(np.float32(-127), extreme, out=np.zeros_like(extreme), where=extreme != 0)
    codes = np.rint(rows * inverse)
    values = codes * np.divide(np.float32(1), inverse, out=np.zeros_like(inverse), where=inverse != 0)
    quantized = quantize_tensor(x, TensorSpec(bits=8, granularity="group", group_size=256))
    ours = quantized.codes.numpy().reshape(-1, 256)
    same = ours == codes * -np.sign(extreme)
    assert same.mean() > 1 - 1e-4
    np.testing.assert_allclose(quantized.dequantize().numpy().reshape(-1, 256)[same], values[same], rtol=3e-7)


def test_tokens_of_vllm_differ_in_ties_only() -> None:
    x, rows, amax = blocks(512)
    codes = np.rint(rows * np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax > 0))
    for via in ("divide", "reciprocal"):
        quantized = quantize_tensor(x, TensorSpec(bits=8, granularity="token", round_via=via))
        assert np.array_equal(quantized.scale.numpy()[:, None], amax / np.float32(127))
        steps = rows * (127 / np.maximum(amax, 1e-30).astype(np.float64))
        tie = np.abs(steps - np.floor(steps) - 0.5) < 1e-4
        assert np.array_equal(quantized.codes.numpy()[~tie], codes[~tie])


@pytest.mark.parametrize("via", ["divide", "reciprocal"])
def test_asymmetric_tokens_of_torchao(via: str) -> None:
    """Codes 0..255 here, -128..127 there: the same values; divided or by the reciprocal, as far as no tie shows it."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        intx = pytest.importorskip("torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor")
    logging.disable(logging.NOTSET)
    for seed in range(10):
        x = tokens(seed, torch.float32, (2, 40, 128))
        x[0, 1:9], x[1, :8] = x[0, 1:9].abs(), -x[1, :8].abs()
        ours = fake_quantize(x, TensorSpec(bits=8, granularity="token", symmetric=False, round_via=via))
        assert torch.equal(ours, intx._apply_int8_act_asym_per_token_quant_dequant(x))


def test_groups_of_inputs_in_layers() -> None:
    """What llama.cpp's activations look like in a model: one fp16 scale for each 32 inputs of a token."""
    layer = nn.Sequential(nn.Linear(64, 8))
    insert_quantizers(layer, QuantScheme(input=Q8_0, exclude=()))
    x = tokens(5, torch.float32)
    assert torch.equal(layer(x), nn.functional.linear(fake_quantize(x, Q8_0), layer[0].weight, layer[0].bias))
    values = q8_0(x.numpy().reshape(-1, 32), "C")[2]
    assert np.array_equal(layer[0].quantized_input(x).numpy(), values.reshape(x.shape))
