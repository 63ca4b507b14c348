"""Optimizers of bitsandbytes with 8-bit or paged state: they train fake-quantized weights, resume exactly, and leave no stale weight."""

from functools import partial

import bitsandbytes
import lightning.pytorch as pl
import pytest
import torch
from models import VOCABULARY, llama, save_causal_lm, token_ids
from torch.utils.data import DataLoader

from lightning_qat import DistillationModule, QuantizationCallback
from lightning_qat.cli import main
from lightning_qat.data.collate import Collate
from lightning_qat.modules.layer import quant_layers

OPTIMIZERS = ["AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "Lion8bit", "AdEMAMix8bit"]
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")  # where they are the plain ones
gpu = pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])


def wide():
    """Weights of 4096 elements and more, whose state bitsandbytes keeps in 8 bits."""
    return llama(hidden_size=64, intermediate_size=128, head_dim=16, vocab_size=VOCABULARY)


def module_of(name, teacher=None, **options):
    return DistillationModule(
        wide() if teacher is None else teacher, optimizer=partial(getattr(bitsandbytes.optim, name), lr=3e-3), **options
    )


def loader():
    rows = [{"input_ids": token_ids(1, 12, seed=i)[0], "source": "generated"} for i in range(16)]
    return DataLoader(rows, batch_size=4, collate_fn=Collate(VOCABULARY))


def trainer(steps, scheme="w4a8", accelerator="cpu", **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    where = {"accelerator": accelerator, "devices": 1, "num_sanity_val_steps": 0}
    return pl.Trainer(max_steps=steps, callbacks=[QuantizationCallback(scheme)], **where | quiet | options)


def saved(run, folder):
    path = folder / "step.ckpt"
    run.save_checkpoint(path)
    return path


@pytest.mark.parametrize("accelerator", ["cpu", gpu])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_resumes_where_it_stopped(name, accelerator, tmp_path):
    whole, first, resumed = (trainer(-1, accelerator=accelerator, max_epochs=epochs) for epochs in (2, 1, 2))  # of four batches
    whole.fit(module_of(name), loader())
    first.fit(module_of(name), loader())
    path = saved(first, tmp_path)
    states = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
    kinds = {t.dtype for state in states.values() for t in state["__bnb_optimizer_quant_state__"].values()}
    assert (torch.uint8 in kinds) == name.endswith("8bit")
    resumed.fit(module_of(name), loader(), ckpt_path=path, weights_only=True)
    assert resumed.global_step == 8
    expected = whole.lightning_module.state_dict()
    before = wide().state_dict()
    for key, tensor in resumed.lightning_module.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
        assert not torch.equal(tensor.cpu(), before[key.removeprefix("student.")]), key


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW"])
def test_no_kept_weight_is_stale(name, monkeypatch):
    """Over the micro-batches of one step quantized weights are kept, and these optimizers change weights without a trace in `_version`."""

    class Watch(pl.Callback):
        kept, versions = [], []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.kept.append([layer.kept_weight is not None for _, layer in quant_layers(module.student)])
            self.versions.append(module.student.lm_head.weight._version)

    def weights(reuse):
        module, run = module_of(name), trainer(2, accumulate_grad_batches=2)
        if reuse:
            run.callbacks.append(Watch())
        else:
            monkeypatch.setattr("lightning_qat.callbacks.reuse.WeightReuse.start", lambda *args, **options: None)
        run.fit(module, loader())
        return module.state_dict()

    kept, fresh = weights(True), weights(False)
    assert all(torch.equal(tensor, fresh[key]) for key, tensor in kept.items())
    assert [all(row) for row in Watch.kept] == [True, False] * 2  # kept within a step, dropped by it
    assert len(set(Watch.versions)) == 1


def test_small_tensors_keep_32_bits():
    run = trainer(2)
    run.fit(module_of("AdamW8bit"), loader())
    for parameter, state in run.optimizers[0].state.items():
        assert state["state1"].dtype == (torch.uint8 if parameter.numel() >= 4096 else torch.float32)


YAML = """
quantization: {{scheme: w4a8}}
model:
  class_path: DistillationModule
  init_args:
    teacher: {folder}
    optimizer: {{class_path: bitsandbytes.optim.{name}, init_args: {{lr: 0.003}}}}
data:
  class_path: SyntheticDataModule
  init_args: {{num_samples: 16, max_length: 8, batch_size: 4, rows: 8, store: gen}}
trainer:
  max_steps: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  callbacks:
    - {{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {{dirpath: runs, save_last: true, save_top_k: 0}}}}
"""


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_from_yaml(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(YAML.format(folder=save_causal_lm(wide(), tmp_path / "teacher"), name=name))
    assert main(["fit", "--config", "run.yaml"]) == 0
    checkpoint = torch.load("runs/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
