"""Quantization that begins later: what is in force at each step, in validation, after resume, in compiled models and on two ranks."""

import json

import lightning.pytorch as pl
import pytest
import torch
from gloo import run_ranks
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import llama, mlp, token_ids
from scheduled import ROWS, Recording, loader, trainer
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from lightning_qat import QuantizationCallback, named_quantizers
from lightning_qat.callbacks import DelayedStart
from lightning_qat.callbacks.schedule import quantizers_by_role
from lightning_qat.modules.weights import full_weight


def enabled(module):
    """Role -> whether all of its quantizers are on."""
    roles = {}
    for _, role, quantizer in quantizers_by_role(module):
        roles.setdefault(role, set()).add(quantizer.enabled)
    assert all(len(states) == 1 for states in roles.values())
    return {role: states.pop() for role, states in roles.items()}


@pytest.mark.parametrize("first", [True, False])
def test_each_role_begins_at_its_step(first):
    module, delay = Recording(enabled), DelayedStart(weight=2, input=5)
    callbacks = [delay, QuantizationCallback("w4a8")]
    trainer(*callbacks if first else reversed(callbacks)).fit(module, loader())
    assert module.seen == {step: {"weight": step >= 2, "input": step >= 5} for step in range(8)}


def test_before_the_start_the_model_trains_in_full_precision():
    plain, module = Recording(), Recording()
    trainer(steps=4).fit(plain, loader())
    trainer(QuantizationCallback("w4a8"), DelayedStart(weight=4, input=4), steps=5).fit(module, loader())
    assert module.losses[:4] == plain.losses
    trainer(steps=5).fit(plain := Recording(), loader())
    assert module.losses[4] != plain.losses[4]


class Language(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.seen = llama().train(), []

    def training_step(self, batch, batch_idx):
        self.seen.append(enabled(self))
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_keys_and_values_begin_later():
    module = Language()
    trainer(QuantizationCallback("w4a8kv4"), DelayedStart(kv=1), steps=2).fit(module, DataLoader(token_ids(4), batch_size=2))
    assert module.seen == [{"weight": True, "input": True, "kv": False}, {"weight": True, "input": True, "kv": True}]


def test_steps_are_optimizer_steps():
    module = Recording(enabled)
    run = trainer(QuantizationCallback("w4a8"), DelayedStart(input=1), steps=2, accumulate_grad_batches=4)
    run.fit(module, loader())
    assert module.seen == {0: {"weight": True, "input": False}, 1: {"weight": True, "input": True}}
    assert len(module.losses) == 8


def test_validation_finds_the_state_of_the_last_step_trained():
    module = Recording(enabled)
    run = trainer(QuantizationCallback("w4a8"), DelayedStart(input=4), num_sanity_val_steps=1, val_check_interval=2)
    run.fit(module, loader(), loader(32))
    states = [(step, state["input"]) for step, state in module.validated]
    assert states == [(0, False), (2, False), (4, False), (6, True), (8, True)]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_resume_is_exact_with_a_start_between(after, tmp_path):
    """One batch an epoch, so that Lightning's own loader resumes at the right place; a validation after each."""

    def fit(epochs, **kwargs):
        module = Recording(enabled)
        run = trainer(QuantizationCallback("w4a8"), DelayedStart(weight=2, input=3), steps=-1, max_epochs=epochs)
        run.fit(module, loader(32), loader(32), **kwargs)
        return run, module

    (_, whole), (run, first) = fit(5), fit(after)
    run.save_checkpoint(tmp_path / "k.ckpt")
    _, second = fit(5, ckpt_path=tmp_path / "k.ckpt")
    assert first.seen | second.seen == whole.seen
    assert first.validated + second.validated == whole.validated
    assert first.losses + second.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize(("steps", "expected"), [(3, False), (5, True)])
def test_a_checkpoint_is_validated_in_the_state_it_was_trained_in(steps, expected, tmp_path):
    callbacks = [QuantizationCallback("w4a8"), DelayedStart(input=4)]
    settings = {"steps": -1, "max_epochs": 1, "limit_train_batches": steps}
    run = trainer(*callbacks, **settings)
    run.fit(trained := Recording(), loader())
    run.save_checkpoint(tmp_path / "k.ckpt")
    module = Recording(enabled)
    other = trainer(QuantizationCallback("w4a8"), DelayedStart(input=4))
    other.validate(module, loader(32), ckpt_path=tmp_path / "k.ckpt", verbose=False)
    assert module.validated[0][1]["input"] is expected
    assert torch.equal(module(ROWS), trained(ROWS))
    (state,) = (s for key, s in torch.load(tmp_path / "k.ckpt", weights_only=True)["callbacks"].items() if "DelayedStart" in key)
    assert json.loads(json.dumps(state)) == state


def test_another_schedule_is_refused_with_the_difference(tmp_path):
    run = trainer(QuantizationCallback("w4a8"), DelayedStart(input=1), steps=2)
    run.fit(Recording(), loader())
    run.save_checkpoint(tmp_path / "k.ckpt")
    with pytest.raises(MisconfigurationException, match=r"(?s)another schedule:.*DelayedStart\.input: 1 in the checkpoint, 3 here"):
        trainer(QuantizationCallback("w4a8"), DelayedStart(input=3)).fit(Recording(), loader(), ckpt_path=tmp_path / "k.ckpt")
    delay = DelayedStart(input=1)
    with pytest.raises(MisconfigurationException, match="version 0, expected 1"):
        delay.load_state_dict(delay.state_dict() | {"format_version": 0})


# ---------------------------------------------------------------- kept weights and compiled graphs


def test_kept_weights_are_dropped_when_a_quantizer_is_switched():
    """Micro-batches of one step share a quantized weight; the next step must not."""
    kept, plain = Recording(), Recording()
    callbacks = [QuantizationCallback("w4"), DelayedStart(weight=1)]
    trainer(*callbacks, steps=2, accumulate_grad_batches=2).fit(kept, loader(8))
    trainer(QuantizationCallback("w4"), DelayedStart(weight=1), steps=2).fit(plain, loader(16))
    assert sum(kept.losses[2:]) / 2 == pytest.approx(plain.losses[1], rel=1e-5)


def test_a_compiled_model_is_compiled_anew():
    torch._dynamo.reset()
    eager, compiled = Recording(), Recording()
    compiled.net = torch.compile(compiled.net, backend="eager", fullgraph=True)
    for module in (eager, compiled):
        trainer(QuantizationCallback("w4a8"), DelayedStart(weight=2, input=4), steps=6).fit(module, loader())
    assert compiled.losses == eager.losses


# ---------------------------------------------------------------- learned scales


def test_a_disabled_learned_scale_is_left_alone(learned_scheme):
    gains = []

    def look(module):
        gains.append({name: q.gain.item() for name, q in named_quantizers(module.net)})

    module = Recording(look)
    run = trainer(QuantizationCallback(learned_scheme), DelayedStart(weight=3, input=5))
    run.fit(module, loader())
    for name in gains[0]:
        start = 3 if "weight" in name else 5
        values = [step[name] for step in gains]
        assert values[: start + 1] == [1.0] * (start + 1), name
        assert len(set(values[start:])) == len(values[start:]), name
        state = run.optimizers[0].state[module.net.get_submodule(name.removeprefix("net.")).gain]
        assert int(state["step"]) == 8 - start


class Ranked(Recording):
    """Float64, and rank r reads every second row; FSDP2 shards each quantizer on its own (fp32 scales, float64 weights), then the rest."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is not None:
            return
        self.net = mlp().double().train()
        self.after_build()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for module in (*(quantizer for _, quantizer in list(named_quantizers(self.net))), self.net):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self):
        world = self.trainer.world_size
        sampler = DistributedSampler(ROWS, num_replicas=world, rank=self.trainer.global_rank, shuffle=False)
        return DataLoader(ROWS.double(), batch_size=8 // world, sampler=sampler)


def train_ranked(scheme, strategy, devices):
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    module = Ranked()
    settings = {"strategy": strategy, "devices": devices, "use_distributed_sampler": False, "steps": 4, "max_epochs": 1}
    trainer(QuantizationCallback(scheme), DelayedStart(weight=2, input=3), **settings).fit(module)
    return {name: full_weight(p.detach()).clone().numpy() for name, p in module.named_parameters()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_delayed_learned_scales_like_one(strategy, learned_scheme):
    one = train_ranked(learned_scheme, "auto", 1)
    for rank in run_ranks(train_ranked, learned_scheme, strategy, 2):
        assert rank.keys() == one.keys()
        for name, values in rank.items():
            assert values == pytest.approx(one[name], rel=1e-5, abs=1e-7), name
    assert one["net.0.weight_quantizer.gain"].item() != 1.0


# ---------------------------------------------------------------- refusals


def test_bad_steps_are_refused():
    for bad in (-1, 1.5, "3", True, None):
        with pytest.raises(ValueError, match=r"DelayedStart\.input: got .*, expected an optimizer step"):
            DelayedStart(input=bad)
    with pytest.raises(ValueError, match="nothing is delayed"):
        DelayedStart()


def test_a_trainer_without_quantization_is_refused():
    with pytest.raises(MisconfigurationException, match=r"DelayedStart: the Trainer has no QuantizationCallback"):
        trainer(DelayedStart(weight=1)).fit(Recording(), loader())


def test_a_role_that_the_scheme_does_not_have_is_refused():
    with pytest.raises(MisconfigurationException, match=r"DelayedStart\.kv: got 3, but the scheme has no kv"):
        trainer(QuantizationCallback("w4a8"), DelayedStart(kv=3)).fit(Recording(), loader())


def test_a_step_that_is_never_reached_is_warned_about():
    with pytest.warns(UserWarning, match=r"DelayedStart: step 8 is never reached, the Trainer stops at max_steps=8"):
        trainer(QuantizationCallback("w4a8"), DelayedStart(weight=8)).fit(Recording(), loader())
