"""Bandwidth of one fake quantization against a copy, which is the least that reading a tensor and writing it in another dtype costs."""

from typing import Any

import torch

from benchmarks.models import GROUP
from benchmarks.peers import formula
from benchmarks.timing import Calls, Spread, interleave, ratios, warm_up
from lightning_qat import TensorSpec
from lightning_qat.numerics.backends import reference
from lightning_qat.quantizers import build_quantizer

COPY = "copy"
VARIANTS = {
    COPY: "x.to(dtype, copy=True)",
    "ours": "the library's quantizer in eager mode (its own kernels)",
    "ours, plain torch": "the library's formula without kernels, what runs where there is no compiler",
    "formula": "peer: the plain formula in eager torch",
}
SHAPES = {"cpu": {"weight": (4096, 4096), "activation": (4096, 4096)}, "cuda": {"weight": (16384, 8192), "activation": (16384, 8192)}}
QUICK_SHAPE = (512, 1024)


def cases() -> list[tuple[str, TensorSpec, torch.dtype, torch.dtype]]:
    group: dict[str, Any] = {"granularity": "group", "group_size": GROUP}
    return [
        ("weight, channel", TensorSpec(bits=4, granularity="channel"), torch.float32, torch.bfloat16),
        (f"weight, group {GROUP}", TensorSpec(bits=4, **group), torch.float32, torch.bfloat16),
        ("activation, token", TensorSpec(bits=8, granularity="token"), torch.bfloat16, torch.bfloat16),
        (f"activation, group {GROUP}", TensorSpec(bits=8, **group), torch.bfloat16, torch.bfloat16),
    ]


def _calls(x: torch.Tensor, spec: TensorSpec, dtype: torch.dtype) -> Calls:
    quantizer = build_quantizer(spec)

    def rows() -> torch.Tensor:
        blocks = quantizer.blocking.split(x)
        return blocks.reshape(-1, blocks.shape[-1])

    return {
        COPY: lambda: x.to(dtype, copy=True),
        "ours": lambda: quantizer(x, dtype),
        "ours, plain torch": lambda: reference.fake_quantize_dynamic(rows(), quantizer.finder, quantizer.grid, dtype).view(x.shape),
        "formula": lambda: formula(rows(), int(spec.bits or 0)).to(dtype).view(x.shape),
    }


def time_op(rounds: int, device: str, quick: bool) -> list[dict[str, Any]]:
    """One row per case and variant."""
    out = []
    for case, spec, source, target in cases():
        shape = QUICK_SHAPE if quick else SHAPES[device][case.split(",")[0]]
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, source)
        print(f"op: {case}, {list(shape)}", flush=True)
        calls = _calls(x, spec, target)
        with torch.no_grad():
            warm_up(calls, 3, device)
            # One call is over sooner on CUDA than its launch and a synchronization; twenty in a row hide both.
            seconds = interleave(calls, rounds, device, repeats=20 if device == "cuda" else 2)
        moved = x.numel() * (source.itemsize + target.itemsize) / 1e9
        for name, ratio in ratios(seconds, COPY).items():
            bandwidth = Spread.of([moved / time for time in seconds[name]])
            out.append(
                {
                    "case": case,
                    "shape": list(shape),
                    "dtypes": [str(source).removeprefix("torch."), str(target).removeprefix("torch.")],
                    "variant": name,
                    "ratio": ratio.to_dict(),
                    "gigabytes_per_second": bandwidth.to_dict(),
                    "rounds": rounds,
                }
            )
            print(f"  {name:20s} {bandwidth.median:8.2f} GB/s, {ratio.median:.2f} of a copy's time", flush=True)
    return out
