"""The straight-through estimators as a user meets them: through specs, dtypes, layouts and shared values."""

import pytest
import torch

from lightning_qat import TensorSpec, fake_quantize
from lightning_qat.numerics.fake_quantize import straight_through

CLIP = {"ste": "clip"}
FEW_SPECS = {
    "symmetric": TensorSpec(bits=4),
    "asymmetric": TensorSpec(bits=8, symmetric=False),
    "float-zero": TensorSpec(bits=4, symmetric=False, zero_point="float"),
    "runtime": TensorSpec(bits=8, code_range="full", divisor="half_range", round_via="reciprocal"),
    "group": TensorSpec(bits=3, granularity="group", group_size=2, scale_dtype="float16"),
    "axis": TensorSpec(bits=3, axis=1),
    "tensor": TensorSpec(bits=5, granularity="tensor"),
    "binary": TensorSpec(bits=1, quantizer="mean_abs"),
}
few_specs = pytest.mark.parametrize("spec", FEW_SPECS.values(), ids=FEW_SPECS.keys())

# The ends of each row's range sit exactly on the first and last code; +-2 are the bounds of the clipped estimator.
ON_GRID = [[1.5, -1.5, 0.75, 0.0, 0.1, -0.2], [2.0, -2.0, 1.999, 2.001, -3.0, 0.5]]


@few_specs
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


@few_specs
def test_gradient_keeps_dtype_and_layout(spec: TensorSpec) -> None:
    x = torch.randn(16, 8, dtype=torch.bfloat16, requires_grad=True)
    fake_quantize(x.t(), spec).sum().backward()
    assert (x.grad.dtype, x.grad.shape) == (torch.bfloat16, x.shape)
    assert bool((x.grad == 1).all())


def test_straight_through_has_the_values_of_one_and_the_gradient_of_the_other() -> None:
    x, values = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    upstream = torch.randn(3)
    y = straight_through(x, values)
    y.backward(upstream)
    assert torch.equal(y, values)
    assert torch.equal(x.grad, upstream)
    assert values.grad is None


def test_straight_through_crosses_dtypes() -> None:
    x = torch.randn(3, requires_grad=True)
    straight_through(x, x.detach().bfloat16()).backward(torch.ones(3, dtype=torch.bfloat16))
    assert x.grad.tolist() == [1, 1, 1]
    assert x.grad.dtype == torch.float32
