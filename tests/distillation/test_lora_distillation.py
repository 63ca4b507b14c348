"""A student with LoRA adapters: only they are trained, and what is exported is what was trained, on one process and on two."""

import os
import sys

import lightning.pytorch as pl
import pytest
import torch
from gloo import run_ranks
from lightning.pytorch.strategies import ModelParallelStrategy
from models import VOCABULARY, gpt2, llama, tied_llama, token_ids
from peft import LoraConfig, inject_adapter_in_model  # here, and not in each of the forked processes
from torch.utils.data import DataLoader

from lightning_qat import (
    DistillationModule,
    LoraSettings,
    QuantizationCallback,
    export,
    insert_quantizers,
    load_quantized,
    merge_lora,
    remove_quantizers,
)
from lightning_qat.distillation.lora import add_lora
from lightning_qat.modules.weights import full_weight, layer_weights

IDS = token_ids()
SMALL = LoraSettings(rank=4, alpha=8)
BATCH, STEPS = 4, 4


def module_of(lora=SMALL, **options):
    return DistillationModule(tied_llama(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), lora=lora, **options)


def loader(world=1, steps=STEPS):
    rank = int(os.environ.get("RANK", "0"))
    ids = torch.randint(3, VOCABULARY, (steps * BATCH, 12), generator=torch.Generator().manual_seed(1))
    return DataLoader([{"input_ids": row} for row in ids[rank::world]], batch_size=BATCH // world, shuffle=False)


class Losses(pl.Callback):
    """The loss of every step, the mean over ranks."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean").item())


def trainer(*callbacks, world=1, steps=STEPS, strategy="auto", scheme="w4a8kv4"):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    counts = {"devices": world, "max_steps": steps, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    return pl.Trainer(accelerator="cpu", strategy=strategy, callbacks=[QuantizationCallback(scheme), *callbacks], **counts, **quiet)


def codes_of(model):
    return {weight.name: weight.codes().codes for weight in layer_weights(model)}


def same(ones, others):
    assert ones.keys() == others.keys()
    return all(torch.equal(tensor, others[name]) for name, tensor in ones.items())


# ---------------------------------------------------------------- adapters


def test_adapters_change_nothing_yet_and_everything_else_is_frozen():
    student, wanted = llama(), llama()(input_ids=IDS).logits
    before = torch.get_rng_state()
    add_lora(student, SMALL)
    assert torch.equal(before, torch.get_rng_state())
    assert type(student) is type(llama())
    assert torch.equal(student(input_ids=IDS).logits, wanted)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in student.named_parameters() if "lora_" in name}
    assert len(trained) == 2 * 14  # every linear layer but the head
    layer = student.model.layers[0].mlp.down_proj
    assert (tuple(layer.lora_A["default"].weight.shape), tuple(layer.lora_B["default"].weight.shape)) == ((4, 48), (32, 4))
    assert layer.scaling["default"] == 2.0


def test_the_seed_tells_what_adapters_begin_with():
    drawn = []
    for noise, seed in ((1, 0), (2, 0), (1, 7)):
        torch.manual_seed(noise)
        student = llama()
        add_lora(student, LoraSettings(rank=2, seed=seed))
        drawn.append(student.model.layers[0].mlp.up_proj.lora_A["default"].weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_targets_may_be_named_and_adapters_of_a_bf16_model_are_fp32():
    student = llama().bfloat16()
    add_lora(student, LoraSettings(rank=2, targets=["q_proj", "1.mlp.up_proj"]))
    adapters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].removeprefix("model.layers.") for name in adapters} == {
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "1.mlp.up_proj",
    }
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    assert student.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"LoraSettings\.rank: got 0, allowed are 1 and more"),
        ({"alpha": 0.0}, r"LoraSettings\.alpha: got 0\.0"),
        ({"alpha": float("nan")}, r"LoraSettings\.alpha: got nan"),
        ({"targets": "q_proj"}, r"LoraSettings\.targets: got 'q_proj', expected a list of names or 'all-linear'"),
        ({"targets": ()}, r"LoraSettings\.targets: got \(\), expected names"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)


def test_settings_survive_as_plain_data():
    settings = LoraSettings(rank=3, targets=["q_proj"])
    assert LoraSettings.parse(vars(settings)) == settings == LoraSettings.parse(settings)


def quantized():
    model = llama()
    insert_quantizers(model, "w4a8")
    return model


def adapted():
    return inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), llama())


REFUSED = {
    "unknown-target": (llama, {"targets": ["q_prj"]}, r"LoraSettings\.targets: 'q_prj' matches nothing.*did you mean 'q_proj'"),
    "quantized": (quantized, {}, "lora: the student holds quantizers already"),
    "adapted": (adapted, {}, "lora: the student holds adapters already"),
    "conv1d": (gpt2, {}, "has an adapter on a Conv1D, allowed is nn.Linear"),
    "tied": (tied_llama, {"targets": ["lm_head"]}, "lm_head: has an adapter, but shares its weight with model.embed_tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_students_that_cannot_have_adapters_are_refused(case):
    build, settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        add_lora(build(), LoraSettings(**settings))


def test_a_missing_peft_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora: needs PEFT; pip install 'lightning-qat\[lora\]'"):
        module_of()


def test_deferred_weights_are_refused(tmp_path):
    tied_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="defer_loading: cannot be combined with lora"):
        DistillationModule(str(tmp_path), lora=SMALL, defer_loading=True)


# ---------------------------------------------------------------- training


def test_only_adapters_are_trained_and_the_checkpoint_is_exported_as_trained(tmp_path):
    module, losses = module_of(), Losses()
    run = trainer(losses, steps=20)
    run.fit(module, DataLoader(loader(steps=1).dataset * 20, batch_size=BATCH))  # one batch over and over
    assert sum(losses.values[-3:]) < sum(losses.values[:3])
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for name, p in module.student.named_parameters() if "lora_" in name}
    plain, moved = dict(tied_llama().named_parameters()), 0
    for name, parameter in module.student.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, plain[name.replace(".base_layer", "")]), name
        moved += "lora_B" in name and bool(parameter.any())
    assert moved == 14
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt", teacher=tied_llama()).eval()
    module.eval()
    wanted, trained = module(IDS), codes_of(module.student)
    assert torch.equal(loaded(IDS), wanted)
    assert same(codes_of(merge_lora(loaded.student)), trained)
    found = load_quantized(export(loaded.student, tmp_path / "out"))
    assert torch.equal(found(input_ids=IDS).logits, wanted)
    remove_quantizers(loaded.student)
    assert list(loaded.student.state_dict()) == list(tied_llama().state_dict())


def part_of_a_run(path, start, stop, resume=None):
    module = module_of()
    run = trainer(steps=stop)
    rows = loader().dataset
    batches = DataLoader(rows[start * BATCH :] + rows[: start * BATCH], batch_size=BATCH)  # as long as ever, for Lightning counts
    run.fit(module, batches, ckpt_path=resume)
    run.save_checkpoint(path)
    return module.student.state_dict()


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path):
    wanted = part_of_a_run(tmp_path / "whole", 0, STEPS)
    part_of_a_run(tmp_path / "half", 0, 2)
    assert same(part_of_a_run(tmp_path / "rest", 2, STEPS, tmp_path / "half"), wanted)


def distil(kind, world, dtype, param_dtype=None):
    """Losses, adapters, codes of the model, and of what its quantizers were shown."""
    module, losses = module_of(param_dtype=param_dtype), Losses()
    module.student.to(dtype)
    module.teacher.to(dtype)
    strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1) if kind == "fsdp2" else kind
    trainer(losses, world=world, strategy=strategy).fit(module, loader(world))
    seen = {}
    for weight in layer_weights(module.student):
        weight.quantizer.register_forward_pre_hook(lambda q, args, name=weight.name: seen.update({name: q.codes(args[0]).codes}))
    with torch.no_grad():
        module(IDS)
    if kind == "fsdp2":
        with pytest.raises(ValueError, match="is sharded; load its checkpoint"):
            merge_lora(module.student)
    adapters = {name: full_weight(p).detach().clone() for name, p in module.student.named_parameters() if "lora_" in name}
    return losses.values, adapters, codes_of(module.student), seen


@pytest.fixture(scope="module")
def alone():
    return run_ranks(distil, "auto", 1, torch.float64, world=1)[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(kind, alone):
    first, second = run_ranks(distil, kind, 2, torch.float64)
    assert first[0] == second[0] == pytest.approx(alone[0], rel=0, abs=1e-10)
    for name, adapter in alone[1].items():
        torch.testing.assert_close(first[1][name], adapter, rtol=0, atol=1e-8)
    assert same(first[1], second[1])
    assert same(first[2], alone[2])
    assert same(first[2], first[3])


def test_matrices_gathered_in_bf16_are_summed_as_they_came():
    _, _, written, seen = run_ranks(distil, "fsdp2", 2, torch.float32, "bfloat16")[0]
    assert len(written) == 14
    assert same(written, seen)
