"""Running ranges that stop following: at their step, after resume, and in a model that was calibrated before."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scheduled import ROWS, Recording, loader, trainer

from lightning_qat import QuantizationCallback, QuantScheme, TensorSpec, insert_quantizers
from lightning_qat.callbacks import DelayedStart, FreezeRanges
from lightning_qat.quantizers.running_range import freeze_ranges, merge_ranges

SCHEME = QuantScheme(weight=TensorSpec(bits=4), input=TensorSpec(bits=8, granularity="tensor", dynamic=False))


def high(module):
    return module.net[0].input_quantizer.running.high.item()


def maxima(batch_size):
    return [rows.abs().max().item() for rows in ROWS.split(batch_size)]


def test_ranges_follow_until_their_step():
    module = Recording(high)
    trainer(FreezeRanges(3), QuantizationCallback(SCHEME)).fit(module, loader())
    expected, value = [], 0.0
    for step, top in enumerate(maxima(4)):
        expected.append(value)
        if step < 3:
            value = top if step == 0 else 0.9 * value + 0.1 * top
    assert list(module.seen.values()) == pytest.approx(expected)
    assert module.seen[2] != module.seen[3] == module.seen[7]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_resume_is_exact_with_the_freeze_between(after, tmp_path):
    def fit(epochs, **kwargs):
        module = Recording(lambda module: [tensor.tolist() for tensor in module.net[2].input_quantizer.state_dict().values()])
        run = trainer(QuantizationCallback(SCHEME), FreezeRanges(2), steps=-1, max_epochs=epochs)
        run.fit(module, loader(32), **kwargs)
        return run, module

    (_, whole), (run, first) = fit(4), fit(after)
    run.save_checkpoint(tmp_path / "k.ckpt")
    _, second = fit(4, ckpt_path=tmp_path / "k.ckpt")
    assert first.seen | second.seen == whole.seen
    assert first.losses + second.losses == whole.losses
    with pytest.raises(MisconfigurationException, match=r"(?s)another schedule:.*FreezeRanges\.step: 2 in the checkpoint, 5 here"):
        trainer(QuantizationCallback(SCHEME), FreezeRanges(5)).fit(Recording(), loader(), ckpt_path=tmp_path / "k.ckpt")


def test_a_calibrated_model_is_frozen_from_the_start():
    module = Recording(high)
    insert_quantizers(module, SCHEME)
    module(ROWS)
    merge_ranges(module)
    trainer(QuantizationCallback(SCHEME), FreezeRanges(0), steps=3).fit(module, loader())
    assert set(module.seen.values()) == {ROWS.abs().max().item()}


def test_ranges_that_saw_nothing_cannot_be_frozen():
    with pytest.raises(MisconfigurationException, match=r"FreezeRanges\.step: got 0, but 2 ranges.*'net\.0\.input_quantizer'.*calibrate"):
        trainer(QuantizationCallback(SCHEME), FreezeRanges(0)).fit(Recording(), loader())
    with pytest.raises(MisconfigurationException, match=r"FreezeRanges\.step: got 2, but 2 ranges"):
        trainer(QuantizationCallback(SCHEME), DelayedStart(input=4), FreezeRanges(2)).fit(Recording(), loader())


def test_a_scheme_without_running_ranges_is_refused():
    with pytest.raises(MisconfigurationException, match=r"FreezeRanges: every range of the scheme is taken from the tensor at hand"):
        trainer(QuantizationCallback("w4a8"), FreezeRanges(2)).fit(Recording(), loader())
    with pytest.raises(ValueError, match=r"FreezeRanges\.step: got -1, expected an optimizer step"):
        FreezeRanges(-1)


def test_frozen_ranges_follow_again_when_let_go():
    module = Recording()
    insert_quantizers(module, SCHEME)
    for frozen, expected in ((False, 1.0), (True, 1.0), (False, 1.9)):
        freeze_ranges(module, frozen)
        module(torch.full((4, 16), 1.0 if expected == 1.0 and not frozen else 10.0))
        merge_ranges(module)
        assert high(module) == pytest.approx(expected)
