"""Each quantized layer against a few lines that quantize explicit matrices and call the plain operation."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lightning_qat import QuantScheme, TensorSpec, fake_quantize, insert_quantizers
from lightning_qat.modules import cached_weights

WEIGHTS = {
    "w4-channel": TensorSpec(bits=4),
    "w4-group": TensorSpec(bits=4, granularity="group", group_size=4),
    "w8-tensor": TensorSpec(bits=8, granularity="tensor"),
    "w4-asymmetric": TensorSpec(bits=4, symmetric=False),
    "w2": TensorSpec(bits=2, quantizer="mean_abs"),
    "w1": TensorSpec(bits=1, quantizer="mean_abs"),
}
INPUTS = {
    "a8-token": TensorSpec(bits=8, granularity="token"),
    "a8-group": TensorSpec(bits=8, granularity="group", group_size=4),
    "a4-tensor": TensorSpec(bits=4, granularity="tensor"),
    "a16": None,
}
each_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
each_input = pytest.mark.parametrize("input", INPUTS.values(), ids=INPUTS)


def quantized(layer, weight, input=None):
    insert_quantizers(layer, QuantScheme(weight=weight, input=input, exclude=()))
    return layer


def on_grid(x, spec):
    return x if spec is None else fake_quantize(x, spec)


def leaf(x):
    return x.detach().clone().requires_grad_()


def assert_same_with_gradients(layer, x, reference, x_values, weight_values):
    """Outputs and gradients of `layer` are those of `reference` evaluated at the quantized operands (identity estimator)."""
    x, x_values, weight_values = leaf(x), leaf(x_values), leaf(weight_values)
    bias = None if layer.bias is None else leaf(layer.bias)
    out, expected = layer(x), reference(x_values, weight_values, bias)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(layer.weight.grad, weight_values.grad)
    torch.testing.assert_close(x.grad, x_values.grad)
    if bias is not None:
        torch.testing.assert_close(layer.bias.grad, bias.grad)


@each_weight
@each_input
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear(weight, input, bias):
    layer, x = nn.Linear(16, 6, bias=bias), torch.randn(2, 3, 16)
    values = fake_quantize(layer.weight.detach(), weight)
    assert_same_with_gradients(quantized(layer, weight, input), x, functional.linear, on_grid(x, input), values)


@each_weight
@each_input
def test_transformers_conv1d(weight, input):
    layer, x = Conv1D(6, 16), torch.randn(2, 3, 16)  # 16 -> 6, weight [in, out]
    nn.init.normal_(layer.bias)
    values = fake_quantize(layer.weight.detach().t().contiguous(), weight).t()
    reference = lambda x, w, b: x @ w + b  # noqa: E731
    assert_same_with_gradients(quantized(layer, weight, input), x, reference, on_grid(x, input), values)


CONVS = {
    "plain": {},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "bias": False},
    "strided": {"stride": 2, "padding": 1, "dilation": 2},
    "same": {"padding": "same"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
}
each_conv = pytest.mark.parametrize("settings", CONVS.values(), ids=CONVS)
each_rank = pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d])


def conv_case(conv, settings):
    layer = conv(4, 8, 3, **settings)
    return layer, torch.randn(2, 4, *(9 for _ in layer.kernel_size))


def per_sample(x, spec):
    """One scale for all channels and positions of a sample."""
    return x if spec is None else fake_quantize(x.reshape(len(x), -1), spec).reshape(x.shape)


@each_conv
@each_rank
def test_convolution_per_sample(conv, settings):
    layer, x = conv_case(conv, settings)
    weight, input = WEIGHTS["w4-channel"], INPUTS["a8-token"]
    values = fake_quantize(layer.weight.detach().reshape(8, -1), weight).reshape(layer.weight.shape)
    assert_same_with_gradients(quantized(layer, weight, input), x, layer._conv_forward, per_sample(x, input), values)


@pytest.mark.parametrize("weight", [WEIGHTS["w8-tensor"], WEIGHTS["w2"], WEIGHTS["w1"]], ids=["w8-tensor", "w2", "w1"])
@each_rank
def test_convolution_weights_with_inputs_per_tensor(conv, weight):
    layer, x = conv_case(conv, {"groups": 2})
    input = INPUTS["a4-tensor"]
    values = fake_quantize(layer.weight.detach().reshape(8, -1), weight).reshape(layer.weight.shape)
    assert_same_with_gradients(quantized(layer, weight, input), x, layer._conv_forward, on_grid(x, input), values)


@each_rank
def test_convolution_takes_unbatched_inputs(conv):
    layer, x = conv_case(conv, {"padding": 1})
    quantized(layer, WEIGHTS["w4-channel"], INPUTS["a8-token"])
    torch.testing.assert_close(layer(x[1]), layer(x)[1])


@each_rank
@pytest.mark.parametrize("input", [INPUTS["a8-token"], INPUTS["a4-tensor"], None], ids=["a8-token", "a4-tensor", "a16"])
def test_convolution_takes_empty_batches(conv, input):
    layer, x = conv_case(conv, {"padding": 1})
    shape = layer(x[:0]).shape
    assert quantized(layer, WEIGHTS["w4-channel"], input)(x[:0]).shape == shape


def test_a_large_sample_does_not_touch_the_others():
    layer, x = conv_case(nn.Conv2d, {})
    quantized(layer, WEIGHTS["w8-tensor"], INPUTS["a8-token"])
    alone = layer(x)[0]
    torch.testing.assert_close(layer(torch.stack([x[0], x[1] * 1000]))[0], alone)


def test_convolution_keeps_channels_last():
    layer, x = conv_case(nn.Conv2d, {"padding": 1})
    layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert quantized(layer, WEIGHTS["w4-channel"], INPUTS["a8-token"])(x).is_contiguous(memory_format=torch.channels_last)


@each_weight
@pytest.mark.parametrize("cached", [False, True], ids=["look-up", "cached"])
def test_embedding_is_a_look_up_in_the_quantized_table(weight, cached):
    layer, ids = nn.Embedding(11, 8), torch.tensor([[0, 3, 3], [10, 7, 0]])
    table = leaf(fake_quantize(layer.weight.detach(), weight))
    quantized(layer, weight)
    if cached:
        with cached_weights(layer), torch.no_grad():
            assert torch.equal(layer(ids), functional.embedding(ids, table))
        return
    out, expected = layer(ids), functional.embedding(ids, table)
    assert torch.equal(out, expected)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(layer.weight.grad, table.grad)


def test_embedding_keeps_its_padding_row_out_of_training():
    layer = quantized(nn.Embedding(5, 8, padding_idx=2), WEIGHTS["w4-channel"])
    layer(torch.tensor([1, 2, 2])).sum().backward()
    assert layer.weight.grad[2].abs().sum() == 0
    assert layer.weight.grad[1].abs().sum() > 0


def test_embedding_with_max_norm_is_refused_by_name():
    with pytest.raises(ValueError, match="max_norm"):
        quantized(nn.Embedding(5, 8, max_norm=1.0), WEIGHTS["w4-channel"])


@pytest.mark.parametrize("bits", [1, 2], ids=["w1", "w2"])
def test_few_bits_have_few_levels(bits):
    layer = quantized(nn.Linear(64, 3, bias=False), TensorSpec(bits=bits, quantizer="mean_abs"))
    step = layer.weight.abs().mean(1, keepdim=True)
    levels = torch.tensor([-1.0, 1.0]) if bits == 1 else torch.tensor([-1.5, -0.5, 0.5, 1.5])
    rows = layer(torch.eye(64)).t() / step
    for row in rows:
        torch.testing.assert_close(row.unique().round(decimals=4), levels)


def test_weights_without_any_help_of_the_library():
    layer = nn.Linear(16, 4, bias=False)
    scale = layer.weight.abs().amax(1, keepdim=True) / 7
    expected = (layer.weight / scale).round() * scale
    torch.testing.assert_close(quantized(layer, WEIGHTS["w4-channel"])(torch.eye(16)), expected.t())


def test_input_without_any_help_of_the_library():
    layer, x = nn.Linear(16, 4), torch.randn(5, 16)
    scale = x.abs().amax(1, keepdim=True) / 127
    expected = functional.linear((x / scale).round() * scale, layer.weight, layer.bias)
    torch.testing.assert_close(quantized(layer, None, INPUTS["a8-token"])(x), expected)


def test_bf16_autocast_quantizes_before_it_casts():
    layer, x = nn.Linear(16, 6), torch.randn(3, 16)
    weight, input = WEIGHTS["w4-channel"], INPUTS["a8-token"]
    operands = fake_quantize(x, input), fake_quantize(layer.weight.detach(), weight), layer.bias
    quantized(layer, weight, input)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = layer(x), functional.linear(*operands)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.abs().sum() > 0


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.slow
def test_compiled_in_one_graph_equals_eager():
    mlp, x = GatedMLP(), torch.randn(4, 16)
    insert_quantizers(mlp, "w4a8")
    compiled = torch.compile(mlp, fullgraph=True)
    out, expected = compiled(x), mlp(x)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=0)  # a fused producer may move a code by one
    assert torch.linalg.vector_norm(out - expected) < 1e-2 * torch.linalg.vector_norm(expected)
    gradients = [torch.autograd.grad(y.square().sum(), mlp.parameters()) for y in (out, expected)]
    for got, wanted in zip(*gradients, strict=True):
        assert torch.linalg.vector_norm(got - wanted) < 2e-2 * torch.linalg.vector_norm(wanted)
