"""Bit-width stages: codes of the stage in force, one scheme everywhere it is written down, exact resume, and refusals before any work."""

import json

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import llama, logits_of, mlp, token_ids
from scheduled import ROWS, Recording, loader, trainer
from torch.utils.data import DataLoader

from lightning_qat import (
    DistillationModule,
    QuantizationCallback,
    QuantScheme,
    TensorSpec,
    export,
    insert_quantizers,
    load_quantized,
    named_quantizers,
)
from lightning_qat.callbacks import BitStages, DelayedStart
from lightning_qat.modules import cached_weights, scheme_of
from lightning_qat.modules.bit_change import change_bits


def bits(module):
    return {q.spec.bits for name, q in named_quantizers(module) if "weight" in name}


def stages(scheme="w4a8", more=None):
    return QuantizationCallback(scheme), BitStages(more or {0: "w8a8", 3: "w4a8"})


@pytest.mark.parametrize("first", [0, 1])
def test_each_stage_begins_at_its_step(first):
    module = Recording(lambda module: (bits(module), scheme_of(module)))
    callbacks = stages("w2a8", {3: "w4a8", 0: "w8a8", 5: "w2a8"})
    trainer(callbacks[first], callbacks[1 - first]).fit(module, loader())
    expected = {step: 8 if step < 3 else 4 if step < 5 else 2 for step in range(8)}
    assert module.seen == {step: ({n}, QuantScheme.parse(f"w{n}a8")) for step, n in expected.items()}


def test_a_stage_trains_like_a_run_of_its_scheme():
    whole, eight, four = Recording(), Recording(), Recording()
    trainer(*stages(), steps=4).fit(whole, loader())
    trainer(QuantizationCallback("w8a8"), steps=3).fit(eight, loader())
    assert whole.losses[:3] == eight.losses
    four.net.load_state_dict(eight.net.state_dict())
    insert_quantizers(four, "w4a8")
    four.eval()
    assert whole.losses[3] == four(ROWS[12:16]).square().mean().item()


def other_bits(data):
    """The same scheme with another number of bits everywhere; where there is an override, siblings agree on their input."""
    parts = {role: data[role] | {"bits": 5} for role in ("weight", "input", "kv")}
    overrides = [override | {"input": parts["input"]} for override in data["overrides"]]
    return QuantScheme.parse(data | parts | {"overrides": overrides})


W4A8KV4 = QuantScheme.parse("w4a8kv4")
APART = QuantScheme.parse(W4A8KV4.to_dict() | {"overrides": [{"names": ["k_proj"], "input": {"bits": 3, "granularity": "token"}}]})


@pytest.mark.parametrize("final", [W4A8KV4, QuantScheme.parse("llm-qat"), APART], ids=["post_rope", "pre_rope", "siblings apart"])
def test_every_kind_of_quantizer_changes(final):
    """The same model as one that was quantized like that from the start, also where weights are kept; siblings that can share, share."""
    staged, fresh = llama(), llama()
    insert_quantizers(fresh, final)
    insert_quantizers(staged, other_bits(final.to_dict()))
    with cached_weights(staged):
        assert not torch.equal(logits_of(staged), logits_of(fresh))
        change_bits(staged, final)
        assert torch.equal(logits_of(staged), logits_of(fresh))
    attention = staged.model.layers[0].self_attn
    shared = [getattr(attention, name).shared_input is not None for name in ("q_proj", "k_proj", "v_proj")]
    assert shared == [final is not APART] * 3
    insert_quantizers(staged, final)  # nothing is missing, nothing differs


def test_products_on_integer_codes_follow():
    """The levels of w2 lie between integers, so its stage computes in floating point."""
    module = Recording(lambda module: {layer.int8_forward for layer in (module.net[0], module.net[2])})
    callbacks = QuantizationCallback("w4a8", int8_forward=True), BitStages({0: "w2a8", 1: "w8a8", 2: "w4a8"})
    trainer(*callbacks, steps=3).fit(module, loader())
    assert module.seen == {0: {False}, 1: {True}, 2: {True}}


def test_a_quantizer_keeps_its_switch_and_its_running_range():
    static = {"granularity": "tensor", "dynamic": False}
    six, eight = (QuantScheme(weight=TensorSpec(bits=4), input=TensorSpec(bits=n, **static)) for n in (6, 8))
    net = mlp().train()
    insert_quantizers(net, eight)
    net(ROWS)
    net[0].input_quantizer.running.merge()
    net[2].input_quantizer.enabled = False
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    change_bits(net, six)
    assert net[0].input_quantizer.spec.bits == 6
    assert not net[2].input_quantizer.enabled
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert float(net[0].input_quantizer.running.batches) == 1


def test_stages_and_delays_together():
    def look(module):
        return {(q.spec.bits, q.enabled) for name, q in named_quantizers(module) if "weight" in name}

    module = Recording(look)
    trainer(DelayedStart(weight=2), *stages(), steps=5).fit(module, loader())
    assert [module.seen[step] for step in range(5)] == [{(8, False)}, {(8, False)}, {(8, True)}, {(4, True)}, {(4, True)}]


def test_kept_weights_and_compiled_graphs_follow():
    torch._dynamo.reset()
    plain, kept, compiled = Recording(), Recording(), Recording()
    compiled.net = torch.compile(compiled.net, backend="eager", fullgraph=True)
    trainer(*stages(), steps=5).fit(plain, loader())
    trainer(*stages(), steps=5).fit(compiled, loader())
    assert compiled.losses == plain.losses
    trainer(*stages(), steps=5, accumulate_grad_batches=2).fit(kept, loader(2))
    assert kept.seen.keys() == plain.seen.keys()
    assert sum(kept.losses[6:8]) / 2 == pytest.approx(plain.losses[3], rel=1e-4)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("after", [2, 3, 4])
def test_resume_is_exact_with_a_stage_between(after, tmp_path):
    def fit(epochs, **kwargs):
        module = Recording(bits)
        run = trainer(*stages(), steps=-1, max_epochs=epochs)
        run.fit(module, loader(32), loader(32), **kwargs)
        return run, module

    (_, whole), (run, first) = fit(5), fit(after)
    run.save_checkpoint(tmp_path / "k.ckpt")
    _, second = fit(5, ckpt_path=tmp_path / "k.ckpt")
    assert first.seen | second.seen == whole.seen
    assert first.validated + second.validated == whole.validated
    assert first.losses + second.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize(("steps", "expected"), [(3, 8), (4, 4)])
def test_a_checkpoint_is_validated_with_the_bits_it_was_trained_with(steps, expected, tmp_path):
    run = trainer(*stages(), steps=-1, max_epochs=1, limit_train_batches=steps)
    run.fit(trained := Recording(), loader())
    run.save_checkpoint(tmp_path / "k.ckpt")
    module = Recording(bits)
    trainer(*stages()).validate(module, loader(32), ckpt_path=tmp_path / "k.ckpt", verbose=False)
    assert module.validated[0][1] == {expected}
    assert torch.equal(module(ROWS), trained(ROWS))
    assert scheme_of(module) == scheme_of(trained)
    (state,) = (s for key, s in torch.load(tmp_path / "k.ckpt", weights_only=True)["callbacks"].items() if "BitStages" in key)
    assert json.loads(json.dumps(state)) == state


def test_a_model_in_memory_is_evaluated_in_the_stage_it_is_in():
    run = trainer(*stages(), steps=-1, max_epochs=1, limit_train_batches=2)
    module = Recording(bits)
    run.fit(module, loader())
    run.validate(module, loader(32), verbose=False)
    trainer(*stages()).test(module, loader(32), verbose=False)
    assert [state for _, state in module.validated] == [{8}, {8}]
    trainer(*stages(), steps=4).fit(module, loader())
    trainer(*stages(), num_sanity_val_steps=1, steps=4).fit(module, loader(), loader(32))
    assert module.seen == {0: {8}, 1: {8}, 2: {8}, 3: {4}}
    assert module.validated[2] == (0, {8})


@pytest.mark.parametrize(("steps", "expected"), [(3, "w8a8"), (5, "w4a8")])
def test_what_is_saved_loaded_and_exported_is_what_was_trained(steps, expected, tmp_path):
    module = DistillationModule(teacher=llama(), student=None)
    ids = token_ids(5, 8)
    data = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=1)
    run = trainer(*stages(), steps=-1, max_epochs=1, limit_train_batches=steps)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "k.ckpt")
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "k.ckpt", teacher=llama(), weights_only=True)
    assert scheme_of(loaded.student) == QuantScheme.parse(expected)
    module.student.eval()
    loaded.student.eval()
    assert torch.equal(logits_of(loaded.student), logits_of(module.student))
    again = load_quantized(export(loaded.student, tmp_path / "exported"))
    assert torch.equal(logits_of(again), logits_of(module.student))


def test_another_schedule_is_refused_with_the_difference(tmp_path):
    run = trainer(*stages(), steps=4)
    run.fit(Recording(), loader())
    run.save_checkpoint(tmp_path / "k.ckpt")
    other = stages(more={0: "w6a8", 3: "w4a8"})
    with pytest.raises(MisconfigurationException, match=r"(?s)another schedule:.*BitStages\.0\.weight\.bits: 8 in the checkpoint, 6 here"):
        trainer(*other).fit(Recording(), loader(), ckpt_path=tmp_path / "k.ckpt")


def test_a_checkpoint_of_an_unfinished_schedule_needs_the_schedule(tmp_path):
    """Without it, the weights of w8a8 would be validated and trained as w4a8."""
    for steps in (3, 4):
        run = trainer(*stages(), steps=-1, max_epochs=1, limit_train_batches=steps)
        run.fit(Recording(), loader())
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
    alone = trainer(QuantizationCallback("w4a8"))
    with pytest.raises(MisconfigurationException, match=r"BitStages: the checkpoint was saved at step 2 .* due at step 3; add it"):
        alone.validate(Recording(), loader(32), ckpt_path=tmp_path / "3.ckpt", verbose=False)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        trainer(QuantizationCallback("w4a8")).validate(Recording(), loader(32), ckpt_path=tmp_path / "4.ckpt", verbose=False)


# ---------------------------------------------------------------- refusals


def test_the_last_stage_is_the_scheme_of_the_run():
    with pytest.raises(MisconfigurationException, match=r"(?s)BitStages\.stages\[3\]: the last stage.*bits: 2 in QuantizationCallback, 4"):
        trainer(*stages("w2a8")).fit(Recording(), loader())


@pytest.mark.parametrize("bad", [{}, {0: "w8"}, {1: "w8", 2: "w4"}, "w8", None])
def test_stages_have_to_be_stages(bad):
    with pytest.raises(ValueError, match=r"BitStages\.stages: got .*, expected a scheme for step 0 and one for at least one later step"):
        BitStages(bad)


@pytest.mark.parametrize(
    ("earlier", "message"),
    [
        ("w8", r"stages\[0\]: only bits may change.*\n  scheme\.input: None before"),
        ("w8g16a8", r"scheme\.weight\.group_size: 16 before, None here"),
        ("w8a8kv8", r"scheme\.kv: .* before, None here"),
        (QuantScheme.parse(QuantScheme.parse("w8a8").to_dict() | {"exclude": ["net.0"]}), r"scheme\.exclude: \['net\.0'\] before"),
    ],
)
def test_stages_of_other_layers_or_tensors_are_refused(earlier, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        BitStages({0: earlier, 3: "w4a8"})
    with pytest.raises(ValueError, match=r"stages: got -2, expected an optimizer step"):
        BitStages({0: "w8a8", -2: "w4a8"})


def test_learned_quantizers_are_refused_by_name(learned_scheme):
    data = learned_scheme.to_dict()
    earlier = QuantScheme.parse(data | {"weight": data["weight"] | {"bits": 8}})
    with pytest.raises(ValueError, match=r"stages\[0\]: weight\.quantizer: 'learned-in-schedules' learns parameters"):
        BitStages({0: earlier, 3: learned_scheme})
    BitStages({0: QuantScheme.parse(data), 3: learned_scheme})  # nothing changes, nothing to refuse


def test_a_running_range_belongs_to_its_quantizer():
    static = {"granularity": "tensor", "dynamic": False}
    earlier, final = (
        QuantScheme(weight=TensorSpec(bits=4, **static)),
        QuantScheme(weight=TensorSpec(bits=2, quantizer="mean_abs", **static)),
    )
    with pytest.raises(ValueError, match=r"weight\.dynamic: a running range of 'minmax' has no meaning for 'mean_abs'"):
        BitStages({0: earlier, 3: final})


def test_bits_of_a_model_without_quantizers_cannot_change():
    with pytest.raises(ValueError, match="change_bits: the model holds no quantizers"):
        change_bits(mlp(), QuantScheme.parse("w4"))
