"""The Triton kernels give the bits of the reference formulas.

The same tests run on a GPU (marked ``gpu``) and, in a process of its own, in Triton's interpreter on the CPU: what `triton.jit` makes of a
kernel is decided by the environment when triton is first imported.
"""

import ast
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_qat.numerics.backends import reference
from lightning_qat.numerics.grid import Grid
from lightning_qat.numerics.packing import pack_bits, unpack_bits
from lightning_qat.numerics.ranges import AbsMax, MinMax, scale_and_zero_point

pytest.importorskip("triton")
from lightning_qat.numerics.backends import triton_kernels, triton_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOURCE = Path(triton_kernels.__file__).read_text()
CODES = {
    "none": [(-8, 7, 7.3), (0, 255, 255)],
    "integer": [(-128, 127, 255)],
    "float": [(0, 255, 255)],
    "half": [(-2, 1, 1.5)],
}


def on_device(test):
    """Runs in the interpreter and on a GPU."""
    if INTERPRETED:
        return pytest.mark.filterwarnings("ignore::RuntimeWarning")(test)  # numpy speaks up where floats overflow
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def compiled_here(test):
    """Runs where kernels are compiled, not interpreted."""
    return pytest.mark.skipif(INTERPRETED, reason="runs outside the interpreter")(test)


def grids(zero: str) -> list[Grid]:
    """All codes, scale types and ways of dividing of a kind of zero."""
    every = itertools.product(CODES[zero], ("float32", "bfloat16", "float16"), ("divide", "reciprocal"))
    offset, zero = (0.5, "none") if zero == "half" else (0.0, zero)
    return [
        Grid(qmin=low, qmax=high, divisor=divisor, offset=offset, zero=zero, scale_dtype=stored, round_via=via, arithmetic=arithmetic)
        for (low, high, divisor), stored, via in every
        for arithmetic in (("float32", "input") if zero == "none" and not offset else ("float32",))
    ]


def late_grids() -> list[Grid]:
    """Grids whose scales are rounded after codes are computed."""
    every = itertools.product(CODES["none"], ("bfloat16", "float16"), ("divide", "reciprocal"))
    settings = {"scale_rounding": "after"}
    return [Grid(qmin=c[0], qmax=c[1], divisor=c[2], scale_dtype=stored, round_via=via, **settings) for c, stored, via in every]


FEW_GRIDS = [grids(zero)[i] for zero, i in itertools.product(CODES, (-1, 0, 3))]


def hard_rows(seed: int, n: int = 37) -> Tensor:
    """Rows [17, n] fp32: usual ones, and all that goes wrong."""
    x = torch.randn(17, n, generator=torch.Generator().manual_seed(seed))
    x[0] = 0.0
    x[1] = -3.25
    x[2, seed % n] = torch.nan
    x[3, (seed + 1) % n] = torch.inf
    x[4, (seed + 2) % n] = -torch.inf
    x[5] *= 1e-7  # below the smallest normal number of fp16
    x[6] *= 1e-39
    x[7] *= 3e4
    x[8] *= 1e38
    x[9] = x[9].abs() + 5
    x[10] = -x[10].abs()
    x[11] = torch.arange(n) / 2 - 4  # ties
    x[12, ::2] = -0.0
    x[13] = x[13].sign() * torch.finfo(torch.float32).max
    return x


def same(got: Tensor | None, wanted: Tensor | None, sign_of_zero: bool = True) -> bool:
    """The same bits; one NaN is as good as another."""
    if got is None or wanted is None:
        return got is wanted
    got = got.cpu()
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return False
    equal = (got == wanted) | (got != got) & (wanted != wanted)
    if sign_of_zero and got.is_floating_point():
        equal &= (got.signbit() == wanted.signbit()) | got.isnan()
    return bool(equal.all())


def check_dynamic(x: Tensor, finder: AbsMax | MinMax, grid: Grid, dtype: torch.dtype) -> None:
    """Which of two zeros is the largest of a row is for each reduction to say, also for two of torch."""
    there = x.to(DEVICE)
    wanted = [reference.fake_quantize_dynamic(x, finder, grid, dtype), *reference.encode_dynamic(x, finder, grid)]
    got = [triton_rows.fake_quantize_dynamic(there, finder, grid, dtype), *triton_rows.encode_dynamic(there, finder, grid)]
    assert [same(*pair, sign_of_zero=False) for pair in zip(got, wanted, strict=True)] == [True] * 4


def check_given(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, dtype: torch.dtype) -> None:
    there, scale_there, zero_there = x.to(DEVICE), scale.to(DEVICE), None if zero_point is None else zero_point.to(DEVICE)
    got = triton_rows.fake_quantize(there, scale_there, zero_there, grid, dtype)
    assert same(got, reference.fake_quantize(x, scale, zero_point, grid, dtype))
    got = triton_rows.outside_bits(there, scale_there, zero_there, grid)
    assert same(got, pack_bits(reference.outside(x, scale, zero_point, grid)))


@compiled_here
def test_in_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-m", "not gpu", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", CODES)
def test_every_grid_on_five_seeds(zero, dtype):
    x = torch.cat([hard_rows(seed) for seed in range(5)]).to(dtype)
    finder = AbsMax() if zero in ("none", "half") else MinMax()
    for grid in grids(zero) + (late_grids() if zero == "none" else []):
        check_dynamic(x, finder, grid, dtype)
        check_given(x, *scale_and_zero_point(*finder(x, grid), grid, x.dtype), grid, dtype)


@on_device
@pytest.mark.parametrize("grid", FEW_GRIDS, ids=str)
def test_the_other_finder_and_other_types(grid):
    other = MinMax() if grid.zero == "none" else AbsMax()
    for dtype, out in zip(DTYPES, DTYPES[1:] + DTYPES[:1], strict=True):
        check_dynamic(hard_rows(7).to(dtype), other, grid, out)


@on_device
@pytest.mark.parametrize("grid", FEW_GRIDS, ids=str)
def test_any_scale_may_be_given(grid):
    scale = torch.tensor([0.0, -0.0, 1e-38, 1e-30, -0.3, 1e-5, 0.1, 1.0, 1 / 3, 700.0, 1e20, 3e38, torch.nan, torch.inf, 0.7, 1e-3, 2.0])
    offered = {"none": None, "integer": torch.arange(17.0) * 1.3 - 9, "float": torch.linspace(-2, 2, 17) ** 3}[grid.zero]
    zero_point = None if offered is None else offered.unsqueeze(1)
    check_given(hard_rows(1), scale.unsqueeze(1), zero_point, grid, torch.float32)
    check_given(hard_rows(2).bfloat16(), scale.unsqueeze(1).flip(0), zero_point, grid, torch.float16)


@on_device
@pytest.mark.parametrize("shape", [(1, 1), (1, 257), (300, 1), (300, 3), (9, 17), (130, 128), (5, 8), (3, 2049), (1, 70_000)], ids=str)
def test_edge_shapes(shape):
    x = torch.randn(shape)
    for grid in FEW_GRIDS[4:9:4]:
        check_dynamic(x, MinMax(), grid, torch.float32)
        check_given(x, *scale_and_zero_point(*AbsMax()(x, grid), grid, x.dtype), grid, torch.bfloat16)


@on_device
@pytest.mark.parametrize("few_rows", [1, 64], ids=["in the kernel", "by torch"])
def test_rows_that_fit_into_no_tile(monkeypatch, few_rows):
    monkeypatch.setattr(triton_rows, "LONGEST_TILE", 4096)
    monkeypatch.setattr(triton_rows, "FEW_ROWS", few_rows)
    x = torch.randn(3, 20_000).bfloat16()
    x[1, 17_001] = torch.nan
    for grid, finder in zip(FEW_GRIDS[1::3], (AbsMax(), MinMax()) * 2, strict=True):
        check_dynamic(x, finder, grid, torch.bfloat16)


@on_device
def test_strided_rows_and_empty_ones():
    grid, wide = FEW_GRIDS[4], torch.randn(20, 60)
    for x in (wide[:, 7:44], wide[::3], wide.T, wide[:, ::2], wide[:1].expand(8, 60)):
        there = x.to(DEVICE)
        assert same(
            triton_rows.fake_quantize_dynamic(there, MinMax(), grid, x.dtype), reference.fake_quantize_dynamic(x, MinMax(), grid, x.dtype)
        )
    for shape in ((0, 8), (4, 0)):
        x = torch.empty(shape, device=DEVICE)
        codes, scale, _ = triton_rows.encode_dynamic(x, MinMax(), grid)
        assert codes.shape == shape
        assert triton_rows.fake_quantize_dynamic(x, MinMax(), grid, torch.float16).shape == shape
        assert triton_rows.fake_quantize(x, scale, scale, grid, torch.float16).shape == shape
        bits = triton_rows.outside_bits(x, scale, scale, grid)
        assert bits.shape == (shape[0], shape[1] // 8)
        assert triton_rows.masked_gradient(x, bits, torch.float16).shape == shape


@on_device
def test_one_scale_for_all_rows_and_double_precision():
    x, grid = torch.randn(20, 33), FEW_GRIDS[1]
    check_given(x, torch.tensor([[0.3]]), None, grid, torch.float32)
    check_given(x, torch.tensor([[0.3]], dtype=torch.float64), None, grid, torch.float32)
    check_dynamic(x.double(), AbsMax(), grid, torch.float64)
    check_dynamic(x, AbsMax(), grid, torch.float64)


@on_device
@pytest.mark.parametrize("n", [1, 8, 37, 3000])
def test_masked_gradient(n):
    for dtype, out in itertools.product(DTYPES, (*DTYPES, torch.float64)):
        grad, bits = hard_rows(3, n).to(dtype), torch.rand(17, n) < 0.5
        mask = pack_bits(bits)
        assert same(triton_rows.masked_gradient(grad.to(DEVICE), mask.to(DEVICE), out), grad.to(out).masked_fill(unpack_bits(mask, n), 0))
    grad = torch.randn(n, 17).T
    assert same(triton_rows.masked_gradient(grad.to(DEVICE), mask.to(DEVICE), grad.dtype), grad.masked_fill(bits, 0))


@on_device
def test_compiled_graphs_see_one_op():
    x, grid = hard_rows(0).to(DEVICE), FEW_GRIDS[4]

    def everything(x: Tensor) -> tuple[Tensor, ...]:
        codes, scale, zero_point = triton_rows.encode_dynamic(x, MinMax(), grid)
        bits = triton_rows.outside_bits(x, scale, zero_point, grid)
        values = triton_rows.fake_quantize_dynamic(x, MinMax(), grid, torch.float16)
        return codes, values, triton_rows.masked_gradient(triton_rows.fake_quantize(x, scale, zero_point, grid, x.dtype), bits, x.dtype)

    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True, dynamic=True)
    assert all(same(got, wanted.cpu()) for got, wanted in zip(compiled(x), everything(x), strict=True))


def test_which_finders_are_taken():
    assert triton_rows.supports(AbsMax())
    assert triton_rows.supports(MinMax())
    assert not triton_rows.supports(lambda blocks, grid: (blocks, blocks))


@compiled_here
def test_only_tiles_that_hold_a_row_are_tried():
    tried = {cols: len(triton_rows._worth_trying(triton_rows.CONFIGS, {}, COLS=cols, OUT="values")) for cols in (16, 2048, 4096, 16_384)}
    assert tried == {16: 4, 2048: 3, 4096: 2, 16_384: 1}


def test_no_kernel_divides_with_the_bare_operator():
    assert not [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Div)]


def test_indices_start_as_int64():
    assert SOURCE.count("tl.program_id(") == SOURCE.count("tl.program_id(0).to(tl.int64)") == 4


@compiled_here
@pytest.mark.parametrize("grid", [*grids("none")[:2], grids("integer")[3], grids("float")[4], late_grids()[1]], ids=str)
@pytest.mark.parametrize("kernel", ["dynamic_kernel", "given_kernel", "scale_kernel", "gradient_kernel"])
def test_the_machine_code_rounds_every_step(kernel, grid, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = machine_code(kernel, grid)
    assert "fma" not in code
    assert "ftz" not in code
    assert not re.search(r"\b(div|rcp)\.(full|approx)", code)
    assert ("div.rn.f32" in code) == (kernel != "gradient_kernel")


def machine_code(kernel: str, grid: Grid) -> str:
    """What the compiler makes of a kernel for one grid; needs no GPU."""
    import triton

    constants = triton_rows._constants(
        grid, torch.bfloat16, "QMIN", "QMAX", "DIVISOR", "OFFSET", "ZERO", "SCALE_DTYPE", "RECIPROCAL", "LATE_DTYPE"
    )
    constants |= {"LIMIT": 65504.0, "OUT": "values", "ABSMAX": False, "LONG": False, "COLS": 64, "ELEMENTS": 1024, "ROWS": 64}
    types = {"x": "*i16", "grad": "*fp32", "out": "*fp16", "mask": "*u8", "rows": "i32", "n": "i32", "stride": "i64"}
    function = getattr(triton_kernels, kernel)
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in function.arg_names}
    source = triton.compiler.ASTSource(function, signature, {(i,): constants[n] for i, n in enumerate(signature) if n in constants})
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
