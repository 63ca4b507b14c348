"""The forward product on integer codes is the fake-quantized product, and its gradients are those of the straight-through estimator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import llama, mlp
from torch import nn
from torch.nn import functional

from lightning_qat import QuantScheme, TensorSpec, fake_quantize, insert_quantizers, quantizers_disabled
from lightning_qat.modules import int8, use_int8_forward

TOKEN = TensorSpec(bits=8, granularity="token")


@pytest.fixture(autouse=True)
def always_faster(monkeypatch):
    """Whether it is faster depends on the machine; what it computes must not."""
    monkeypatch.setattr(int8, "is_faster", lambda x, weight: True)


def layer(inputs=32, outputs=24, bias=True, scheme="w8a8"):
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias))
    insert_quantizers(model, scheme)
    return model


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20)),
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    bias=st.booleans(),
)
def test_it_is_the_fp32_product_of_the_fake_quantized_tensors_to_1e_6(seed, size, bits, bias):
    torch.manual_seed(seed)
    inputs, outputs, tokens = size
    model = layer(inputs, outputs, bias, f"w{bits[0]}a{bits[1]}" if bits[0] > 2 else QuantScheme(weight=TensorSpec(bits=2), input=TOKEN))
    x = torch.randn(2, tokens, inputs)
    plain = model(x)
    assert use_int8_forward(model) == {}
    bound = 1e-6 * functional.linear(x.abs(), model[0].weight.abs()).add(1)
    assert ((model(x) - plain).abs() <= bound).all()


def test_the_bf16_path_differs_by_no_more_than_its_own_rounding():
    torch.manual_seed(0)
    model, x = layer(256, 64), torch.randn(64, 256)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        use_int8_forward(model)
        ours = model(x)
    assert ours.dtype == plain.dtype == torch.bfloat16
    exact = functional.linear(
        fake_quantize(x, TOKEN).double(), fake_quantize(model[0].weight, TensorSpec(bits=8)).double(), model[0].bias.double()
    )
    bound = 2.0**-8 * (functional.linear(x.abs(), model[0].weight.abs()) + exact.abs())
    assert ((ours - plain).abs() <= bound).all()
    assert (ours - exact).abs().mean() < (plain - exact).abs().mean()


def test_gradients_are_those_of_the_straight_through_estimator():
    torch.manual_seed(0)
    model, x = layer(), torch.randn(5, 7, 32, requires_grad=True)
    wanted = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    use_int8_forward(model)
    got = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_byte_an_element_is_kept_for_the_backward_pass():
    model, kept = layer(256, 128, bias=False), []
    use_int8_forward(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(64, 256, requires_grad=True))
    big = [t for t in kept if t.numel() > 1000]
    assert [t.dtype for t in big] == [torch.int8, torch.int8]


def test_siblings_encode_their_input_once(monkeypatch):
    model, calls = llama(), []
    insert_quantizers(model, "w8a8")
    use_int8_forward(model)
    encode = int8.encode_dynamic
    monkeypatch.setattr(int8, "encode_dynamic", lambda x, *args: calls.append(x.shape) or encode(x, *args))
    model(torch.arange(10).view(1, 10))
    inputs = [shape for shape in calls if shape[0] == 10]
    assert len(inputs) == 2 * 4  # q/k/v, o, gate/up, down


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("w8", "have to be fake-quantized both"),
        ("w4g8a8", "one scale per output channel"),
        (QuantScheme(weight=TensorSpec(bits=8), input=TensorSpec(bits=8, granularity="tensor")), "one scale per token"),
        (QuantScheme(weight=TensorSpec(bits=8, symmetric=False), input=TOKEN), "symmetric signed grid"),
        ("w2a8", "symmetric signed grid"),
        (QuantScheme(weight=TensorSpec(bits=8, options={"ste": "clip"}), input=TOKEN), "identity estimator"),
    ],
)
def test_what_cannot_be_computed_on_codes_says_why_and_stays_as_it_is(scheme, reason):
    model, x = mlp(), torch.randn(3, 16)
    insert_quantizers(model, scheme)
    before, refused = model(x), use_int8_forward(model)
    assert refused
    assert all(reason in text for text in refused.values())
    assert torch.equal(model(x), before)


def test_rows_that_are_not_finite_stay_local_and_disabled_quantizers_are_plain():
    model, x = layer(), torch.randn(4, 32)
    use_int8_forward(model)
    x[1, 3] = torch.inf
    y = model(x)
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()
    with quantizers_disabled(model):
        assert torch.equal(model(torch.ones(2, 32)), functional.linear(torch.ones(2, 32), model[0].weight, model[0].bias))
    assert model(torch.empty(0, 32)).shape == (0, 24)


@pytest.mark.slow
def test_it_compiles_without_a_break():
    model, x = layer(), torch.randn(8, 32, requires_grad=True)
    use_int8_forward(model)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert x.grad is not None


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same_product(monkeypatch):
    monkeypatch.undo()
    torch.manual_seed(0)
    model, x = layer(256, 64).cuda(), torch.randn(64, 256, device="cuda")
    plain = model(x)
    use_int8_forward(model)
    torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)
