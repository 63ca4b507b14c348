"""The ways a Trainer can be used: accumulation, clipping, manual optimization, several optimizers, limits, every stage in a row, DDP."""

import pytest
import torch
from gloo import run_ranks
from lightning.pytorch.strategies import DDPStrategy
from regression import INPUTS, Regression, loader, quantized_layers, same_state, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_qat import KVSpec, QuantizationCallback, QuantScheme, TensorSpec, insert_quantizers


def fitted(module, *callbacks, batch_size=4, **kwargs):
    run = trainer(QuantizationCallback("w4a8"), *callbacks, **kwargs)
    run.fit(module, loader(batch_size))
    return run


def by_hand(steps, clip=None, batch_size=4, accumulate=1):
    """The same training without Lightning."""
    module = Regression()
    insert_quantizers(module, "w4a8")
    optimizer = module.configure_optimizers()
    batches = [batch for _ in range(10) for batch in loader(batch_size)][: steps * accumulate]
    for i, batch in enumerate(batches):
        (module.training_step(batch, i) / accumulate).backward()
        if (i + 1) % accumulate == 0:
            if clip is not None:
                clip(module.parameters())
            optimizer.step()
            optimizer.zero_grad()
    return module.state_dict()


CLIPS = {
    "no": ({}, None),
    "norm": ({"gradient_clip_val": 0.01}, lambda p: nn.utils.clip_grad_norm_(p, 0.01)),
    "value": ({"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}, lambda p: nn.utils.clip_grad_value_(p, 0.001)),
}


@pytest.mark.parametrize(("settings", "clip"), CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_and_accumulation_are_those_of_a_loop_by_hand(settings, clip, accumulate):
    module = Regression()
    fitted(module, batch_size=2, accumulate_grad_batches=accumulate, **settings)
    expected = by_hand(8 // accumulate, clip, batch_size=2, accumulate=accumulate)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


class Manual(Regression):
    """Its own steps, with two optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        first, second = self.optimizers()
        self.manual_backward(loss)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.AdamW(self.net[i].parameters(), lr=self.lr) for i in (0, 2)]


def test_manual_optimization_with_two_optimizers_is_one_training():
    module, plain = Manual(), Regression()
    fitted(module)
    fitted(plain)
    assert same_state(module.state_dict(), plain.state_dict())


def test_kept_weights_follow_every_optimizer_of_a_manual_loop():
    class Alternating(Manual):
        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                loss = Regression.training_step(self, batch, batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                losses.append(loss.item())

    losses, module = [], Alternating()
    fitted(module)
    assert len(set(losses)) == len(losses) == 8


def test_limits_and_overfitting_on_one_batch():
    module = Regression()
    run = fitted(module, epochs=5, overfit_batches=1)
    assert run.global_step == 5
    assert quantized_layers(module) == ["net.0", "net.2"]
    few = trainer(QuantizationCallback("w4a8"), epochs=1, limit_train_batches=1, limit_val_batches=1)
    few.fit(Regression(), loader(), loader())
    assert few.global_step == 1
    quick = trainer(QuantizationCallback("w4a8"), fast_dev_run=True)
    quick.fit(Regression(), loader(), loader())
    assert quick.global_step == 1


def test_one_trainer_fits_twice_validates_tests_and_predicts(tmp_path):
    """PL#12896: `Trainer.test(ckpt_path=...)` of a run that was quantized."""
    module = Regression()
    run = fitted(module, epochs=1)
    run.save_checkpoint(tmp_path / "first.ckpt")
    after_one = Regression()
    insert_quantizers(after_one, "w4a8")
    after_one.load_state_dict(module.state_dict())
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    assert run.global_step == 4
    scores = [getattr(run, stage)(module, loader(), verbose=False)[0]["loss"] for stage in ("validate", "test")]
    assert scores[0] == scores[1]
    (before,) = run.test(module, loader(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    assert before["loss"] > scores[0]
    with torch.no_grad():
        assert torch.equal(torch.cat(run.predict(module, loader(), ckpt_path=tmp_path / "first.ckpt")), after_one(INPUTS))
        assert torch.equal(module(x=INPUTS, gain=2.0), after_one(INPUTS) * 2.0)  # PL#15862: the user's own signature


@pytest.mark.parametrize("second", ["w4", QuantScheme(kv=KVSpec(bits=4))], ids=["same", "kv"])
def test_two_quantization_callbacks_are_refused_by_name(second):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `QuantizationCallback`"):
        trainer(QuantizationCallback("w4"), QuantizationCallback(second))
    assert "One for a Trainer" in QuantizationCallback.__doc__  # where that message sends its reader


class Branches(Regression):
    """The second layer is used by every other batch."""

    def training_step(self, batch, batch_idx):
        out = self.net[0](batch) if batch_idx % 2 else self.net(batch)
        return out.square().mean()


def branches_on_two_ranks(find_unused):
    torch.manual_seed(0)
    module = Branches()
    strategy = DDPStrategy(find_unused_parameters=find_unused, process_group_backend="gloo")
    run = trainer(QuantizationCallback("w4a8"), epochs=2, strategy=strategy, devices=2, use_distributed_sampler=False)
    run.fit(module, loader(2))
    return {name: tensor.tolist() for name, tensor in module.state_dict().items()}


def test_ddp_with_parameters_that_a_batch_does_not_use():
    one, two = run_ranks(branches_on_two_ranks, True)
    assert one == two
    module = Branches()
    trainer(QuantizationCallback("w4a8"), epochs=2).fit(module, loader(2))  # both ranks saw the same batches
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(torch.tensor(one[name]), tensor, rtol=1e-5, atol=1e-6)


def test_ranges_follow_training_batches_alone():
    """PL#8540: observers went on in validation, test and prediction; and the sanity check is validation too."""
    far = DataLoader(INPUTS * 100, batch_size=4)
    static = QuantScheme(weight=TensorSpec(bits=4), input=TensorSpec(bits=8, granularity="tensor", dynamic=False))

    def ranges_after(val_loader, sanity):
        module = Regression()
        run = trainer(QuantizationCallback(static), num_sanity_val_steps=sanity)
        run.fit(module, loader(), val_loader)
        return run, module, {name: tensor.clone() for name, tensor in module.state_dict().items() if ".running." in name}

    run, module, watched = ranges_after(far, sanity=2)
    _, _, alone = ranges_after(None, sanity=0)
    assert watched["net.0.input_quantizer.running.high"] > 0
    assert same_state(watched, alone)
    for stage in ("validate", "test", "predict"):
        getattr(run, stage)(module, far)
        assert same_state({name: tensor for name, tensor in module.state_dict().items() if ".running." in name}, alone)
