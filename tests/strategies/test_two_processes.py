"""DDP and FSDP2 in two real processes train what one process trains."""

import pytest
import torch
from distil import LEARNED, STEPS, Losses, codes, distil, loader, module, trainer, weights
from gloo import run_ranks
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import tied_llama
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_qat import DistillationModule, QuantScheme, TensorSpec
from lightning_qat.losses import HiddenStateLoss, SoftCrossEntropy
from lightning_qat.modules import scheme_of
from lightning_qat.modules.weights import full_weight, layer_weights, weight_dtypes
from lightning_qat.quantizers.running_range import RunningRange

KINDS = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def alone():
    return run_ranks(distil, "auto", 1, world=1)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_equal_those_of_one_process(kind, alone):
    first, second = run_ranks(distil, kind, 2)
    assert len(alone[0]) == STEPS
    assert first[0] == second[0] == pytest.approx(alone[0], rel=0, abs=1e-10)
    for name, weight in alone[1].items():
        torch.testing.assert_close(first[1][name], weight, rtol=0, atol=1e-10)
    for name, these in alone[2].items():
        assert torch.equal(first[2][name], these), name
        assert torch.equal(second[2][name], these), name


def with_validation(kind, world):
    made = module(gradient_checkpointing=True, loss=[SoftCrossEntropy(), HiddenStateLoss(weight=0.1)], loss_chunk=7)
    run = trainer(kind, world, max_steps=4, val_check_interval=2, num_sanity_val_steps=1)
    run.fit(made, loader(world), loader(world))
    values = {name: value.item() for name, value in run.callback_metrics.items()}
    (again,) = run.validate(made, loader(world), verbose=False)
    return values, again, weights(made.student)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_checkpointing_and_losses_of_layers_are_those_of_one_process(kind):
    (alone,) = run_ranks(with_validation, "auto", 1, world=1)
    first, second = run_ranks(with_validation, kind, 2)
    for name in ("val/kl", "val/top1", "val/ppl_generated"):
        assert first[0][name] == second[0][name] == pytest.approx(alone[0][name], rel=1e-6)  # metrics add up in fp32
        assert first[1][name] == pytest.approx(alone[1][name], rel=1e-6)
    for name, weight in alone[2].items():
        torch.testing.assert_close(first[2][name], weight, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- observers

STATIC = QuantScheme(weight=TensorSpec(bits=8), input=TensorSpec(bits=8, granularity="tensor", dynamic=False))


def static(kind, world, steps):
    made = module()
    trainer(kind, world, scheme=STATIC, max_steps=steps).fit(made, loader(world))
    return [(part.low.item(), part.high.item(), part.batches.item()) for part in made.modules() if isinstance(part, RunningRange)]


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_are_those_of_all_ranks_together(kind):
    first, second = run_ranks(static, kind, 2, 1)
    (alone,) = run_ranks(static, "auto", 1, 1, world=1)
    assert first == second
    assert len(first) == 14
    assert first[:3] == alone[:3]  # the inputs of q, k and v; behind them, the first batch is quantized with each rank's own range
    first, second = run_ranks(static, kind, 2, 3)
    assert first == second
    assert all(batches == 3 for _, _, batches in first)


# ---------------------------------------------------------------- checkpoints


def part_of_a_run(world, start, stop, path, resume=None):
    losses, made = Losses(), module()
    run = trainer("fsdp2", world, losses, max_steps=stop)
    run.fit(made, loader(world, start), ckpt_path=resume)
    run.save_checkpoint(path)
    return losses.values, weights(made.student)


def test_one_checkpoint_is_resharded_over_two_one_and_two_processes(alone, tmp_path):
    first, _ = run_ranks(part_of_a_run, 2, 0, 3, tmp_path / "a")
    (second,) = run_ranks(part_of_a_run, 1, 3, 6, tmp_path / "b", tmp_path / "a", world=1)
    third, other = run_ranks(part_of_a_run, 2, 6, STEPS, tmp_path / "c", tmp_path / "b")
    assert first[0] + second[0] + third[0] == pytest.approx(alone[0], rel=0, abs=1e-10)
    for name, weight in alone[1].items():
        torch.testing.assert_close(third[1][name], weight, rtol=0, atol=1e-10)
        assert torch.equal(third[1][name], other[1][name])
    kept = torch.load(tmp_path / "c" / "meta.pt", weights_only=True)
    assert kept["quantization_scheme"] == QuantScheme.parse("w4a8kv4").to_dict()


def one_file(path):
    made = module()
    plan = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    run = trainer(plan, 2, max_steps=2)
    run.fit(made, loader(2))
    run.save_checkpoint(path)
    return weights(made.student)


def test_a_sharded_run_writes_one_file_on_demand(tmp_path):
    trained, _ = run_ranks(one_file, tmp_path / "whole.ckpt")
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "whole.ckpt", teacher=tied_llama())
    assert scheme_of(loaded.student) == QuantScheme.parse("w4a8kv4")
    for name, weight in weights(loaded.student).items():
        assert torch.equal(weight, trained[name].float()), name
    keys = torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in keys if key.startswith("teacher.")]


# ---------------------------------------------------------------- the dtype that weights are gathered in


def in_bf16(path):
    """Codes of what the quantizers really saw after training, and of what is written down for export."""
    made, seen = module(dtype=None, param_dtype="bfloat16"), {}
    run = trainer("fsdp2", 2, max_steps=2, scheme="w8a8")
    run.fit(made, loader(2))
    for weight in layer_weights(made.student):
        weight.quantizer.register_forward_pre_hook(lambda quantizer, args, name=weight.name: seen.update({name: quantizer.codes(args[0])}))
    with torch.no_grad():
        made(torch.arange(3, 9)[None])
    run.save_checkpoint(path)
    return weight_dtypes(made.student), codes(made.student), {name: these.codes for name, these in seen.items()}


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    path = tmp_path_factory.mktemp("rounded") / "a"
    return path, run_ranks(in_bf16, path)[0]


def test_the_grid_of_weights_gathered_in_bf16_is_what_is_exported(rounded):
    _, (dtypes, written, seen) = rounded
    assert set(dtypes.values()) == {"bfloat16"}
    assert len(dtypes) == len(written) == len(seen) == 14
    for name, these in written.items():
        assert torch.equal(these, seen[name]), name


def go_on(path):
    made = module(dtype=None)
    trainer("fsdp2", 1, max_steps=2, scheme="w8a8").fit(made, loader(1), ckpt_path=path)
    rounded = codes(made.student)
    for weight in layer_weights(made.student):
        weight.layer.weight_dtype = None
    return rounded, codes(made.student)


def test_whoever_loads_such_a_checkpoint_has_its_grid(rounded):
    path, (_, written, _) = rounded
    ((loaded, naive),) = run_ranks(go_on, path, world=1)
    assert all(torch.equal(loaded[name], written[name]) for name in written)
    assert any(not torch.equal(naive[name], written[name]) for name in written)


# ---------------------------------------------------------------- weights that are read late


def late(kind, world, folder):
    losses = Losses()
    made = module(dtype=None, teacher=str(folder), defer_loading=True)
    assert all(p.is_meta for p in made.parameters())
    trainer(kind, world, losses, max_steps=3).fit(made, loader(world))
    model = made.student
    return losses.values, weights(model), model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(("kind", "world"), [("auto", 1), ("ddp", 2), ("fsdp2", 2)])
def test_deferred_weights_are_those_of_the_files(kind, world, tmp_path):
    tied_llama().save_pretrained(tmp_path)
    losses, trained, tied = run_ranks(late, kind, world, tmp_path, world=world)[0]
    (alone,) = run_ranks(distil, "auto", 1, {"dtype": None}, None, world=1)
    assert tied
    assert losses == pytest.approx(alone[0][:3], rel=1e-5)
    assert trained.keys() == alone[1].keys()


def without_files(folder):
    made = module(dtype=None, teacher=str(folder), defer_loading=True)
    with pytest.raises(ValueError, match="teacher: cannot read weights from"):
        trainer("fsdp2", 2).fit(made, loader(2))
    return True


def test_missing_files_stop_every_process(tmp_path):
    tied_llama().config.save_pretrained(tmp_path)
    assert all(run_ranks(without_files, tmp_path))


def test_a_model_in_memory_is_not_deferred():
    with pytest.raises(ValueError, match="defer_loading: teacher is a model in memory"):
        module(dtype=None, defer_loading=True)


# ---------------------------------------------------------------- learned scales, and what is refused


def tensor_parallel():
    with pytest.raises(MisconfigurationException, match="use data_parallel_size=2, tensor_parallel_size=1"):
        trainer(ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2), 2).fit(module(), loader(2))
    with pytest.raises(MisconfigurationException, match=r"tensor_parallel_size='auto'.*use data_parallel_size=2, tensor_parallel_size=1"):
        trainer(ModelParallelStrategy(data_parallel_size=2), 2).fit(module(), loader(2))  # Lightning's default
    return True


def test_tensor_parallelism_is_refused_with_the_way_out():
    assert all(run_ranks(tensor_parallel))


def learn(kind, world):
    losses, made = Losses(), module(dtype=None)
    trainer(kind, world, losses, scheme=LEARNED, max_steps=4).fit(made, loader(world))
    scales = {name: p for name, p in made.student.named_parameters() if name.endswith(".scale")}
    return losses.values, {name: full_weight(p).item() for name, p in scales.items()}, {type(p) for p in scales.values()}


@pytest.mark.parametrize("kind", KINDS)
def test_learned_scales_are_equal_on_all_ranks_and_to_one_process(kind):
    first, second = run_ranks(learn, kind, 2)
    (alone,) = run_ranks(learn, "auto", 1, world=1)
    assert first[:2] == second[:2]
    assert len(alone[1]) == 14
    assert first[2] == {DTensor if kind == "fsdp2" else nn.Parameter}
    assert first[0] == pytest.approx(alone[0], rel=1e-4)
    assert list(first[1].values()) == pytest.approx(list(alone[1].values()), rel=1e-3)
    assert any(abs(value - 0.05) > 1e-4 for value in alone[1].values())
