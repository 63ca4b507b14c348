"""The compiled formulas give the bits of the plain ones; a compiler that fails costs a warning and nothing else."""

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from grids import DTYPES, FAMILIES, specs_of
from torch import Tensor
from torch._dynamo.utils import counters

from lightning_qat import TensorSpec, fake_quantize
from lightning_qat.numerics.backends import choice, compiled, reference
from lightning_qat.numerics.grid import Grid
from lightning_qat.numerics.ranges import AbsMax, MinMax, RangeFinder, scale_and_zero_point
from lightning_qat.numerics.rounding import Rounding
from lightning_qat.quantizers import build_quantizer

GRIDS: dict[str, tuple[RangeFinder, Grid]] = {
    "narrow": (AbsMax(), Grid(qmin=-7, qmax=7, divisor=7)),
    "float-zero": (MinMax(), Grid(qmin=0, qmax=15, divisor=15, zero="float")),
    "half": (AbsMax(), Grid(qmin=-128, qmax=127, divisor=127.5, round_via="reciprocal")),
    "integer-zero": (MinMax(), Grid(qmin=0, qmax=255, divisor=255, zero="integer", scale_dtype="float16")),
    "unsigned": (MinMax(), Grid(qmin=0, qmax=7, divisor=7, scale_dtype="bfloat16")),
    "half-levels": (AbsMax(), Grid(qmin=-2, qmax=1, divisor=1, offset=0.5)),
}


@pytest.fixture(autouse=True)
def _compile_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile at the first call, and forget it all afterwards."""
    monkeypatch.setattr(compiled, "WORTH_COMPILING", 0)
    monkeypatch.setattr(compiled, "SMALL", 0)
    monkeypatch.setattr(compiled, "_work", {})
    monkeypatch.setattr(compiled, "_compiled", {})
    monkeypatch.setattr(compiled, "_failed", False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows(seed: int, dtype: torch.dtype, shape: tuple[int, int] = (6, 40)) -> Tensor:
    """Rows of different size, one of zeros, one with ties, one that is not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** (torch.rand(shape[0], 1, generator=generator) * 5 - 3)
    x[0, 0] = x[0].abs().max() / 2
    if shape[0] > 4:
        x[1], x[2, 3], x[3, 1] = 0, torch.nan, -torch.inf
    return x.to(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN at the same places."""
    return one.dtype == other.dtype and torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def compare(name: str, dtype: torch.dtype, seeds: range) -> None:
    finder, grid = GRIDS[name]
    how = Rounding(grid=grid, finder=finder)
    for seed in seeds:
        x = rows(seed, dtype)
        ours = choice.fake_quantize_dynamic(x, how, dtype)
        assert same_bits(ours, reference.fake_quantize_dynamic(x, finder, grid, dtype)), seed
        scale, zero_point = scale_and_zero_point(*finder(x, grid), grid, x.dtype)
        ours = choice.fake_quantize(x, scale, zero_point, grid, dtype)
        assert same_bits(ours, reference.fake_quantize(x, scale, zero_point, grid, dtype)), seed
        for mine, wanted in zip(choice.encode_dynamic(x, how), reference.encode_dynamic(x, finder, grid), strict=True):
            assert (mine is None and wanted is None) or same_bits(mine, wanted), seed
    assert not compiled._failed
    assert compiled._compiled


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_compiled_formulas_give_the_same_bits_on_every_grid(name: str, dtype: torch.dtype) -> None:
    compare(name, dtype, range(50))


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_fifty_shapes_take_two_compilations_at_most(kind: type[torch.Tensor]) -> None:
    """Of weights too: a network of many widths has a shape for each layer, and torch gives up after eight."""
    finder, grid = GRIDS["narrow"]
    generator = torch.Generator().manual_seed(0)
    before = counters["stats"]["unique_graphs"]
    for seed in range(50):
        shape = tuple(torch.randint(2, 60, (2,), generator=generator).tolist())
        x = rows(seed, torch.float32, shape)
        x = x.t() if seed % 3 == 2 else x[:, ::2] if seed % 3 == 1 and shape[1] > 3 else x
        x = x if kind is torch.Tensor else kind(x)
        ours = compiled.run(reference.fake_quantize_dynamic, x, finder, grid, torch.float32)
        assert same_bits(ours, reference.fake_quantize_dynamic(x, finder, grid, torch.float32))
    assert 1 <= counters["stats"]["unique_graphs"] - before <= 2
    assert not compiled._failed


def test_rounded_scales_stay_rounded() -> None:
    """A compiler may drop a cast to half precision and back; here that would be another grid."""
    finder, grid = GRIDS["integer-zero"]
    for seed in range(50):
        x = rows(seed, torch.float32)
        ours = choice.fake_quantize_dynamic(x, Rounding(grid=grid, finder=finder), torch.float32)
        assert same_bits(ours, reference.fake_quantize_dynamic(x, finder, grid, torch.float32)), seed


def test_a_graph_traced_by_torch_compile_holds_the_formula_and_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fullgraph`, forward and backward, on inputs that are at hand; outside the graph the formula stays plain."""
    monkeypatch.setattr(compiled, "_failed", True)
    spec = TensorSpec(bits=4, options={"ste": "clip"})
    call = torch.compile(build_quantizer(spec), fullgraph=True)
    for seed in range(50):
        x = rows(seed, torch.float32).requires_grad_()
        y = call(x)
        assert same_bits(y, fake_quantize(x, spec)), seed
        y.backward(torch.ones_like(y))
        assert torch.equal(x.grad, (~(x.detach().abs() >= 2)).float()), seed


TRACED = {
    **{family: specs_of(family)[-1 if family == "mean_abs" else 6 * 3 + 1] for family in FAMILIES},
    "bf16-scale": TensorSpec(bits=4, scale_dtype="bfloat16"),
    "fp16-scale": TensorSpec(bits=4, symmetric=False, scale_dtype="float16"),
    "group": TensorSpec(bits=3, granularity="group", group_size=8),
    "axis": TensorSpec(bits=4, axis=1),
    "tensor": TensorSpec(bits=8, granularity="tensor"),
    "mse": TensorSpec(bits=4, range_finder="mse", options={"candidates": 4}),
    "percentile": TensorSpec(bits=4, symmetric=False, range_finder="percentile", options={"percentile": 0.9}),
    "mask": TensorSpec(bits=4, range_finder="percentile", options={"percentile": 0.9, "ste": "mask"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TRACED)
def test_graphs_of_every_kind_of_spec(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_failed", True)
    spec = TRACED[name]
    call = torch.compile(build_quantizer(spec), fullgraph=True)
    for seed in range(50):
        x = rows(seed, dtype).nan_to_num(0, 1, -1)
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, wanted = call(one), fake_quantize(other, spec)
        assert same_bits(y, wanted), seed
        upstream = torch.randn_like(y)
        y.backward(upstream)
        wanted.backward(upstream)
        assert torch.equal(one.grad, other.grad), seed


def test_a_compiler_that_fails_warns_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    finder, grid = GRIDS["narrow"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(5):
            x = rows(seed, torch.float32)
            ours = compiled.run(reference.fake_quantize_dynamic, x, finder, grid, torch.float32)
            assert same_bits(ours, reference.fake_quantize_dynamic(x, finder, grid, torch.float32))
    assert len(caught) == 1
    assert "no C++ compiler here" in str(caught[0].message)
    assert "long story" not in str(caught[0].message)


def test_a_function_that_fails_when_called_warns_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError

    monkeypatch.setattr(compiled, "_compile", lambda *args: broken)
    x = rows(0, torch.float32)
    with pytest.warns(UserWarning, match="could not be compiled.*OSError"):
        first = fake_quantize(x, TensorSpec(bits=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_bits(fake_quantize(x, TensorSpec(bits=4)), first)


@pytest.mark.parametrize(("shape", "worth"), [((4, 8), 1000), ((1, 4000), 0)], ids=["little-work", "one-row"])
def test_what_is_not_worth_it_is_not_compiled(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], worth: int) -> None:
    monkeypatch.setattr(compiled, "WORTH_COMPILING", worth)
    monkeypatch.setattr(compiled, "_compile", lambda *args: pytest.fail("compiled"))
    fake_quantize(torch.randn(shape), TensorSpec(bits=4))
