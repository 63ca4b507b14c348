"""GGUF blocks: the bytes mean to ggml's own reader what was trained, and nothing else fits in them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_qat import QuantScheme, TensorSpec, insert_quantizers
from lightning_qat.formats.exactness.codes import integer_weights
from lightning_qat.formats.gguf.blocks import BLOCK_TYPES, Blocks
from lightning_qat.formats.gguf.encoding import block_type, check_scales, decode, encode

gguf = pytest.importorskip("gguf")
SEEDS = 1000

every_type = pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)


def random_blocks(kind, seed, count):
    draw = np.random.default_rng(seed)
    codes = draw.integers(kind.low, kind.high + 1, (count, kind.size)).astype(np.int16)
    scale = (draw.random(count) * 10.0 ** draw.integers(-8, 4, count)).astype(np.float16)
    scale[:: 1 + seed % 5] *= seed % 2  # blocks of zeros
    if kind.form == "centred":
        return Blocks(codes, scale)
    minimum = draw.standard_normal(count).astype(np.float16)
    if kind.form == "shifted":
        return Blocks(codes, scale, minimum, np.ones(count, np.uint8))
    minima = draw.integers(0, 16 if kind.name == "Q2_K" else 64, count).astype(np.uint8)
    return Blocks(codes, scale, minimum, minima, steps=1 + seed % 2)


def values_of(blocks):
    """What the codes stand for, as the module's docstring has it."""
    values = blocks.scale.astype(np.float32)[:, None] * blocks.steps * blocks.codes
    if blocks.minimum is None:
        return values
    return values - (blocks.minimum.astype(np.float32) * blocks.minima)[:, None]


def read_by_gguf(packed, name):
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])


# ---------------------------------------------------------------- bytes


@every_type
def test_sizes_are_those_of_ggml(kind):
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.size, kind.nbytes)


@every_type
def test_gguf_reads_the_values_and_we_read_the_codes(kind):
    for seed in range(SEEDS):
        blocks = random_blocks(kind, seed, count=1 + seed % 3)
        packed = kind.pack(blocks)
        assert np.array_equal(read_by_gguf(packed, kind.name), values_of(blocks)), seed
        read = kind.unpack(packed)
        assert np.array_equal(read.codes, blocks.codes), seed
        assert np.array_equal(read.scale, blocks.scale), seed
        assert read.steps == blocks.steps
        for mine, theirs in ((blocks.minimum, read.minimum), (blocks.minima, read.minima)):
            assert mine is theirs or np.array_equal(mine, theirs), seed


@every_type
def test_no_flipped_bit_goes_unseen(kind):
    """The unpacker sees each bit of a block: what it reads changes, or it refuses; base three has bytes with the same digits."""
    blocks = random_blocks(kind, 2, count=1)._replace(scale=np.array([0.37], np.float16))
    packed = kind.pack(blocks)
    before, unseen = kind.unpack(packed), 0
    for byte in range(kind.nbytes):
        for bit in range(8):
            flipped = packed.copy()
            flipped[0, byte] ^= 1 << bit
            try:
                after = kind.unpack(flipped)
            except ValueError as error:
                assert "different scales" in str(error)  # noqa: PT017
                continue
            unseen += all(a is b or np.array_equal(a, b, equal_nan=True) for a, b in zip(before, after, strict=True))
    assert unseen == 0 or kind.name == "TQ1_0"
    assert unseen < 0.1 * 8 * kind.nbytes


def test_q8_0_is_what_ggml_makes_of_our_values():
    """Of the rules of ggml only that of Q8_0 is ours: amax / 127."""
    weight, _ = trained(TensorSpec(bits=8, granularity="group", group_size=32, scale_dtype="float16"))
    theirs = gguf.quants.quantize(weight.dequantize().numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(encode(weight, BLOCK_TYPES["Q8_0"]), theirs)


# ---------------------------------------------------------------- trained weights


def trained(spec, rows=5, columns=512, seed=0):
    """(the integers of a trained layer, its fake-quantized weight)."""
    torch.manual_seed(seed)
    layer = nn.Sequential(nn.Linear(columns, rows, bias=False))
    with torch.no_grad():
        layer[0].weight[rows // 2] *= 0.0
        layer[0].weight[0] += 0.01
    insert_quantizers(layer, QuantScheme(weight=spec))
    return next(integer_weights(layer)), layer[0].quantized_weight().detach()


def half(bits, **fields):
    return TensorSpec(bits=bits, scale_dtype="float16", **fields)


G32, G256 = ({"granularity": "group", "group_size": size} for size in (32, 256))
ZERO, SHIFT = {"symmetric": False}, {"symmetric": False, "zero_point": "float"}
TYPES = {
    "w1": (half(1, quantizer="mean_abs"), "TQ1_0"),
    "w1-g32": (half(1, quantizer="mean_abs", **G32), "Q4_0"),
    "w2-narrow": (half(2), "TQ2_0"),
    "w2-narrow-g256": (half(2, **G256), "TQ2_0"),
    "w2-full": (half(2, code_range="full"), "Q2_K"),
    "w2-without-zero": (half(2, quantizer="mean_abs"), "Q2_K"),
    "w2-without-zero-g32": (half(2, quantizer="mean_abs", **G32), "Q4_0"),
    "w2-zero": (half(2, **ZERO), "Q2_K"),
    "w2-shift": (half(2, **SHIFT), "Q2_K"),
    "w3": (half(3), "Q3_K"),
    "w3-full": (half(3, code_range="full", divisor="half_range"), "Q3_K"),
    "w3-g32": (half(3, **G32), "Q4_0"),
    "w3-zero-g32": (half(3, **ZERO, **G32), "Q4_0"),
    "w4": (half(4), "Q4_0"),
    "w4-tensor": (half(4, granularity="tensor"), "Q4_0"),
    "w4-full-g32": (half(4, code_range="full", divisor="half_range", **G32), "Q4_0"),
    "w4-zero": (half(4, **ZERO), "Q4_K"),
    "w4-zero-g32": (half(4, **ZERO, **G32), "Q5_0"),
    "w4-shift": (half(4, **SHIFT), "Q4_K"),
    "w4-shift-g32": (half(4, **SHIFT, **G32), "Q4_1"),
    "w5-g64": (half(5, granularity="group", group_size=64), "Q5_0"),
    "w5-zero": (half(5, **ZERO), "Q6_K"),
    "w6": (half(6, code_range="full"), "Q6_K"),
    "w6-g32": (half(6, **G32), "Q8_0"),
    "w7-zero-g32": (half(7, **ZERO, **G32), "Q8_0"),
    "w8-full-g32": (half(8, code_range="full", divisor="half_range", **G32), "Q8_0"),
}


@pytest.mark.parametrize(("spec", "name"), TYPES.values(), ids=TYPES)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 7), blocks=st.integers(1, 3))
def test_every_grid_has_a_type_that_holds_it_exactly(spec, name, seed, rows, blocks):
    weight, values = trained(spec, rows, 256 * blocks, seed)
    kind = block_type(weight)
    assert kind.name == name
    check_scales(weight)
    packed = encode(weight, kind)
    assert packed.shape == (rows, 256 * blocks * kind.bits / 8)
    assert np.array_equal(read_by_gguf(packed, name), values.numpy())
    stored = decode(packed, weight, kind)
    assert torch.equal(stored.codes, weight.codes)
    assert torch.equal(stored.scale, weight.scale)
    assert (weight.zero_point is None) == (stored.zero_point is None)
    assert weight.zero_point is None or torch.equal(stored.zero_point, weight.zero_point.to(stored.zero_point.dtype))


def test_rows_that_are_no_multiple_of_256_take_blocks_of_32():
    for spec, name in ((half(2), "Q4_0"), (half(3), "Q4_0"), (half(6), "Q8_0"), (half(4, **ZERO), "Q5_0")):
        assert block_type(trained(spec, columns=320)[0]).name == name


@pytest.mark.parametrize(
    ("spec", "columns", "message"),
    [
        (half(4), 48, r"0: has 48 inputs, which no GGUF block of 32 divides.*exclude=\('0',\).*multiple of 32"),
        (half(4, granularity="group", group_size=16), 64, r"0: weight.group_size: got 16.*group_size=32 or a multiple.*per channel"),
        (half(8, **ZERO), 64, r"0: no GGUF block type holds 8 bits with symmetric=False; train it symmetric"),
        (half(6, **SHIFT), 256, r"0: no GGUF block type holds 6 bits with symmetric=False"),
    ],
    ids=["width", "group", "w8-zero", "w6-shift"],
)
def test_what_no_type_holds_is_refused_with_the_way_out(spec, columns, message):
    with pytest.raises(ValueError, match=message):
        block_type(trained(spec, columns=columns)[0])


def test_scales_that_fp16_cannot_say_are_refused():
    with pytest.raises(ValueError, match=r"0: a scale is no fp16 number.*target='gguf'"):
        check_scales(trained(TensorSpec(bits=4))[0])
    tiny = nn.Sequential(nn.Linear(256, 1, bias=False))
    with torch.no_grad():
        tiny[0].weight.fill_(3 * 2.0**-24)  # the smallest steps of fp16: an odd one has no half
    insert_quantizers(tiny, QuantScheme(weight=half(2, quantizer="mean_abs")))
    with pytest.raises(ValueError, match="half the scale"):
        check_scales(next(integer_weights(tiny)))


def test_a_weight_with_other_minima_is_not_the_trained_one():
    weight, _ = trained(half(2, quantizer="mean_abs"))
    kind = BLOCK_TYPES["Q2_K"]
    for blocks, message in ((lambda b: b._replace(minimum=2 * b.minimum), "minima"), (lambda b: b._replace(minima=b.minima + 1), "minima")):
        packed = kind.pack(blocks(kind.unpack(encode(weight, kind).reshape(-1, kind.nbytes))))
        with pytest.raises(RuntimeError, match=message):
            decode(packed, weight, kind)
    blocks = kind.unpack(encode(weight, kind).reshape(-1, kind.nbytes))
    blocks.scale[0] *= 2
    with pytest.raises(RuntimeError, match="blocks of one group read back with different scales"):
        decode(kind.pack(blocks), weight, kind)
