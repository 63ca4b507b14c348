"""The running range of static quantizers: what moves it, what does not, and that all ranks end with the same."""

import copy
import io
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import TensorSpec, fake_quantize
from lightning_qat.quantizers import Quantizer, build_quantizer
from lightning_qat.quantizers.running_range import RunningRange, merge_ranges

STATIC = {"granularity": "tensor", "dynamic": False}


def static(momentum: float = 0.9, **fields: object) -> Quantizer:
    return build_quantizer(TensorSpec(bits=8, options={"momentum": momentum}, **STATIC, **fields))


def state(quantizer: Quantizer) -> tuple[float, float, float]:
    running = quantizer.running
    return running.low.item(), running.high.item(), running.batches.item()


def batch(low: float, high: float) -> Tensor:
    return torch.tensor([[low, 0.0, high], [low / 2, high / 4, 0.0]])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_arithmetic_of_the_moving_average(momentum: float) -> None:
    quantizer = static(momentum, symmetric=False)
    low = high = None
    for new_low, new_high in ((-1.0, 2.0), (-3.0, 1.0), (0.0, 8.0), (-0.25, 0.5)):
        quantizer(batch(new_low, new_high))
        merge_ranges(quantizer)
        low = new_low if low is None else momentum * low + (1 - momentum) * new_low
        high = new_high if high is None else momentum * high + (1 - momentum) * new_high
        assert state(quantizer)[:2] == pytest.approx((low, high), rel=1e-6)
    assert state(quantizer)[2] == 4


def test_the_first_batch_is_quantized_by_its_own_range_and_later_ones_by_the_running_one() -> None:
    quantizer, first, later = static(), batch(-1, 2), batch(-8, 4)
    dynamic = TensorSpec(bits=8, granularity="tensor")
    assert torch.equal(quantizer(first), fake_quantize(first, dynamic))
    merge_ranges(quantizer)
    assert quantizer(later).abs().max() == 2  # what lies outside is clamped
    assert torch.equal(quantizer.codes(later).dequantize(), quantizer(later))
    assert quantizer.codes(first).scale.item() == pytest.approx(2 / 127)
    merge_ranges(quantizer)
    assert state(quantizer)[1] == pytest.approx(0.9 * 2 + 0.1 * 8)


def test_nothing_moves_before_the_batch_is_merged_or_in_evaluation() -> None:
    quantizer = static()
    quantizer(batch(-1, 1))
    merge_ranges(quantizer)
    before = state(quantizer)
    quantizer(batch(-50, 50))
    assert state(quantizer) == before
    merge_ranges(quantizer)
    moved = state(quantizer)
    quantizer.eval()
    quantizer(batch(-500, 500))
    merge_ranges(quantizer)
    assert state(quantizer) == moved != before


def test_codes_in_evaluation_leave_the_range_alone() -> None:
    quantizer = static().eval()
    quantizer.codes(batch(-1, 1))
    merge_ranges(quantizer)
    assert state(quantizer) == (0, 0, 0)


def test_recomputed_activations_and_micro_batches_count_once() -> None:
    once, often = static(), static()
    for low, high in ((-1, 1), (-2, 4)):
        once(batch(low, high))
        for share in (0.5, 1.0, 1.0, 0.25):
            x = (batch(low, high) * share).requires_grad_()
            torch.utils.checkpoint.checkpoint(often, x, use_reentrant=False).sum().backward()
        merge_ranges(once)
        merge_ranges(often)
    assert state(once) == state(often)


def test_merging_finds_every_range_and_counts_a_batch_once() -> None:
    model = nn.ModuleDict({"a": static(), "b": nn.Sequential(nn.Linear(3, 3), static(symmetric=False)), "dynamic": nn.ReLU()})
    model["a"](batch(-1, 3))
    model["b"](batch(-1, 3))
    merge_ranges(model)
    merge_ranges(model)  # nothing new
    assert state(model["a"]) == (-3, 3, 1)
    assert state(model["b"][1])[2] == 1


def test_what_is_not_finite_is_nan_and_does_not_poison_the_range() -> None:
    quantizer = static(0.5)
    quantizer(batch(-1, 1))
    merge_ranges(quantizer)
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert quantizer(batch(bad, 1)).isnan().all()
        merge_ranges(quantizer)
    assert state(quantizer) == (-1, 1, 1)
    quantizer(batch(-3, 3))
    merge_ranges(quantizer)
    assert state(quantizer) == (-2, 2, 2)


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)])
def test_converting_a_model_keeps_the_range_in_float32(convert: object) -> None:
    quantizer = static()
    quantizer(batch(-1.2345678, 0))
    merge_ranges(quantizer)
    before = state(quantizer)
    convert(nn.Sequential(quantizer))
    assert state(quantizer) == before
    assert all(buffer.dtype == torch.float32 for buffer in quantizer.buffers())
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = batch(-0.5, 1).to(dtype)
        assert quantizer(x).dtype == dtype
        assert torch.equal(quantizer.codes(x).dequantize(), quantizer(x))


def test_a_model_made_on_the_meta_device_moves_its_range() -> None:
    with torch.device("meta"):
        quantizer = static()
    assert all(buffer.is_meta for buffer in quantizer.buffers())
    quantizer.to_empty(device="cpu")
    assert all(buffer.device.type == "cpu" for buffer in quantizer.buffers())


def test_the_state_round_trips_and_holds_no_half_seen_batch() -> None:
    quantizer = static()
    quantizer(batch(-1, 3))
    merge_ranges(quantizer)
    quantizer(batch(-9, 9))
    assert set(quantizer.state_dict()) == {"running.low", "running.high", "running.batches"}
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    fresh = static()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert state(fresh) == state(quantizer)
    assert torch.equal(fresh.eval()(batch(-2, 2)), quantizer.eval()(batch(-2, 2)))
    merge_ranges(fresh)
    assert state(fresh) == (-3, 3, 1)
    assert state(copy.deepcopy(quantizer)) == state(quantizer)


@pytest.mark.parametrize("fields", [{"range_finder": "percentile"}, {"range_finder": "mse"}, {"code_range": "unsigned"}], ids=str)
def test_other_range_finders_and_grids(fields: dict) -> None:
    quantizer = static(**fields)
    x = torch.rand(4, 500)
    wanted = fake_quantize(x, TensorSpec(bits=8, granularity="tensor", **fields))
    assert torch.equal(quantizer(x), wanted)
    merge_ranges(quantizer)
    assert torch.equal(quantizer.eval()(x), wanted)


def test_float_zero_points_are_remembered_too() -> None:
    quantizer, x = static(symmetric=False, zero_point="float"), torch.rand(3, 8) + 5
    wanted = quantizer(x)
    merge_ranges(quantizer)
    assert state(quantizer)[:2] == (x.min(), x.max())
    assert torch.equal(quantizer.eval()(x), wanted)


def test_static_quantizers_are_not_shared_between_siblings() -> None:
    assert not static().can_share
    assert build_quantizer(TensorSpec(bits=8)).can_share


def _rank(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    running, idle = RunningRange(0.5), RunningRange(0.5)
    for step in range(3):
        running(torch.tensor([[-1.0 - rank]]), torch.tensor([[10.0 * step + 1 - rank]]))
        if rank == 1 and step == 1:  # only one rank sees a batch here
            idle(torch.tensor([[-4.0]]), torch.tensor([[4.0]]))
        running.merge()
        idle.merge()
    states = [(m.low.item(), m.high.item(), m.batches.item()) for m in (running, idle)]
    torch.save(states, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_all_ranks_end_with_the_widest_range(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one == other == [(-2, 0.25 * 1 + 0.25 * 11 + 0.5 * 21, 3), (-4, 4, 1)]
