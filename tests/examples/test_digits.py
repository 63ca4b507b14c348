"""Accuracy promises on real images, through the code that users copy from `examples/`."""

import copy
import functools
import subprocess
import sys
from pathlib import Path
from statistics import mean

import lightning.pytorch as pl
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import digits_cnn
import digits_vit
from digits_data import QUIET, accuracy, digits, predictions, train_loader

from lightning_qat import QuantizationCallback, export, insert_quantizers, load_quantized

EXAMPLES = Path(digits_cnn.__file__).parent


@functools.cache  # modules are shared by the tests of this file and never changed by them
def trained_float(seed):
    return digits_cnn.train_float(seed)


@functools.cache
def trained(seed, scheme):
    return digits_cnn.finetune(copy.deepcopy(trained_float(seed)), scheme, seed)


def rounded(seed, scheme):
    module = copy.deepcopy(trained_float(seed))
    insert_quantizers(module, scheme)
    return module


SEEDS = [pytest.param((0, 1), id="two seeds"), pytest.param(range(5), id="five seeds", marks=pytest.mark.slow)]


@pytest.mark.parametrize("seeds", SEEDS)
def test_w4a4_loses_at_most_one_point(seeds):
    full = [accuracy(trained_float(seed)) for seed in seeds]
    low = [accuracy(trained(seed, "w4a4")) for seed in seeds]
    print(f"\nfull precision {full}\nw4a4 {low}")
    assert mean(full) > 97  # a bad teacher would make the next line cheap
    assert mean(low) >= mean(full) - 1.0


@pytest.mark.parametrize("seeds", SEEDS)
def test_training_beats_rounding_at_w2a4(seeds):
    untrained = [accuracy(rounded(seed, "w2a4")) for seed in seeds]
    low = [accuracy(trained(seed, "w2a4")) for seed in seeds]
    print(f"\nw2a4 rounded {untrained}\nw2a4 trained {low}")
    assert mean(low) > mean(untrained)


@pytest.mark.parametrize("scheme", ["w4a4", "w2a4"])
def test_reloaded_cnn_predicts_the_same(scheme, tmp_path):
    module = trained(0, scheme)
    reloaded = load_quantized(export(module, tmp_path / "out"), model=digits_cnn.DigitsCNN())
    assert torch.equal(predictions(reloaded), predictions(module))
    _, (images, _) = digits()
    with torch.no_grad():
        assert torch.equal(reloaded(images), copy.deepcopy(module).eval()(images))


def test_vit_is_quantized_trained_and_reloaded(tmp_path):
    torch.manual_seed(0)
    module = digits_vit.DigitsViT()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback = QuantizationCallback("w4a4")
    pl.Trainer(max_epochs=4, callbacks=[callback], **QUIET).fit(module, train_loader(0))
    assert callback.report.coverage > 0.9
    assert module.state_dict().keys() == before.keys()
    assert accuracy(module) > 40  # chance is 10
    reloaded = load_quantized(export(module, tmp_path / "out"), model=digits_vit.DigitsViT())
    assert torch.equal(predictions(reloaded), predictions(module))


@pytest.mark.slow
@pytest.mark.parametrize("example", ["digits_cnn", "digits_vit"])
def test_the_command_runs_and_reports(example, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{example}.py"), "--scheme", "w4a8", "--epochs", "1", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "predicts the same" in result.stdout
    assert (tmp_path / "out" / "manifest.json").is_file()
