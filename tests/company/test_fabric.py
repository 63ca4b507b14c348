"""Quantizers in a Lightning Fabric loop, through the code that users copy from `examples/`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gloo import run_ranks
from lightning.fabric import Fabric

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import fabric_qat
from digits_data import digits

from lightning_qat import QuantScheme, TensorSpec, export, insert_quantizers, load_quantized, named_quantizers

STATIC = QuantScheme(weight=TensorSpec(bits=4), input=TensorSpec(bits=8, granularity="tensor", dynamic=False))


def test_the_example_trains_exports_and_reads_back(tmp_path):
    model, rows = fabric_qat.run(Fabric(accelerator="cpu", devices=1), "w2a4", epochs=3)
    assert rows["full precision"] > 90
    assert rows["trained in a Fabric loop"] > rows["rounded to nearest, not trained"]
    assert rows["trained in a Fabric loop"] > 85
    loaded = load_quantized(export(model, tmp_path / "out"), model=fabric_qat.network())
    assert torch.equal(fabric_qat.predictions(loaded), fabric_qat.predictions(model))


def test_a_fabric_step_is_the_step_of_a_plain_loop():
    def trained(loop):
        torch.manual_seed(0)
        model = fabric_qat.network()
        insert_quantizers(model, "w4a8")
        return loop(model).state_dict()

    def plain(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for images, labels in fabric_qat.train_loader(0):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        return model

    fabric = Fabric(accelerator="cpu", devices=1)
    ours, expected = trained(lambda model: fabric_qat.train(fabric, model, 1, 1e-2, 0)), trained(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


def one_epoch():
    """What a rank has at the end: weights, ranges, and the largest input it was given itself."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    torch.manual_seed(fabric.global_rank)  # DDP hands out the weights of rank 0
    model = fabric_qat.network()
    insert_quantizers(model, STATIC)
    seen = []
    model[5].register_forward_pre_hook(lambda layer, args: seen.append(args[0].max().item()))
    fabric_qat.train(fabric, model, 1, 1e-2, 0)
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}, seen


def test_two_processes_share_weights_and_ranges():
    (one, seen), (two, seen_there) = run_ranks(one_epoch)
    assert one == two
    assert seen != seen_there
    assert len(seen) == len(seen_there) == 9  # half of the 19 batches each
    model = fabric_qat.network()
    insert_quantizers(model, STATIC)
    momentum = next(quantizer.running.momentum for name, quantizer in named_quantizers(model) if name == "5.input_quantizer")
    high, *widest = (max(pair) for pair in zip(seen, seen_there, strict=True))
    for value in widest:
        high = momentum * high + (1 - momentum) * value
    assert one["5.input_quantizer.running.high"] == pytest.approx([high], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1", "2"])
def test_the_command_runs_and_reports(devices, tmp_path):
    command = [sys.executable, fabric_qat.__file__, "--epochs", "1", "--devices", devices, "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert result.stdout.count("trained in a Fabric loop") == 1
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert len(digits()[1][1]) == 540
