"""What fake quantization keeps for its backward pass: nothing, one bit an element, or `x` where a scale is trained."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_qat import TensorSpec, fake_quantize
from lightning_qat.numerics.fake_quantize import fake_quantize_with
from lightning_qat.numerics.grid import Grid
from lightning_qat.numerics.rounding import Rounding
from lightning_qat.quantizers import build_quantizer

IDENTITY = TensorSpec(bits=4)
CLIP = TensorSpec(bits=4, options={"ste": "clip", "clip_value": 1.0})
MASK = TensorSpec(bits=4, range_finder="percentile", options={"ste": "mask", "percentile": 0.8})
SPECS = {"identity": IDENTITY, "clip": CLIP, "mask": MASK}
every_estimator = pytest.mark.parametrize("name", SPECS)


class Saved:
    """Counts what autograd keeps inside the block."""

    def __enter__(self) -> "Saved":
        self.tensors: list[Tensor] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: self.tensors.append(t) or t, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self.hooks.__exit__(*args)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


@pytest.mark.parametrize("blocks", [{}, {"granularity": "group", "group_size": 8}, {"granularity": "tensor"}, {"axis": 1}], ids=str)
def test_the_identity_saves_nothing(blocks: dict) -> None:
    x = torch.randn(16, 64, requires_grad=True)
    with Saved() as saved:
        fake_quantize(x, TensorSpec(bits=4, **blocks))
        fake_quantize(x, TensorSpec(bits=4, range_finder="mse", options={"candidates": 3}, **blocks))
    assert saved.tensors == []


@pytest.mark.parametrize("columns", [64, 61, 1])
@pytest.mark.parametrize("name", ["clip", "mask"])
def test_masks_are_one_bit_an_element(name: str, columns: int) -> None:
    x = torch.randn(16, columns, requires_grad=True)
    with Saved() as saved:
        fake_quantize(x, SPECS[name])
    assert [(t.dtype, tuple(t.shape)) for t in saved.tensors] == [(torch.uint8, (16, -(-columns // 8)))]
    assert columns % 8 or saved.bytes == x.numel() // 8


def test_a_trained_scale_keeps_what_its_gradient_needs() -> None:
    x, scale = torch.randn(4, 16), torch.full((4, 1), 0.1, requires_grad=True)
    how = Rounding(grid=Grid(qmin=-8, qmax=7, divisor=7))
    with Saved() as saved:
        fake_quantize_with(x, scale, None, how)
    assert sorted(tuple(t.shape) for t in saved.tensors) == [(4, 1), (4, 16)]
    with Saved() as saved:
        fake_quantize_with(x.requires_grad_(), scale.detach(), None, how)
    assert saved.tensors == []


def test_nothing_is_saved_without_gradients() -> None:
    with Saved() as saved, torch.no_grad():
        fake_quantize(torch.randn(4, 8, requires_grad=True), CLIP)
    assert saved.tensors == []


@pytest.mark.parametrize("reentrant", [False, True])
@every_estimator
def test_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    quantizer, weight = build_quantizer(SPECS[name]), torch.randn(20, 5, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return quantizer(x) @ quantizer(weight.t()).t()

    results = []
    for call in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        x = torch.randn(7, 20, requires_grad=True)
        weight.grad = None
        call(x).square().sum().backward()
        results.append((x.grad, weight.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_estimator
def test_backward_under_autocast(name: str, dtype: torch.dtype) -> None:
    """Values are cast by the product and not by the quantizer, gradients come back in the dtype of the parameter."""
    x, weight = torch.randn(7, 20, requires_grad=True), torch.randn(5, 20, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = torch.nn.functional.linear(fake_quantize(x, SPECS[name]), fake_quantize(weight, SPECS[name]))
        y.sum().backward()
    assert y.dtype == dtype
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    column_sums = fake_quantize(weight.detach(), SPECS[name]).to(dtype).float().sum(0).expand(7, 20)
    kept = x.grad != 0
    torch.testing.assert_close(x.grad[kept], column_sums[kept], rtol=2e-2, atol=2e-2)
    assert bool(kept.all()) == (name == "identity")


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@every_estimator
def test_values_in_another_dtype_leave_the_gradient_its_own(name: str, out: torch.dtype) -> None:
    quantizer, x = build_quantizer(SPECS[name]), torch.randn(6, 40, requires_grad=True)
    y = quantizer(x, out)
    assert y.dtype == out
    assert torch.equal(y, quantizer(x).to(out))
    upstream = torch.randn(6, 40).to(out)
    y.backward(upstream)
    (wanted,) = torch.autograd.grad(quantizer(x), x, upstream.float())
    assert x.grad.dtype == torch.float32
    assert torch.equal(x.grad, wanted)
