"""The ONNX format on models: batches of other shapes, padding, tied weights, and what onnxruntime does with other settings."""

import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from models import cnn, gemma3, gpt2, llama, mlp, opt, qwen3, tied_llama, token_ids, vit
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from lightning_qat import KVSpec, QuantizationCallback, QuantScheme, TensorSpec, export, insert_quantizers, load_quantized
from lightning_qat.evaluation import HELD_OUT, read_documents, score_text, text_windows
from lightning_qat.generation import load_causal_lm, load_tokenizer
from lightning_qat.quantizers.running_range import merge_ranges
from lightning_qat.scheme import Override

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore:export. no tokenizer")

PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
EVERYTHING = QuantScheme(weight=TensorSpec(bits=4), input=TensorSpec(bits=8, granularity="token"), exclude=())
MIXED = QuantScheme(
    weight=TensorSpec(bits=4, granularity="group", group_size=16),
    overrides=(Override(names=("down_proj",), weight=TensorSpec(bits=8)), Override(names=("q_proj",), weight=TensorSpec(bits=2))),
)


def bert(cls=BertForSequenceClassification):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return cls(BertConfig(**sizes, max_position_embeddings=64, initializer_range=0.2)).eval()


def quantized(build, scheme, *args, **inputs):
    model = build()
    insert_quantizers(model, scheme, allow_partial=True)
    model.train()
    model(*args, **inputs)
    merge_ranges(model)
    return model.eval()


def exported(model, folder, **settings):
    folder = export(model, folder / "out", format="onnx", **settings)
    return folder, json.loads((folder / "manifest.json").read_text())


def check_padded_batch(model, loaded, left):
    """Another number of rows and of tokens, some of them padding."""
    ids = token_ids(rows=3, length=17, seed=5)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, -4:] = 0 if not left else 1
    with torch.no_grad():
        mine = model(input_ids=ids, attention_mask=mask).logits
    theirs = loaded(input_ids=ids, attention_mask=mask).logits
    real = mask.bool() if mine.dim() == 3 else slice(None)
    return (mine[real] - theirs[real]).abs().max() / mine.abs().max()


# ---------------------------------------------------------------- fast: one decoder, one preset


def test_a_decoder_takes_padded_batches_and_scores_text(tmp_path):
    scheme = QuantScheme(weight=TensorSpec(bits=4), exclude=())  # the tied head is quantized with the embedding
    model = quantized(lambda: tied_llama(num_hidden_layers=1), scheme, token_ids())
    folder, manifest = exported(model, tmp_path)
    assert manifest["inputs"] == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    names = [tensor.name for tensor in onnx.load(str(folder / "model.onnx")).graph.initializer if tensor.name.endswith(".codes")]
    assert len(names) == 8  # seven layers and one table
    loaded = load_quantized(folder)
    assert check_padded_batch(model, loaded, left=True) < 1e-5
    windows = [token_ids(1, length, seed=length)[0] for length in (5, 9, 2)]
    assert score_text(loaded, windows).perplexity == pytest.approx(score_text(model, windows).perplexity, rel=1e-5)
    with pytest.raises(ValueError, match="got windows of 65 tokens, the model has 64"):
        score_text(loaded, [token_ids(1, 65)[0]])


class Classifier(pl.LightningModule):
    """A user's own module around a network; nothing in it knows about quantization."""

    def __init__(self, network, shape):
        super().__init__()
        self.network, self.example_input_array = network, torch.randn(shape)

    def forward(self, images):
        out = self.network(images)
        return getattr(out, "logits", out)

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def trained(network, shape, steps):
    module = Classifier(network, (1, *shape))
    data = [(torch.randn(4, *shape), torch.randint(4, (4,))) for _ in range(steps)]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[QuantizationCallback("onnx-w8a8")], **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    return module


def test_the_preset_trains_and_is_exported(tmp_path):
    module = trained(cnn(), (3, 8, 8), steps=3)
    folder, manifest = exported(module, tmp_path)
    found = manifest["verification"]
    assert (found["codes_different"], found["scales_different"], found["activations_different"]) == (0, 0, 0)
    assert (manifest["notes"], manifest["difference"]) == ([], None)
    images = torch.randn(5, 3, 8, 8)
    assert (load_quantized(folder)(images) - module.eval()(images)).abs().max() < 1e-2


# ---------------------------------------------------------------- slow: everything else


@pytest.mark.slow
@pytest.mark.parametrize(("network", "shape"), [(cnn, (3, 8, 8)), (vit, (3, 16, 16))])
def test_fifty_steps_of_the_preset(network, shape, tmp_path):
    """The products run on integer kernels."""
    module = trained(network(), shape, steps=50)
    folder, manifest = exported(module, tmp_path)
    assert manifest["verification"]["activations_different"] == 0
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    disabled = manifest["onnxruntime"]["disabled_optimizers"]
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, disabled_optimizers=disabled)
    kinds = {node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False).graph.node}
    assert "MatMulIntegerToFloat" in kinds


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "allowed"), [("w4g32", 1e-6), ("onnx-w8a8", 5e-3), ("w4a8kv4", 5e-3)])
def test_fifty_steps_of_the_teacher(scheme, allowed, tmp_path):
    """Perplexity of a real text; with quantized activations it moves with the roundings that fall on the other side."""
    model = load_causal_lm("tiny-teacher")
    insert_quantizers(model, scheme)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(50):
        ids = torch.randint(model.config.vocab_size, (2, 16))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        merge_ranges(model)
    folder, manifest = exported(model.eval(), tmp_path, tokenizer="tiny-teacher")
    assert manifest["verification"]["activations_different"] == 0
    windows = text_windows(load_tokenizer("tiny-teacher"), read_documents(HELD_OUT), 128)[:40]
    mine, theirs = score_text(model, windows).perplexity, score_text(load_quantized(folder), windows).perplexity
    assert theirs == pytest.approx(mine, rel=allowed)


MODELS = {
    "llama-kv": (llama, "w4a8kv4"),
    "llama-kv-pre-rope": (llama, "llm-qat"),
    "llama-kv-asymmetric": (llama, QuantScheme(weight=TensorSpec(bits=8), kv=KVSpec(bits=4, symmetric=False, granularity="token"))),
    "llama-static": (llama, "onnx-w8a8"),
    "llama-mixed": (llama, MIXED),
    "llama-tied": (tied_llama, EVERYTHING),
    "gpt2": (gpt2, "w4g16a8"),
    "opt": (opt, "w4a8kv4"),
    "qwen3": (qwen3, "w4a8kv4"),
    "gemma3": (gemma3, "w4a8"),
    "bert": (bert, "w4a8"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("build", "scheme"), MODELS.values(), ids=MODELS)
def test_a_language_model_is_exported_exactly(build, scheme, tmp_path):
    model = quantized(build, scheme, token_ids())
    folder, manifest = exported(model, tmp_path)
    found = manifest["verification"]
    assert (found["codes_different"], found["scales_different"], found["activations_different"]) == (0, 0, 0)
    assert found["largest_relative_difference_between_activations"] < 1e-5
    # A rounding may fall on the other side: rare, and a step of the grid when it happens.
    assert check_padded_batch(model, load_quantized(folder), left=build is not opt) < (1e-5 if found["activations"] == 0 else 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["onnx-w8a8", "w4a8", "w4g16", "w2"])
def test_a_vision_transformer_is_exported_exactly(scheme, tmp_path):
    model = quantized(vit, scheme, **PIXELS)
    folder, manifest = exported(model, tmp_path, example_inputs=PIXELS)
    assert manifest["verification"]["activations_different"] == 0
    more = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert (load_quantized(folder)(pixel_values=more).logits - model(pixel_values=more).logits).abs().max() < 0.05


@pytest.mark.slow
def test_every_result_of_a_model_without_a_head(tmp_path):
    model = quantized(lambda: bert(BertModel), "w8", token_ids())
    loaded = load_quantized(exported(model, tmp_path)[0])
    with torch.no_grad():
        mine, theirs = model(token_ids()), loaded(token_ids())
    for name in ("last_hidden_state", "pooler_output"):
        assert (mine[name] - theirs[name]).abs().max() < 1e-5


@pytest.mark.slow
def test_keys_and_values_can_be_dropped(tmp_path):
    model = quantized(llama, "w4kv4", token_ids())
    _, manifest = exported(model, tmp_path, drop=("kv",))
    assert manifest["dropped"] == ["kv"]
    assert manifest["difference"]["max_abs"] > 0
    assert manifest["verification"]["activations"] == 0


@pytest.mark.slow
def test_a_module_that_holds_a_transformers_model(tmp_path):
    class Mine(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = llama()

        def forward(self, batch):
            return self.network(**batch).logits

    module = Mine()
    insert_quantizers(module, "w4a8")
    folder, manifest = exported(module, tmp_path)
    assert set(manifest["inputs"]) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        assert (load_quantized(folder)(token_ids()).logits - module.network(token_ids()).logits).abs().max() < 0.1


@pytest.mark.slow
def test_a_native_export_becomes_one_for_onnx(tmp_path):
    native = load_quantized(export(quantized(llama, "w4", token_ids()), tmp_path / "native"))
    folder, manifest = exported(native, tmp_path)
    assert manifest["verification"]["codes_different"] == 0
    assert (load_quantized(folder)(token_ids()).logits - native(token_ids()).logits).abs().max() < 1e-4


# ---------------------------------------------------------------- why the settings are what they are


def outputs(folder, feed, disabled=(), **config):
    options = onnxruntime.SessionOptions()
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, disabled_optimizers=list(disabled))
    return torch.from_numpy(session.run(None, feed)[0])


def test_without_the_setting_inputs_of_int4_weights_are_rounded(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64))
    insert_quantizers(model, "w4g32")
    x = torch.randn(3, 64)
    folder, _ = exported(model, tmp_path, example_inputs=x)
    expected = model(x).detach()
    feed = {"input": x.numpy()}
    assert (outputs(folder, feed) - expected).abs().max() > 1e-3
    assert (outputs(folder, feed, **{"session.qdq_matmulnbits_accuracy_level": "0"}) - expected).abs().max() < 1e-5


@pytest.mark.slow
def test_without_the_setting_biases_are_rounded(tmp_path):
    torch.manual_seed(3)
    network = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())], nn.Flatten(2))
    images = torch.randn(8, 16, 12, 12)
    model = quantized(lambda: network, "onnx-w8a8", images)
    folder, manifest = exported(model, tmp_path, example_inputs=images)
    expected, feed = model(images).detach(), {"input": images.numpy()}
    far = expected.abs().max() * 1e-5
    exact = outputs(folder, feed, manifest["onnxruntime"]["disabled_optimizers"])
    assert ((outputs(folder, feed) - expected).abs() > far).float().mean() > 0.01
    assert ((exact - expected).abs() > far).float().mean() < 0.001


@pytest.mark.slow
def test_the_file_is_read_by_onnx_itself(tmp_path):
    """A second implementation of the standard, in plain numpy."""
    from onnx.reference import ReferenceEvaluator

    model = quantized(mlp, QuantScheme(weight=TensorSpec(bits=8), input=TensorSpec(bits=8, granularity="token")), torch.randn(2, 16))
    x = torch.randn(4, 16)
    folder, _ = exported(model, tmp_path, example_inputs=x)
    theirs = ReferenceEvaluator(str(folder / "model.onnx")).run(None, {"input": x.numpy()})[0]
    assert np.abs(theirs - model(x).detach().numpy()).max() < 1e-5
