"""Programs of `torch.export`, and models trained for ExecuTorch's grid, from the training loop to the graph."""

import json
import zipfile

import lightning.pytorch as pl
import pytest
import torch
from models import llama, logits_of, mlp, tied_llama, token_ids
from torch.export import Dim
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lightning_qat import QuantizationCallback, QuantScheme, TensorSpec, export, insert_quantizers, load_quantized
from lightning_qat.formats.torchao import export_program
from lightning_qat.generation import load_causal_lm

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore:export. no tokenizer:UserWarning")

A8 = TensorSpec(bits=8, granularity="token", symmetric=False, round_via="reciprocal")


def exported(build, scheme, folder, **options):
    model = build()
    insert_quantizers(model, scheme)
    return model, load_quantized(export(model, folder, format="torchao"), **options)


def graph_of(program):
    return {str(node.target).removesuffix(".default") for node in program.graph.nodes if "torchao" in str(node.target)}


CASES = {
    "8da4w": (lambda: llama(intermediate_size=64, num_hidden_layers=1), QuantScheme.parse("executorch-8da4w")),
    "tied-all-layers": (lambda: tied_llama(num_hidden_layers=1), QuantScheme(weight=TensorSpec(bits=3), input=A8, exclude=())),
    "w2": (lambda: llama(num_hidden_layers=1), QuantScheme.parse("w2")),
}


@pytest.mark.parametrize(
    ("build", "scheme"),
    [pytest.param(*case, id=name, marks=() if name == "8da4w" else pytest.mark.slow) for name, case in CASES.items()],
)
def test_a_program_computes_what_was_trained(build, scheme, tmp_path):
    model, loaded = exported(build, scheme, tmp_path / "out")
    weight = loaded.model.layers[0].mlp.down_proj.weight
    program = export_program(loaded, token_ids(), dynamic_shapes={"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}})
    assert loaded.model.layers[0].mlp.down_proj.weight is weight  # the model stays as it is
    codes = program.state_dict["model.layers.0.mlp.down_proj.parametrizations.weight.original0"]
    assert codes.dtype == torch.int8
    assert torch.equal(codes, weight.qdata)
    quantize = {"torchao.choose_qparams_affine", "torchao.quantize_affine"} if scheme.input else set()
    assert graph_of(program) == {"torchao.dequantize_affine", *quantize}
    torch.export.save(program, tmp_path / "program.pt2")
    stored = [file for file in zipfile.ZipFile(tmp_path / "program.pt2").namelist() if file.endswith("model_weights_config.json")]
    entries = json.loads(zipfile.ZipFile(tmp_path / "program.pt2").read(stored[0]))["config"].values()
    assert entries
    assert not any(entry["use_pickle"] for entry in entries)
    for module in (program.module(), torch.export.load(tmp_path / "program.pt2").module()):
        for ids in (token_ids(), token_ids(3, 17, seed=1)):
            assert torch.equal(module(input_ids=ids).logits, logits_of(model, input_ids=ids))


def test_a_program_of_a_module_of_ones_own(tmp_path):
    model, loaded = exported(mlp, QuantScheme(weight=TensorSpec(bits=4), input=A8), tmp_path / "out", model=mlp())
    x = torch.randn(4, 16)
    assert torch.equal(export_program(loaded, x).module()(input=x), model(x))
    with pytest.raises(ValueError, match=r"example_inputs: what this model takes is not known"):
        export_program(loaded)
    with pytest.raises(ValueError, match=r"holds no torchao tensors"):
        export_program(model, x)


class Language(pl.LightningModule):
    """A module of somebody's own, which knows nothing of quantization."""

    def __init__(self, model):
        super().__init__()
        self.model, self.extra = model, torch.nn.Parameter(torch.zeros(3))

    def training_step(self, ids, _):
        logits = self.model(ids).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + self.extra.sum() * 0

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(model, scheme, steps, ids, folder):
    module = Language(model.train())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=[QuantizationCallback(scheme)], default_root_dir=folder, **quiet)
    trainer.fit(module, DataLoader(ids, batch_size=2))
    return module


def test_what_a_callback_trained_is_written_as_the_model_in_the_module(tmp_path):
    module = fit(llama(), QuantScheme(weight=TensorSpec(bits=4), input=A8), 3, token_ids(6), tmp_path)
    folder = export(module, tmp_path / "out", format="torchao")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded, LlamaForCausalLM)
    assert torch.equal(logits_of(loaded), logits_of(module.eval().model))


@pytest.mark.parametrize("steps", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_the_preset_trains_and_is_exported(steps, tmp_path):
    teacher = load_causal_lm("tiny-teacher")
    before = teacher.model.layers[0].mlp.up_proj.weight.detach().clone()
    ids = torch.randint(2048, (2 * steps, 24), generator=torch.Generator().manual_seed(0))
    module = fit(teacher, "executorch-8da4w", steps, ids, tmp_path)
    folder = export(module, tmp_path / "out", format="torchao")
    assert json.loads((folder / "manifest.json").read_text())["verification"]["max_logit_difference"] == 0.0
    assert not torch.equal(teacher.model.layers[0].mlp.up_proj.weight, before)
    loaded = load_quantized(folder)
    assert loaded.model.layers[0].mlp.up_proj.weight.scale.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(loaded(ids[:2]).logits, module.eval().model(ids[:2]).logits)
    assert (folder / "tokenizer.json").is_file()
