"""Beside Lightning's own callbacks that watch, save and stop."""

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from regression import INPUTS, Regression, loader, quantized_layers, same_state, trainer

from lightning_qat import QuantizationCallback, insert_quantizers


def rounded(module, scheme="w4a8"):
    """A fresh quantized module with the weights of another."""
    twin = Regression()
    insert_quantizers(twin, scheme)
    twin.load_state_dict(module.state_dict())
    return twin


def test_the_best_checkpoint_is_that_of_the_quantized_network(tmp_path):
    keeper = ModelCheckpoint(dirpath=tmp_path, monitor="loss", save_top_k=2, save_last=True, filename="{epoch}-{loss:.6f}")
    module = Regression()
    run = trainer(keeper, QuantizationCallback("w4a8"), epochs=4, enable_checkpointing=True)
    run.fit(module, loader(), loader())
    assert len(list(tmp_path.glob("epoch*.ckpt"))) == 2
    assert same_state(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], dict(module.state_dict()))
    best = Regression.load_from_checkpoint(keeper.best_model_path, weights_only=True)
    best = rounded(best)
    expected = torch.stack([(best(batch) * 2).square().mean() for batch in loader()]).mean()
    assert keeper.best_model_score.item() == pytest.approx(expected.item(), rel=1e-6)
    for chosen in ("best", "last"):
        (scores,) = run.test(ckpt_path=chosen, dataloaders=loader(), verbose=False)
        assert scores["loss"] >= keeper.best_model_score.item() - 1e-7


def test_a_checkpoint_of_weights_alone_goes_on_as_weights(tmp_path):
    module = Regression()
    keeper = ModelCheckpoint(dirpath=tmp_path, save_weights_only=True, save_last=True)
    trainer(keeper, QuantizationCallback("w4a8"), enable_checkpointing=True).fit(module, loader())
    path = tmp_path / "last.ckpt"
    assert "callbacks" not in torch.load(path, weights_only=True)
    predicted = torch.cat(trainer(QuantizationCallback("w4a8")).predict(Regression(), loader(), ckpt_path=path))
    with torch.no_grad():
        assert torch.equal(predicted, module(INPUTS))


def test_early_stopping_stops_and_leaves_quantizers(tmp_path):
    module = Regression(lr=0.0)  # nothing ever improves
    run = trainer(EarlyStopping("loss", patience=1, mode="min"), QuantizationCallback("w4a8"), epochs=10)
    run.fit(module, loader(), loader())
    assert run.current_epoch == 2
    assert quantized_layers(module) == ["net.0", "net.2"]
    assert all(layer.keeps == "nothing" and layer.kept_weight is None for layer in (module.net[0], module.net[2]))


def test_the_learning_rate_is_logged(tmp_path):
    run = trainer(LearningRateMonitor("step"), QuantizationCallback("w4a8"), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(Regression(lr=0.02), loader())
    (metrics,) = tmp_path.rglob("metrics.csv")
    header, *rows = [line.split(",") for line in metrics.read_text().splitlines()]
    assert [float(row[header.index("lr-AdamW")]) for row in rows] == [0.02] * run.global_step
