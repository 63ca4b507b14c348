"""A checkpoint comes back as the model that was trained: file or folder, distilled or a module of the user's own, with the same codes."""

import lightning.pytorch as pl
import pytest
import torch
from distil import codes, loader, module, trainer
from gloo import run_ranks
from learned import LearnedGain
from models import mlp, tied_llama
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

from lightning_qat import (
    DistillationModule,
    QuantizationCallback,
    QuantScheme,
    TensorSpec,
    export,
    insert_quantizers,
    load_quantized,
    load_trained,
)
from lightning_qat.callbacks import BitStages
from lightning_qat.formats.exactness.codes import stored_codes
from lightning_qat.modules import scheme_of
from lightning_qat.modules.weights import layer_weights, weight_dtypes
from lightning_qat.quantizers import quantizers

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
FAST = {"dtype": None, "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.03)}  # codes move in three steps
STATIC = QuantScheme(weight=TensorSpec(bits=4), input=TensorSpec(bits=8, granularity="tensor", dynamic=False))


class Own(pl.LightningModule):
    """A user's module; `width` is a hyper-parameter."""

    def __init__(self, width=32, root=None, half=False):
        super().__init__()
        self.save_hyperparameters()
        if root is not None:
            self.quantization_root = root
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 8))

    def configure_model(self):
        if hasattr(self, "after_build"):
            self.after_build()
        if self.device_mesh is not None:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if self.hparams.half else None)
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"], mp_policy=policy)

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def run(scheme, steps=3, callbacks=(), **options):
    return pl.Trainer(accelerator="cpu", max_steps=steps, callbacks=[QuantizationCallback(scheme), *callbacks], **QUIET, **options)


def batches():
    return DataLoader(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)), batch_size=4)


def saved(path, made, scheme="w4a8", **options):
    """A short run of a module, and its checkpoint."""
    trainer = run(scheme, **options)
    trainer.fit(made, batches())
    trainer.save_checkpoint(path)
    return made


def exported(model, folder, own=None):
    """Codes in the file that a model is exported to."""
    loaded = load_quantized(export(model, folder), model=own)
    return {weight.name: stored_codes(weight).codes for weight in layer_weights(loaded)}


def different(one, other):
    assert one.keys() == other.keys()
    assert one
    return sum(int((one[name] != other[name]).sum()) for name in one)


# ---------------------------------------------------------------- a module of the user's own


@pytest.fixture
def learned():
    quantizers.add("learned-and-loaded", LearnedGain)
    yield QuantScheme(weight=TensorSpec(bits=4, quantizer="learned-and-loaded"), exclude=())
    del quantizers._entries["learned-and-loaded"]


@pytest.mark.parametrize("scheme", ["w4a8", "w1", STATIC], ids=["w4a8", "w1", "static inputs"])
@pytest.mark.parametrize("root", [None, "net"])
@pytest.mark.parametrize("form", ["instance", "class"])
def test_a_module_of_ones_own_has_the_trained_codes(form, root, scheme, tmp_path):
    trained = saved(tmp_path / "last.ckpt", Own(root=root), scheme)
    loaded = load_trained(tmp_path / "last.ckpt", model=Own if form == "class" else Own(root=root))
    assert not loaded.training
    assert scheme_of(loaded) == QuantScheme.parse(scheme)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in trained.state_dict().items())
    x = next(iter(batches()))
    assert torch.equal(loaded.net(x), trained.eval().net(x))
    own = mlp() if root else Own()
    assert different(exported(loaded, tmp_path / "out", own), codes(trained.net if root else trained)) == 0


def test_learned_scales_come_back(learned, tmp_path):
    trained = saved(tmp_path / "last.ckpt", Own(), learned)
    loaded = load_trained(tmp_path / "last.ckpt", model=Own)
    gains = [parameter.item() for name, parameter in loaded.named_parameters() if name.endswith("gain")]
    assert len(gains) == 2
    assert all(gain != 1 for gain in gains)
    assert different(codes(loaded), codes(trained)) == 0


# ---------------------------------------------------------------- a distillation


def test_the_student_of_a_file_is_returned(tmp_path):
    tied_llama().save_pretrained(tmp_path / "teacher")
    made = module(**FAST, teacher=str(tmp_path / "teacher"), lora={"rank": 2})
    run = trainer("auto", 1, max_steps=3)
    run.fit(made, loader(1))
    run.save_checkpoint(tmp_path / "last.ckpt")
    student = load_trained(tmp_path / "last.ckpt")
    assert type(student) is type(tied_llama())
    assert not student.training
    assert different(exported(student, tmp_path / "out"), codes(made.student)) == 0


# ---------------------------------------------------------------- folders of several processes


def sharded(path, teacher, dtype):
    made = module(**FAST, teacher=teacher, param_dtype=dtype, defer_loading=dtype is not None)
    run = trainer("fsdp2", 2, max_steps=3)
    run.fit(made, loader(2))
    run.save_checkpoint(path)
    return codes(made.student)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_folder_of_two_processes_is_read_without_another_command(dtype, tmp_path):
    tied_llama().save_pretrained(tmp_path / "teacher")
    trained, other = run_ranks(sharded, tmp_path / "last.ckpt", str(tmp_path / "teacher"), dtype)
    assert different(trained, other) == 0
    student = load_trained(tmp_path / "last.ckpt")
    assert set(weight_dtypes(student).values()) == ({dtype} if dtype else set())
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert different(exported(student, tmp_path / "out"), trained) == 0
    insert_quantizers(untrained := tied_llama(), "w4a8kv4")
    assert different(codes(untrained), trained) > 0


def sharded_again(path, folder):
    made = module(**FAST, student=load_quantized(folder, trainable=True))
    run = trainer("fsdp2", 2, max_steps=3, scheme="w3g8")
    run.fit(made, loader(2))
    run.save_checkpoint(path)
    return codes(made.student), [weight.quantizer.kept_scale for weight in layer_weights(made.student)]


def test_scales_that_are_kept_come_back_from_a_folder(tmp_path):
    insert_quantizers(model := tied_llama(), "w3g8")
    folder = export(model, tmp_path / "first")
    (trained, scales), _ = run_ranks(sharded_again, tmp_path / "last.ckpt", folder)
    student = load_trained(tmp_path / "last.ckpt", model=DistillationModule(teacher=tied_llama()))
    assert different(codes(student), trained) == 0
    assert different(codes(student), codes(model)) > 0
    assert all(torch.equal(weight.quantizer.kept_scale, scale) for weight, scale in zip(layer_weights(student), scales, strict=True))


def own_and_sharded(path, half):
    made = Own(half=half)
    run = trainer("fsdp2", 2, max_steps=3, scheme=STATIC)
    run.fit(made, DataLoader(next(iter(batches())), batch_size=2))
    run.save_checkpoint(path)
    return codes(made), [buffer.clone() for name, buffer in made.named_buffers() if name.endswith(("low", "high"))]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "gathered in bfloat16"])
def test_a_sharded_module_of_ones_own_keeps_its_ranges(half, tmp_path):
    (trained, ranges), _ = run_ranks(own_and_sharded, tmp_path / "last.ckpt", half)
    loaded = load_trained(tmp_path / "last.ckpt", model=Own)
    assert set(weight_dtypes(loaded).values()) == ({"bfloat16"} if half else set())
    assert different(exported(loaded, tmp_path / "out", Own()), trained) == 0
    found = [buffer for name, buffer in loaded.named_buffers() if name.endswith((".low", ".high"))]
    assert found
    assert all(any(torch.equal(buffer, there) for there in ranges) for buffer in found)


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def own_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "last.ckpt"
    saved(path, Own(root="net"), callbacks=[])
    return path


class Other(Own):
    def __init__(self):
        super().__init__(root="net")
        self.extra = nn.Linear(2, 2)


class Needs(pl.LightningModule):
    def __init__(self, net):
        super().__init__()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, r"not a checkpoint of a DistillationModule; pass what was trained, load_trained\(path, model=MyModule"),
        (nn.Linear(2, 2), r"model: got Linear, expected a LightningModule"),
        (nn.Linear, r"model: got Linear, expected a LightningModule or a class of such"),
        (Own(), r"quantization_root: .*below 'net'.*names None; set its quantization_root to 'net'"),
        (Own(width=8, root="net"), r"model: the weights in .* do not fit: .*size mismatch"),
        (Other(), r"missing in the checkpoint: \['extra.weight', 'extra.bias'\], unknown to the module: \[\]"),
        (Needs, r"a Needs cannot be built from the hyper-parameters .*\['half', 'root', 'width'\].*'net'; pass an instance in Python"),
    ],
    ids=["none", "not lightning", "not its class", "another root", "shapes", "keys", "arguments"],
)
def test_another_module_is_refused(model, message, own_checkpoint):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_trained(own_checkpoint, model=model)


def test_a_run_without_the_callback_is_refused(tmp_path):
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, **QUIET)
    trainer.fit(made := Own(), batches())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"holds no state of QuantizationCallback.*insert_quantizers\(model, scheme\)"):
        load_trained(tmp_path / "plain.ckpt", model=made)


def test_a_module_that_is_quantized_otherwise_is_refused(own_checkpoint):
    insert_quantizers((other := Own(root="net")).net, "w8a8")
    with pytest.raises(ValueError, match=r"already quantized with another scheme.*\n  scheme.weight.bits: 8 in the model, 4 here"):
        load_trained(own_checkpoint, model=other)


def test_the_middle_of_a_schedule_is_refused(tmp_path):
    saved(tmp_path / "a.ckpt", Own(), callbacks=[BitStages({0: "w8a8", 50: "w4a8"})])
    with pytest.raises(ValueError, match=r"BitStages: the checkpoint was saved at step 2 .* due at step 50.*take a checkpoint from after"):
        load_trained(tmp_path / "a.ckpt", model=Own())
