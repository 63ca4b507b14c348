"""A float zero point is the form of LLM-QAT's asymmetric quantizer: its vectors hold as printed, but for its epsilon of 1e-8."""

import pytest
import reference
import torch

from lightning_qat import TensorSpec, fake_quantize, quantize_tensor

VECTORS = {
    "v2": (4, [0.9, -0.35, 0.1, -1.4], [0.9, -0.32666671, 0.13333333, -1.4], [15, 7, 10, 0]),
    "v3": (8, [2.5, -2.0, 0.5, 1.99, -3.0], [2.5, -2.007843, 0.49411774, 1.9823532, -3.0], [255, 46, 162, 231, 0]),
    "v5-constant": (4, [5.0, 5.0, 5.0], [5.0, 5.0, 5.0], [0, 0, 0]),
    "v6-single": (4, [0.3], [0.3], [0]),
    "v7-negative": (4, [-0.1, -0.2, -0.4], [-0.1, -0.2, -0.4], [15, 10, 0]),
    "v8-ties": (2, [0, 0.5, 1.5, 2.5, 3], [0.0, 0, 2, 2, 3], [0, 0, 2, 2, 3]),
    "v9-one-bit": (1, [1, -0.4, 0.6, 0.1], [1, -0.4, 1, -0.4], [1, 0, 1, 0]),
    "v9-two-bits": (2, [1, -0.4, 0.6, 0.1], [1, -0.4, 0.5333333, 0.0666667], [3, 0, 2, 1]),
    "v9-three-bits": (3, [1, -0.4, 0.6, 0.1], [1, -0.4, 0.6, 0], [7, 0, 5, 2]),
    "v12-zero-is-no-level": (4, [-0.3, 0.0, 1.0], [-0.3, -0.04000002, 1.0], [0, 3, 15]),
}


def spec(bits: int, **fields: object) -> TensorSpec:
    return TensorSpec(bits=bits, symmetric=False, zero_point="float", **fields)


@pytest.mark.parametrize("name", VECTORS)
def test_the_printed_vectors(name: str) -> None:
    bits, values, printed, codes = VECTORS[name]
    x = torch.tensor(values)
    assert quantize_tensor(x, spec(bits)).codes.tolist() == codes
    for result in (fake_quantize(x, spec(bits)), reference.asym(x, bits)[1]):
        torch.testing.assert_close(result, torch.tensor(printed), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_reference_but_for_ties_and_its_epsilon(bits: int) -> None:
    x = torch.randn(400, 16) * 10 ** torch.empty(400, 1).uniform_(-1, 2) + torch.empty(400, 1).uniform_(-3, 3)
    ours = quantize_tensor(x, spec(bits))
    codes, values = reference.asym(x, bits)
    steps = (x.double() - x.double().amin(1, keepdim=True)) / ours.scale.double().unsqueeze(1)
    clear = (steps - steps.floor() - 0.5).abs() > 1e-3
    assert clear.float().mean() > 0.98
    assert torch.equal(ours.codes.float()[clear], codes[clear])
    torch.testing.assert_close(ours.dequantize()[clear], values[clear], rtol=2e-6, atol=2e-6 * 300)


def test_half_precision_does_not_overflow() -> None:
    """The reference divides in the dtype of its input, so a constant row of halves is 0 / 0 there."""
    for values in ([5.0, 5.0, 5.0], [0.0, 0.0, 0.0], [6e-8, 0.0, 1.2e-7], [65504.0, -65504.0, 0.0]):
        x = torch.tensor(values).half()
        assert fake_quantize(x, spec(8)).isfinite().all()
    assert reference.asym(torch.full((3,), 5.0).half(), 4)[1].isnan().all()
    assert fake_quantize(torch.full((3,), 5.0).half(), spec(4)).tolist() == [5, 5, 5]
