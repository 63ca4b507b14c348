"""What is exported of a module as one has it, compiled, wrapped or around another model, and what goes along with its weights."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from folders import names, quantized
from models import character_tokenizer, gpt2, llama, logits_of, mlp, save_causal_lm
from torch import nn

from lightning_qat import DistillationModule, export, insert_quantizers, load_quantized
from lightning_qat.formats.folder import company
from lightning_qat.modules import scheme_of


@pytest.mark.parametrize("model", ["tiny-teacher", None, Path("last.ckpt")])
def test_what_is_no_module_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"model: got a \w+, expected a module.*load_trained"):
        export(model, tmp_path / "out")


# ---------------------------------------------------------------- tokenizer, chat template, generation config


def test_no_tokenizer_is_told_at_the_line_that_exports(tmp_path):
    with pytest.warns(UserWarning, match="no tokenizer is known") as caught:
        export(quantized(llama, "w4"), tmp_path / "out")
    assert caught[0].filename == __file__


def test_a_hub_id_that_cannot_be_asked_tells_why_there_is_no_tokenizer(tmp_path, monkeypatch):
    def refuse(name):
        raise ValueError(f"tokenizer: none can be read from {name!r}: offline")

    monkeypatch.setattr(company, "load_tokenizer", refuse)
    model = quantized(llama, "w4")
    model.config._name_or_path = "owner/name"
    with pytest.warns(UserWarning, match=r"'owner/name': offline.*pass tokenizer=") as caught:
        export(model, tmp_path / "out")
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="none can be read from 'other'"):
        export(model, tmp_path / "new", tokenizer="other")


@pytest.mark.parametrize("tokenizer", [3, ["tokenizer.json"], str.split])
def test_what_is_no_tokenizer_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer: got .*, expected a tokenizer of transformers"):
        export(quantized(llama, "w4"), tmp_path / "out", tokenizer=tokenizer)
    assert not names(tmp_path)


def test_everything_that_belongs_to_a_language_model_is_there(tmp_path):
    source = Path(save_causal_lm(llama(), tmp_path / "source"))
    model = type(llama()).from_pretrained(source)
    model.generation_config.update(temperature=0.3, do_sample=False, max_new_tokens=7)  # contradictory, as some published models are
    insert_quantizers(model, "w4")
    given = character_tokenizer()
    given.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    for tokenizer, template in ((None, False), (given, True)):
        folder = export(model, tmp_path / f"out-{template}", tokenizer=tokenizer)
        assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(names(folder))
        assert ("chat_template.jinja" in names(folder)) == template  # what is given wins
        loaded = load_quantized(folder)
        assert (loaded.generation_config.max_new_tokens, loaded.generation_config.temperature) == (7, 0.3)
    read = type(given).from_pretrained(folder)
    assert read.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"
    assert read("hi")["input_ids"] == given("hi")["input_ids"]


class Holder(pl.LightningModule):
    """A module of one's own around a transformers model."""

    def __init__(self, model=None, tokenizer=None):
        super().__init__()
        self.model = gpt2() if model is None else model
        self.tokenizer = tokenizer

    def forward(self, input_ids):
        return self.model(input_ids=input_ids)


def test_the_tokenizer_of_a_module_of_ones_own(tmp_path):
    module = Holder(tokenizer=character_tokenizer())
    insert_quantizers(module, "w4")
    assert "tokenizer.json" in names(export(module, tmp_path / "out"))
    module.tokenizer = None
    assert "tokenizer.json" not in names(export(module, tmp_path / "none"))
    assert "tokenizer.json" in names(export(module, tmp_path / "given", tokenizer=character_tokenizer()))


# ---------------------------------------------------------------- live modules


def test_a_compiled_module_is_exported_as_the_one_inside(tmp_path):
    model = quantized()
    wanted = logits_of(model)
    folder = export(torch.compile(model, backend="eager"), tmp_path / "out")
    assert torch.equal(logits_of(load_quantized(folder, model=mlp())), wanted)
    model.compile(backend="eager")
    logits_of(model)
    assert torch.equal(logits_of(load_quantized(export(model, tmp_path / "in-place"), model=mlp())), wanted)


def test_of_a_distillation_module_its_student_is_written(tmp_path):
    module = DistillationModule(teacher=llama())
    insert_quantizers(module.student, "w4a8kv4")
    loaded = load_quantized(export(module, tmp_path / "out"))
    assert type(loaded) is type(llama())
    assert torch.equal(logits_of(loaded), logits_of(module.student))


def test_a_lightning_module_around_a_transformers_model(tmp_path):
    module = Holder()
    insert_quantizers(module, "w4a8kv4")
    loaded = load_quantized(export(module.eval(), tmp_path / "out"), model=Holder())
    assert torch.equal(logits_of(loaded.model), logits_of(module.model))
    assert scheme_of(loaded) == scheme_of(module)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_module_under_ddp_is_exported_as_the_one_inside(one_process, tmp_path):
    model = quantized()
    folder = export(nn.parallel.DistributedDataParallel(model), tmp_path / "out")
    assert torch.equal(logits_of(load_quantized(folder, model=mlp())), logits_of(model))


def test_a_sharded_module_is_refused_with_the_way_out(one_process, tmp_path):
    model = quantized()
    torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(
        ValueError, match=r"export: '0\.weight' is sharded over processes; .*load_trained\(checkpoint\).*lightning-qat export"
    ):
        export(model, tmp_path / "out")
    assert names(tmp_path) == []
