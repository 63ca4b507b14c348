"""Packed codes become weights again: the first forward pass is that of the export on every grid, and training keeps what was stored."""

import lightning.pytorch as pl
import pytest
import torch
from grids import DTYPES, FAMILIES, GRANULARITIES, specs_of, thousand_seeds
from models import cnn, gpt2, llama, logits_of, mixtral, mlp, qwen3, tied_llama
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_qat import DistillationModule, QuantizationCallback, QuantScheme, TensorSpec, export, insert_quantizers, load_quantized
from lightning_qat.modules.bit_change import change_bits
from lightning_qat.modules.unpacking import make_trainable, values_of
from lightning_qat.modules.weights import layer_weights
from lightning_qat.quantizers import build_quantizer
from lightning_qat.scheme import Override

pytestmark = pytest.mark.filterwarnings("ignore:export. no tokenizer")

GROUP = {"granularity": "group", "group_size": 8}
GRIDS = {
    "narrow": TensorSpec(bits=4),
    "full-half-range": TensorSpec(bits=4, code_range="full", divisor="half_range"),
    "asymmetric": TensorSpec(bits=3, symmetric=False),
    "asymmetric-groups": TensorSpec(bits=2, symmetric=False, **GROUP),
    "float-zero": TensorSpec(bits=4, symmetric=False, zero_point="float", **GROUP),
    "binary": TensorSpec(bits=1, quantizer="mean_abs"),
    "four-levels": TensorSpec(bits=2, quantizer="mean_abs", **GROUP),
    "percentile": TensorSpec(bits=4, range_finder="percentile", options={"percentile": 0.8}),
    "searched": TensorSpec(bits=3, range_finder="mse"),
    "static": TensorSpec(bits=4, granularity="tensor", dynamic=False),
    "columns": TensorSpec(bits=5, axis=1),
    "bf16-scales": TensorSpec(bits=8, scale_dtype="bfloat16", round_via="reciprocal"),
}
MOVES = {"full-half-range", "four-levels"}  # looking for a range again would find another one


def quantized(build, scheme):
    model = build()
    insert_quantizers(model, scheme)
    return model


def stored(model):
    """Codes, scales and zero points of every weight."""
    parts = ((weight.name, weight.codes()) for weight in layer_weights(model) if weight.quantizer is not None)
    return {name: (q.codes, q.scale, q.zero_point) for name, q in parts}


def same(one, other):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


def steps(model, count, lr=0.05):
    """A few steps of AdamW on random numbers; the losses."""
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=lr), torch.Generator().manual_seed(3)
    losses = []
    for _ in range(count):
        loss = (model(torch.randn(4, 16, generator=generator)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------- the first forward pass, and what follows


@pytest.mark.parametrize("spec", GRIDS.values(), ids=GRIDS)
def test_codes_logits_and_scales_are_those_of_the_export_and_scales_stay(spec, tmp_path):
    trained = quantized(mlp, QuantScheme(weight=spec, input=TensorSpec(bits=8, granularity="token")))
    folder = export(trained, tmp_path / "first")
    model = load_quantized(folder, model=mlp(), trainable=True)
    before = stored(model)
    assert all(same(parts, before[name]) for name, parts in stored(trained).items())
    assert torch.equal(logits_of(model), logits_of(load_quantized(folder, model=mlp())))
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    losses = steps(model, 5)
    assert all(0 < loss < 100 for loss in losses)
    assert all(not torch.equal(was, now) for was, now in zip(weights, model.parameters(), strict=True))
    assert any(not torch.equal(codes, before[name][0]) for name, (codes, *_) in stored(model).items())
    first, again = load_file(folder / "model.safetensors"), load_file(export(model, tmp_path / "again") / "model.safetensors")
    kept = [name for name in first if name.endswith((".scale", ".zero_point"))]
    assert kept
    assert all(torch.equal(first[name], again[name]) for name in kept)


@pytest.mark.parametrize("name", GRIDS)
def test_ranges_that_are_found_again_begin_where_they_may_be_found(name, tmp_path):
    trained = quantized(mlp, QuantScheme(weight=GRIDS[name]))
    model = load_quantized(export(trained, tmp_path / "out"), model=mlp(), trainable=True, scales="found")
    here, there = stored(model), stored(trained)
    if name == "narrow":
        assert all(torch.equal(here[layer][0], there[layer][0]) for layer in there)
    if name in MOVES:
        assert any(not torch.allclose(here[layer][1], there[layer][1], rtol=1e-3) for layer in there)
    assert all(weight.quantizer.kept_scale is None for weight in layer_weights(model))


EVERYWHERE = QuantScheme(weight=TensorSpec(bits=4, symmetric=False), exclude=())
GROUPS = QuantScheme(weight=TensorSpec(bits=3, **GROUP), exclude=("type:Embedding",))
MODELS = {
    "llama": (llama, "w2a8kv4"),
    "head tied to a float embedding": (tied_llama, GROUPS),
    "head and embedding tied": (qwen3, EVERYWHERE),
    "Conv1D": (gpt2, EVERYWHERE),
    "experts": (mixtral, "w4g8a8"),
    "binary experts": (mixtral, "w1"),
    "convolutions": (cnn, QuantScheme(weight=TensorSpec(bits=3, range_finder="mse"))),
}


@pytest.mark.parametrize(("build", "scheme"), MODELS.values(), ids=MODELS)
def test_every_layer_begins_bitwise_equal_and_tied_weights_stay_tied(build, scheme, tmp_path):
    trained = quantized(build, scheme)
    own = {"model": build()} if build is cnn else {}
    model = load_quantized(export(trained, tmp_path / "out"), trainable=True, **own).eval()
    assert torch.equal(logits_of(model), logits_of(trained))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in trained.named_parameters()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    shapes = {name: parameter.shape for name, parameter in trained.named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes


def test_one_weight_of_two_grids_is_refused(tmp_path):
    head = Override(names=("lm_head",), weight=TensorSpec(bits=3))
    folder = export(quantized(tied_llama, QuantScheme(weight=TensorSpec(bits=4), exclude=(), overrides=(head,))), tmp_path / "out")
    with pytest.raises(ValueError, match=r"lm_head.*shares its weight with a layer of another grid.*go on from the training checkpoint"):
        load_quantized(folder, trainable=True)


def test_half_precision_keeps_the_codes_too(tmp_path):
    trained = quantized(lambda: llama().bfloat16(), QuantScheme(weight=TensorSpec(bits=8, symmetric=False, **GROUP)))
    model = load_quantized(export(trained, tmp_path / "out"), trainable=True).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits_of(model), logits_of(trained))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("channel", "tensor")]


@pytest.mark.parametrize("granularity", ["group", *SLOW])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_thousand_seeds_on_every_grid_keep_their_codes_and_values(family, granularity):
    for spec in specs_of(family, **GRANULARITIES[granularity]):
        for dtype in DTYPES:
            first = build_quantizer(spec).codes(thousand_seeds().flatten(0, 1).to(dtype))
            quantizer = build_quantizer(spec)
            quantizer.keep_scale(first.scale, first.zero_point)
            weight = values_of(first.codes, first.dequantize(), quantizer)
            again = quantizer.codes(weight)
            assert torch.equal(again.codes, first.codes), (spec, dtype)
            assert torch.equal(again.scale, first.scale)
            assert torch.equal(quantizer(weight), first.dequantize())


# ---------------------------------------------------------------- quantizers that keep their scale


def test_what_has_left_the_range_gets_no_gradient(tmp_path):
    trained = quantized(mlp, QuantScheme(weight=TensorSpec(bits=3)))
    model = load_quantized(export(trained, tmp_path / "out"), model=mlp(), trainable=True)
    layer = model[0]
    with torch.no_grad():
        layer.weight[0, 0] = layer.weight_quantizer.kept_scale[0, 0] * 5  # the last code is 3
    layer(torch.ones(1, 16)).sum().backward()
    assert layer.weight.grad[0, 0] == 0
    assert (layer.weight.grad == 0).sum() == 1


def test_a_state_dict_brings_kept_scales_to_a_model_that_finds_its_own(tmp_path):
    trained = quantized(mlp, QuantScheme(weight=GRIDS["static"]))
    model = load_quantized(export(trained, tmp_path / "out"), model=mlp(), trainable=True)
    steps(model, 2)
    fresh = quantized(mlp, QuantScheme(weight=GRIDS["static"]))
    fresh.load_state_dict(model.state_dict())
    assert all(same(parts, stored(fresh)[name]) for name, parts in stored(model).items())
    with pytest.raises(RuntimeError, match="kept_scale"):  # and not silently lost the other way
        model.load_state_dict(trained.state_dict())


def test_scales_that_are_kept_have_no_other_bits(tmp_path):
    folder = export(quantized(mlp, "w4"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"0.weight_quantizer keeps the scales of an export.*load it with scales='found'"):
        change_bits(load_quantized(folder, model=mlp(), trainable=True), QuantScheme.parse("w3"))
    change_bits(load_quantized(folder, model=mlp(), trainable=True, scales="found"), QuantScheme.parse("w3"))


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="Sequential holds no packed codes; only what load_quantized returns does"):
        make_trainable(quantized(mlp, "w4"))
    folder = export(quantized(mlp, "w4"), tmp_path / "out")
    with pytest.raises(ValueError, match="scales: got 'learned', expected 'kept' or 'found'"):
        load_quantized(folder, model=mlp(), trainable=True, scales="learned")


# ---------------------------------------------------------------- under a Trainer


class Own(pl.LightningModule):
    quantization_root = "net"

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def trainer(scheme, steps, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", max_steps=steps, callbacks=[QuantizationCallback(scheme)], **quiet | options)


SCHEME = QuantScheme(weight=GRIDS["asymmetric"], input=TensorSpec(bits=8, granularity="token"))
BATCH = torch.randn(4, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.filterwarnings("ignore")
def test_the_callback_adopts_the_model_and_resume_is_exact(tmp_path):
    folder = export(quantized(mlp, SCHEME), tmp_path / "out")

    def fit(count, **options):
        module = Own(load_quantized(folder, model=mlp(), trainable=True))
        run = trainer(SCHEME, count)
        run.fit(module, DataLoader(BATCH, batch_size=4), **options)
        return run, module

    _, whole = fit(6)
    run, _ = fit(3)
    run.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(6, ckpt_path=tmp_path / "half.ckpt")
    state = resumed.state_dict()
    assert any(name.endswith("kept_scale") for name in state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())
    with pytest.raises(Exception, match=r"to train on from an export, load it with load_quantized\(path, trainable=True\)"):
        trainer(SCHEME, 1).fit(Own(load_quantized(folder, model=mlp())), DataLoader(BATCH))


@pytest.mark.filterwarnings("ignore")
def test_a_student_from_an_export_is_distilled(tmp_path):
    folder = export(quantized(llama, "w2a8kv4"), tmp_path / "out")
    module = DistillationModule(llama(), load_quantized(folder, trainable=True), optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))
    before = stored(module.student)
    rows = torch.randint(3, 97, (12, 8), generator=torch.Generator().manual_seed(1))
    trainer("w2a8kv4", 3).fit(module, DataLoader([{"input_ids": row} for row in rows], batch_size=4))
    after = stored(module.student)
    assert any(not torch.equal(after[name][0], codes) for name, (codes, *_) in before.items())
    assert all(torch.equal(after[name][1], scale) for name, (_, scale, _) in before.items())
    assert isinstance(module.student.lm_head, nn.Linear)
