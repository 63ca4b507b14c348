"""Effective bits per quantized weight against tables counted by hand."""

import pytest
from models import cnn, llama

from lightning_qat import QuantScheme, TensorSpec, insert_quantizers
from lightning_qat.scheme import Override

# One layer of the tiny Llama (hidden 32, 4 heads of 8, 2 kv heads, intermediate 48), as out x in:
#   q_proj, o_proj        32 x 32 each      2 * 1024 weights,  2 * 32 rows
#   k_proj, v_proj        16 x 32 each      2 *  512 weights,  2 * 16 rows
#   gate_proj, up_proj    48 x 32 each      2 * 1536 weights,  2 * 48 rows
#   down_proj             32 x 48               1536 weights,      32 rows
# together 7680 weights in 224 rows; both layers are alike, the embedding and the head are left alone.
WEIGHTS, ROWS = 7680, 224
GROUP_16 = TensorSpec(bits=4, granularity="group", group_size=16, symmetric=False)


def effective_bits(model, scheme):
    scheme = QuantScheme.parse(scheme)
    insert_quantizers(model, scheme)
    return scheme.effective_bits(model)


def test_llama_w4_one_scale_a_row():
    # 4 bits a weight and one fp32 scale a row: (4 * 7680 + 32 * 224) / 7680 = 37888 / 7680
    assert effective_bits(llama(), "w4") == (4 * WEIGHTS + 32 * ROWS) / WEIGHTS == 37888 / 7680


def test_llama_w4_groups_of_16_with_zero_points():
    # every 16 weights share 32 bits of scale and 4 bits of zero point: 4 + 36 / 16 = 6.25
    assert effective_bits(llama(), QuantScheme(weight=GROUP_16)) == 6.25


def test_cnn_w2():
    # stem        8 x (3 * 3 * 3)    216 weights,  8 rows
    # depthwise   8 x (1 * 3 * 3)     72 weights,  8 rows      one input channel a group
    # classifier  4 x 8               32 weights,  4 rows
    # together 320 weights in 20 rows: 2 + 32 * 20 / 320 = 4
    assert effective_bits(cnn(), "w2") == 4.0


def test_half_precision_scales_count_half():
    # 4 * 7680 + 16 * 224 bits
    assert effective_bits(llama(), QuantScheme(weight=TensorSpec(bits=4, scale_dtype="bfloat16"))) == (4 * WEIGHTS + 16 * ROWS) / WEIGHTS


def test_overrides_are_counted_and_what_is_off_is_not():
    # down_proj at 8 bits (1536 weights, 32 rows), the attention off: gate and up at 4 bits (3072 weights, 96 rows)
    scheme = QuantScheme(
        weight=TensorSpec(bits=4),
        overrides=(Override(names=("down_proj",), weight=TensorSpec(bits=8)), Override(names=("self_attn.*",), weight=None)),
    )
    assert effective_bits(llama(), scheme) == (4 * 3072 + 32 * 96 + 8 * 1536 + 32 * 32) / (3072 + 1536)


def test_a_model_without_weight_quantizers_has_no_effective_bits():
    with pytest.raises(ValueError, match="insert_quantizers"):
        QuantScheme.parse("w4").effective_bits(llama())
