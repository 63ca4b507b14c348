"""Teachers: what each choice computes, that training leaves it as it was and out of checkpoints, and what is refused."""

import copy
import json
import pickle

import lightning.pytorch as pl
import pytest
import torch
from gloo import run_ranks
from lightning.pytorch.callbacks import WeightAveraging
from models import LANGUAGE_MODELS, VOCABULARY, llama, save_causal_lm, token_ids
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lightning_qat import DistillationModule, QuantizationCallback
from lightning_qat.data.collate import Collate
from lightning_qat.distillation import offload, teachers
from lightning_qat.distillation.offload import bring_back, is_offloaded, offload_weights
from lightning_qat.distillation.teachers import load_teacher, move_teacher

CHOICES = {
    "float32": {},
    "bfloat16": {"teacher_dtype": "bfloat16"},
    "nf4": {"teacher_quantization": "nf4"},
    "int8": {"teacher_quantization": "int8", "teacher_dtype": "bfloat16"},
    "offload": {"teacher_offload": True, "teacher_dtype": "bfloat16"},
}
QUANTIZED = ("nf4", "int8")
IDS = token_ids(4, 12)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(test):
    for mark in gpu:
        test = mark(test)
    return test


def wide(**changes):
    """Rows of a multiple of 64, which NF4 asks for."""
    return llama(**{"hidden_size": 64, "intermediate_size": 128, "head_dim": 16} | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_causal_lm(wide(), tmp_path_factory.mktemp("teacher"))


def loader():
    rows = [{"input_ids": token_ids(1, 12, seed=i)[0], "source": "generated"} for i in range(8)]
    return DataLoader(rows, batch_size=4, collate_fn=Collate(VOCABULARY))


def trainer(steps=2, callbacks=(), **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    where = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    return pl.Trainer(max_steps=steps, callbacks=[QuantizationCallback("w4a8"), *callbacks], **where | quiet | options)


def module_of(teacher, **options):
    return DistillationModule(teacher, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), **options)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def kl(model, reference, ids):
    p, q = (logits(m, ids).float().log_softmax(-1) for m in (reference, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def contents(teacher):
    """Every tensor of a teacher, also those beside its parameters."""
    tensors = {}
    for name, parameter in teacher.named_parameters():
        tensors[name] = parameter
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors[name + ".absmax"] = state.absmax
    for name, layer in teacher.named_modules():
        if getattr(layer, "state", None) is not None:
            scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
            tensors[name + ".SCB"] = scales
    return {name: tensor.detach().clone() for name, tensor in (tensors | dict(teacher.named_buffers())).items()}


def assert_same(there, here):
    assert there.keys() == here.keys()
    for name, tensor in there.items():
        assert tensor.dtype == here[name].dtype, name
        assert torch.equal(tensor, here[name]), name


# ---------------------------------------------------------------- what each choice computes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_float_teacher_is_the_frozen_model(folder, dtype):
    teacher = load_teacher(folder, dtype)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert {p.dtype for p in teacher.parameters()} == {getattr(torch, dtype)}
    assert teacher.model.rotary_emb.inv_freq.dtype == torch.float32
    if dtype == "float32":
        assert torch.equal(logits(teacher), logits(wide()))


# The 16 levels of QLoRA, arXiv 2305.14314, appendix E.
BELOW = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
]
ABOVE = [
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
]
NF4 = torch.tensor([*BELOW, 0.0, *ABOVE, 1.0])


def in_nf4(weight):
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    return (NF4[(blocks / scales)[..., None].sub(NF4).abs().argmin(-1)] * scales).view_as(weight)


def test_4_bit_layers_compute_with_the_rounded_weights(folder):
    teacher, expected = load_teacher(folder, quantization="nf4"), wide()
    for layer in expected.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = in_nf4(layer.weight.data)
    torch.testing.assert_close(logits(teacher), logits(expected), rtol=0, atol=1e-4)
    assert torch.equal(teacher.lm_head.weight, expected.lm_head.weight)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_8_bit_layers_hold_codes_per_row(folder):
    teacher, expected = load_teacher(folder, quantization="int8"), wide()
    for name, layer in expected.model.layers.named_modules():
        if isinstance(layer, nn.Linear):
            scales, codes = layer.weight.abs().amax(1, keepdim=True) / 127, teacher.model.layers.get_submodule(name).weight
            assert codes.dtype == torch.int8
            torch.testing.assert_close(codes * scales, layer.weight.detach(), rtol=0, atol=0.55 * scales.max().item())  # fp16 on the way
    assert torch.equal(teacher.lm_head.weight, expected.lm_head.weight)
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow), pytest.param("float16", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("quantization", "bound"), [("nf4", 0.3), ("int8", 0.01)])
def test_a_quantized_teacher_is_close_to_the_float_one(quantization, bound, dtype):
    """On random tokens; measured 0.21 and 0.002 to 0.003 nats."""
    ids = torch.randint(3, 2000, (4, 32), generator=torch.Generator().manual_seed(0))
    teacher = load_teacher("tiny-teacher", dtype, quantization)
    assert 0 < kl(teacher, load_teacher("tiny-teacher"), ids) < bound
    assert logits(teacher, ids).dtype == getattr(torch, dtype)
    assert torch.equal(logits(teacher, ids), logits(teacher, ids))


def test_reading_the_state_of_a_4_bit_teacher_leaves_it_as_it_is(folder):
    """On CPUs with bf16 instructions bitsandbytes repacks codes in the first pass, and loses the scales in `state_dict`."""
    teacher = load_teacher(folder, quantization="nf4")
    there, expected = contents(teacher), logits(teacher)
    teacher.state_dict()
    assert torch.equal(logits(teacher), expected)
    assert_same(there, contents(teacher))


def test_a_4_bit_checkpoint_may_be_the_teacher_where_that_is_said(folder, tmp_path):
    load_teacher(folder, quantization="nf4").save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), quantization="nf4")
    assert torch.equal(logits(teacher), logits(load_teacher(folder, quantization="nf4")))
    module = module_of(str(tmp_path), student=folder, teacher_quantization="nf4")
    assert {p.dtype for p in module.student.parameters()} == {torch.float32}


# ---------------------------------------------------------------- training beside it


@pytest.mark.parametrize("choice", CHOICES)
def test_training_leaves_the_teacher_as_it_was_and_out_of_the_checkpoint(folder, tmp_path, choice):
    module = module_of(folder, **CHOICES[choice])
    there, students = contents(module.teacher), copy.deepcopy(module.student.state_dict())
    assert_same(students, wide().state_dict())  # in fp32, and not the teacher's rounded weights
    run = trainer()
    run.fit(module, loader())
    assert_same(there, contents(module.teacher))
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert not any(m.training for m in module.teacher.modules())
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.student.parameters()}
    assert not torch.equal(module.student.lm_head.weight, students["lm_head.weight"])

    path = tmp_path / "last.ckpt"
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert {key.split(".")[0] for key in saved["state_dict"]} == {"student"}
    loaded = DistillationModule.load_from_checkpoint(path, weights_only=True)
    assert_same(there, contents(loaded.teacher))
    assert torch.equal(loaded.teacher_logits(IDS), module.teacher_logits(IDS))


@pytest.mark.parametrize("precision", ["bf16-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.filterwarnings("ignore:.*bf16-true.*")
def test_precision_of_the_trainer_is_not_the_teachers(folder, choice, precision):
    module = module_of(folder, **CHOICES[choice])
    there = contents(module.teacher)
    trainer(precision=precision).fit(module, loader())
    assert_same(there, contents(module.teacher))
    assert {p.dtype for p in module.student.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


@pytest.mark.parametrize("choice", CHOICES)
def test_moving_and_casting_the_module_casts_no_teacher(folder, choice):
    module = module_of(folder, **CHOICES[choice])
    there, expected = contents(module.teacher), module.teacher_logits(IDS)
    for moved in (module.to(torch.float16), module.double(), module.bfloat16(), module.to("cpu"), module.float()):
        assert moved is module
        assert_same(there, contents(module.teacher))
    assert torch.equal(module.teacher_logits(IDS), expected)


@pytest.mark.parametrize("choice", ["float32", "nf4", "int8", "offload"])
def test_copies_and_pickles_of_the_module_are_whole(folder, choice):
    module = module_of(folder, **CHOICES[choice])
    expected = module.teacher_logits(IDS)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(_plain(module)))):
        assert torch.equal(other.teacher_logits(IDS), expected)
        assert is_offloaded(other.teacher) == (choice == "offload")
        other.to(torch.bfloat16)
        assert torch.equal(other.teacher_logits(IDS), expected)


def _plain(module):
    module.make_optimizer = torch.optim.AdamW  # a lambda has no pickle
    return module


def test_averaging_weights_leaves_the_teacher_alone(folder):
    module = module_of(folder, teacher_quantization="nf4")
    there = contents(module.teacher)
    trainer(callbacks=[WeightAveraging()]).fit(module, loader())
    assert_same(there, contents(module.teacher))


def ddp(folder, choice):
    torch.manual_seed(0)
    module = module_of(folder, **CHOICES[choice])
    before = contents(module.teacher)
    trainer(devices=2, strategy="ddp", use_distributed_sampler=True).fit(module, loader())
    assert_same(before, contents(module.teacher))
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}, module.teacher_logits(IDS).float().numpy()


@pytest.mark.parametrize("choice", ["nf4", "int8", "offload"])
def test_two_processes(folder, choice):
    (first, mine), (second, yours) = run_ranks(ddp, folder, choice)
    assert all((tensor == second[name]).all() for name, tensor in first.items())
    assert (mine == yours).all()


def wrapped(folder):
    module = module_of(folder, teacher_offload=True)
    module.configure_model()
    torch.distributed.init_process_group("gloo")
    whole = torch.nn.parallel.DistributedDataParallel(module)
    return len(whole._module_parameters), len(list(module.student.parameters()))


def test_ddp_knows_nothing_of_weights_in_cpu_memory(folder):
    """It refuses parameters on two kinds of devices, which a teacher in CPU memory beside a student on a GPU would be."""
    assert all(known == trained for known, trained in run_ranks(wrapped, folder))


# ---------------------------------------------------------------- offloading


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_an_offloaded_model_computes_the_same(name):
    model = LANGUAGE_MODELS[name]().requires_grad_(False)
    expected = logits(model)
    assert torch.equal(logits(offload_weights(model)), expected)
    with torch.inference_mode():
        assert torch.equal(model(IDS[:2, :10]).logits, logits(LANGUAGE_MODELS[name](), IDS[:2, :10]))
    assert torch.equal(logits(bring_back(model)), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gemma3", "gpt2", "opt"])
def test_weights_come_to_the_inputs_one_block_at_a_time(name):
    """The meta device stands for a GPU: there, too, operands on two devices are an error."""
    model = offload_weights(LANGUAGE_MODELS[name]().requires_grad_(False))
    homes = {key: (id(p), p.data_ptr()) for key, p in model.named_parameters()}
    away = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_: away.append(sum(p.device.type == "meta" for _, p in _weights(model))))
    # A ready mask: one that is still to be made would be looked into, which this device cannot.
    masks = {} if name == "opt" else {"attention_mask": torch.zeros(2, 1, 10, 10, device="meta")}
    with torch.no_grad():
        out = model(input_ids=token_ids().to("meta"), use_cache=False, **masks).logits
    assert out.device.type == "meta"
    block = max(len(list(module.parameters())) for module in model.modules() if type(module).__name__ in model._no_split_modules)
    assert max(away) == block < len(homes)
    assert {key: (id(p), p.data_ptr()) for key, p in model.named_parameters()} == homes


def _weights(model):
    return [(name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None]


def test_weights_are_home_after_a_pass_that_failed(folder):
    model = load_teacher(folder, offload=True)
    expected = logits(model)

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(token_ids(2, 10).to("meta"), attention_mask=torch.zeros(2, 1, 10, 10, device="meta"))
    handle.remove()
    assert {p.device.type for _, p in _weights(model)} == {"cpu"}
    for name, buffer in wide().named_buffers():  # only buffers have followed, and the meta device forgets
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = buffer
    assert torch.equal(logits(model), expected)


def test_a_teacher_in_memory_may_be_offloaded_and_copied(folder):
    teacher = llama()
    module = module_of(teacher, teacher_offload=True)
    assert module.teacher is teacher
    assert is_offloaded(teacher)
    assert not is_offloaded(module.student)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.student.modules())
    assert not is_offloaded(module_of(teacher).teacher)  # by the next module that does not ask for it


def test_validation_and_training_may_alternate(folder):
    module, run = module_of(folder, teacher_offload=True), trainer()
    for _ in range(2):
        run.validate(module, loader(), verbose=False)  # in inference mode
        trainer().fit(module, loader())
    assert {p.is_inference() for p in module.teacher.parameters()} == {False}


# ---------------------------------------------------------------- refusals


def quantized_config(folder, tmp_path, settings):
    """A folder that says its weights are quantized."""
    config = json.loads((tmp_path / "config.json").read_text()) if (tmp_path / "config.json").exists() else llama().config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "pass teacher_quantization='nf4' if that"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "pass teacher_quantization='int8' if that is meant"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "quantized to fp4.*pass the float model"),
        ({"quant_method": "gptq", "bits": 4}, "quantized to gptq.*pass the float model"),
        ({"quant_method": "compressed-tensors"}, "quantized to compressed-tensors.*pass the float model"),
    ],
)
def test_a_quantized_checkpoint_is_no_teacher_by_mistake(folder, tmp_path, settings, words):
    path = quantized_config(folder, tmp_path, settings)
    with pytest.raises(ValueError, match=words):
        module_of(path)
    with pytest.raises(ValueError, match=r"student: its weights are quantized .*pass the float model"):
        module_of(folder, student=path)
    if settings["quant_method"] == "gptq":
        with pytest.raises(ValueError, match="quantized to gptq, teacher_quantization is 'nf4'"):
            module_of(path, teacher_quantization="nf4")


@pytest.fixture(scope="module")
def four_bit(folder):
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map={"": "cpu"})


def test_a_quantized_model_in_memory_has_to_be_meant(folder, four_bit):
    with pytest.raises(ValueError, match=r"teacher: the weights of LlamaForCausalLM are quantized; pass teacher_quantization='nf4'"):
        module_of(four_bit, student=folder)
    with pytest.raises(ValueError, match=r"quantized to nf4, teacher_quantization is 'int8'"):
        module_of(four_bit, student=folder, teacher_quantization="int8")
    with pytest.raises(ValueError, match=r"student: no copy of a teacher whose weights are quantized to nf4.*as student"):
        module_of(four_bit, teacher_quantization="nf4")
    with pytest.raises(ValueError, match=r"student: its weights are quantized to nf4"):
        module_of(folder, student=four_bit)
    module = module_of(four_bit, student=folder, teacher_quantization="nf4")
    assert module.teacher is four_bit
    trainer().fit(module, loader())


def test_a_repacked_model_in_memory_is_refused(four_bit, monkeypatch):
    state = four_bit.model.layers[0].mlp.up_proj.weight.quant_state
    monkeypatch.setattr(state, "packing_format_for_cpu", True, raising=False)
    with pytest.raises(ValueError, match=r"repacked model\.layers\.0\.mlp\.up_proj for this CPU.*pass the folder or hub id"):
        load_teacher(four_bit, quantization="nf4")


def test_rows_that_a_cpu_would_read_wrongly_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'nf4' needs rows of a multiple of 64, model\.layers\.0\.self_attn\.q_proj has 32; take 'int8'"):
        load_teacher(save_causal_lm(llama(), tmp_path), quantization="nf4")


def test_a_float_model_in_memory_is_not_quantized(folder):
    with pytest.raises(ValueError, match=r"teacher_quantization: got 'nf4' and a float LlamaForCausalLM in memory.*pass the folder"):
        module_of(llama(), teacher_quantization="nf4")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher_quantization": "int4"}, r"teacher_quantization: got 'int4', expected one of \('nf4', 'int8'\) or None"),
        ({"teacher_quantization": "nf4", "teacher_offload": True}, r"teacher_offload: cannot be combined with teacher_quantization='nf4'"),
        ({"teacher_quantization": "nf4", "teacher_dtype": "int8"}, r"dtype: got 'int8', expected 'float32'"),
    ],
)
def test_choices_that_do_not_exist(folder, options, words):
    with pytest.raises(ValueError, match=words):
        module_of(folder, **options)


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setattr(teachers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'nf4' needs the package accelerate.*pip install accelerate"):
        module_of(folder, teacher_quantization="nf4")


def test_a_student_of_the_teachers_parameters_is_refused():
    teacher = llama()
    with pytest.raises(ValueError, match=r"student: shares \d+ parameters with the teacher, the first is 'model.embed_tokens.weight'"):
        module_of(teacher, student=teacher)
    student = llama()
    student.lm_head.weight = teacher.lm_head.weight
    with pytest.raises(ValueError, match=r"student: shares 1 parameters with the teacher, the first is 'lm_head.weight'"):
        module_of(teacher, student=student)


def test_only_frozen_weights_in_cpu_memory_are_offloaded():
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' is trained, expected a frozen one in CPU memory"):
        offload_weights(llama())
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' is on meta, expected a frozen one in CPU memory"):
        offload_weights(llama().requires_grad_(False).to("meta"))


# ---------------------------------------------------------------- on a GPU


@on_gpu
@pytest.mark.parametrize("choice", CHOICES)
def test_on_a_gpu(folder, choice):
    module = module_of(folder, **CHOICES[choice])
    there, expected = contents(module.teacher), module.teacher_logits(IDS)
    trainer(accelerator="gpu").fit(module, loader())
    module.cuda()
    here = module.teacher_logits(IDS.cuda()).cpu()
    torch.testing.assert_close(here, expected, rtol=0, atol=0.05 * expected.float().std().item())
    assert_same(there, {name: tensor.cpu() for name, tensor in contents(module.teacher).items()})


@on_gpu
def test_a_gpu_holds_one_block_of_an_offloaded_teacher():
    teacher = llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=128)
    block = sum(p.numel() * p.element_size() for p in teacher.model.layers[0].parameters())
    offload_weights(teacher.requires_grad_(False))
    logits(teacher, IDS.cuda())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logits(teacher, IDS.cuda())
    assert torch.cuda.max_memory_allocated() - before < 2 * block
    assert torch.cuda.memory_allocated() - before < 0.1 * block
    assert all(p.is_pinned() for p in teacher.parameters())


@on_gpu
def test_statistics_of_int8_layers_follow_to_a_gpu_and_back(folder):
    teacher = load_teacher(folder, "float16", "int8")
    logits(teacher)
    move_teacher(teacher, lambda tensor: tensor.cuda())
    logits(teacher, IDS.cuda())
    move_teacher(teacher, lambda tensor: tensor.cpu())
    assert torch.equal(logits(teacher), logits(load_teacher(folder, "float16", "int8")))
    assert offload.HOOKS not in vars(teacher)
