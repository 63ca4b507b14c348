"""Logits a chunk at a time: the same losses, gradients and scores as all at once, and no tensor of the size of all logits."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import gemma3, gpt2, llama, mixtral, opt, qwen3, tied_llama, token_ids
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from lightning_qat import DistillationModule, QuantizationCallback, QuantScheme, TensorSpec, insert_quantizers
from lightning_qat.distillation.batches import read_batch
from lightning_qat.distillation.passes import Head, check_head, final_states
from lightning_qat.losses import AttentionLoss, HiddenStateLoss, LabelCrossEntropy, ReverseKL, SoftCrossEntropy, TopK
from lightning_qat.modules import QuantLayer

IDS = token_ids(3, 12)
MASK = torch.ones_like(IDS)
MASK[1, 7:] = 0
BATCH = {"input_ids": IDS, "attention_mask": MASK}
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


def small(model_class, config, **more):
    torch.manual_seed(7)
    return model_class(config(**SIZES | {"num_key_value_heads": 2} | more)).eval()


def gemma2():
    return small(Gemma2ForCausalLM, Gemma2Config, head_dim=8, final_logit_softcapping=3.0)


def cohere():
    return small(CohereForCausalLM, CohereConfig, logit_scale=0.25)


def granite():
    return small(GraniteForCausalLM, GraniteConfig, logits_scaling=4.0)


def module(teacher=llama, scheme="w4a8kv4", dtype=torch.float64, **options):
    made = DistillationModule(**{"teacher": None if teacher is None else teacher(), "student": (teacher or llama)()} | options)
    insert_quantizers(made.student, scheme)
    for model in (made.student, made.teacher):
        if model is not None:
            model.to(dtype)
    return made


def losses_and_gradients(made, batch=BATCH, metrics=("kl", "top1")):
    made.zero_grad()
    values = made.objective(made.student, made.teacher, read_batch(batch), metrics)
    values["loss"].backward()
    return values, {name: p.grad.clone() for name, p in made.student.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- chunked is plain


@pytest.mark.parametrize("teacher", [llama, tied_llama, gpt2, opt, qwen3, gemma2, cohere, granite], ids=lambda f: f.__name__)
def test_chunks_give_the_loss_and_gradients_of_all_logits_at_once(teacher):
    loss = [SoftCrossEntropy(), LabelCrossEntropy(weight=0.5), ReverseKL(temperature=2.0, weight=0.25)]
    plain, expected = losses_and_gradients(module(teacher, loss=loss, loss_chunk=None))
    for chunk in (1, 5, 1000):
        values, gradients = losses_and_gradients(module(teacher, loss=loss, loss_chunk=chunk))
        assert values.keys() == plain.keys() == {"loss", "soft_cross_entropy", "label_cross_entropy", "reverse_kl", "kl", "top1"}
        for name, value in plain.items():
            torch.testing.assert_close(values[name], value, rtol=1e-10, atol=1e-12)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-7, atol=1e-10)


def test_the_loss_is_the_papers():
    made = module(scheme="w4a8kv4")
    values, _ = losses_and_gradients(made)
    kept = MASK.bool()
    with torch.no_grad():
        targets = functional.softmax(made.teacher_logits(IDS, MASK)[kept], -1)
        expected = functional.cross_entropy(made(IDS, MASK)[kept], targets)
    torch.testing.assert_close(values["loss"], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_quantized_head_is_trained_through(chunk):
    scheme = QuantScheme.parse(QuantScheme.parse("w4a8kv4").to_dict() | {"exclude": ["model.embed_tokens"]})
    made = module(scheme=scheme, loss_chunk=chunk)
    assert isinstance(made.student.lm_head, QuantLayer)
    values, gradients = losses_and_gradients(made)
    with torch.no_grad():
        targets = functional.softmax(made.teacher_logits(IDS, MASK)[MASK.bool()], -1)
        expected = functional.cross_entropy(made(IDS, MASK)[MASK.bool()], targets)
    torch.testing.assert_close(values["loss"], expected, rtol=1e-10, atol=0)
    assert gradients["lm_head.weight"].abs().sum() > 0


def test_kept_distributions_stand_in_for_a_teacher():
    k = 5
    probabilities, ids = torch.softmax(llama()(IDS).logits, -1).topk(k)
    batch = BATCH | {"teacher": TopK(ids, probabilities, 1 - probabilities.sum(-1))}
    plain, expected = losses_and_gradients(module(teacher=None, loss_chunk=None), batch)
    values, gradients = losses_and_gradients(module(teacher=None, loss_chunk=4), batch)
    torch.testing.assert_close(values["loss"], plain["loss"])
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-9)


class Largest(TorchDispatchMode):
    """The size of the largest memory made inside, in bytes; views of what was there count as what they are views of."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return out


def test_no_tensor_is_as_large_as_all_logits():
    def largest(chunk):
        made = module(lambda: llama(vocab_size=4096), dtype=torch.float32, loss_chunk=chunk)
        ids = token_ids(16, 48)
        with Largest() as seen:
            losses_and_gradients(made, {"input_ids": ids})
        return seen.size

    assert largest(None) >= 16 * 48 * 4096 * 4
    assert largest(8) <= 4096 * 32 * 4  # that of the head's weight


def test_checkpointing_changes_no_gradient():
    _, expected = losses_and_gradients(module())
    made = module(gradient_checkpointing=True)
    made.train()
    _, gradients = losses_and_gradients(made)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_student_is_run_compiled(way):
    expected, gradients = losses_and_gradients(module())
    made, runs = module(), []

    def backend(graph, inputs):
        def run(*args):
            runs.append(1)
            return graph.forward(*args)

        return run

    if way == "wrapped":
        made.student = torch.compile(made.student, backend=backend)
    else:
        made.student.compile(backend=backend)
    values, found = losses_and_gradients(made)
    assert runs
    torch.testing.assert_close(values["loss"], expected["loss"], rtol=1e-6, atol=0)
    assert len(found) == len(gradients)


# ---------------------------------------------------------------- layers


def test_losses_of_layers_are_added_with_their_weights():
    loss = [SoftCrossEntropy(), HiddenStateLoss(weight=0.5), AttentionLoss(weight=2.0)]
    made = module(loss=loss, scheme="w4a8kv4")
    values, gradients = losses_and_gradients(made, metrics=())
    own, other = (
        model(IDS, attention_mask=MASK, output_hidden_states=True, output_attentions=True) for model in (made.student, made.teacher)
    )
    keep, pairs = MASK.bool(), list(zip(own.hidden_states, other.hidden_states, strict=True))
    hidden = sum((a[keep] - b[keep]).square().mean() for a, b in pairs)
    torch.testing.assert_close(values["hidden_states"], hidden.detach(), rtol=1e-8, atol=0)
    total = values["soft_cross_entropy"] + 0.5 * values["hidden_states"] + 2 * values["attentions"]
    torch.testing.assert_close(values["loss"].detach(), total, rtol=1e-10, atol=0)
    assert values["attentions"] > 0
    assert gradients["model.layers.0.self_attn.q_proj.weight"].abs().sum() > 0


def test_layers_alone_need_no_logits():
    values, gradients = losses_and_gradients(module(loss=HiddenStateLoss()), metrics=())
    assert values.keys() == {"loss"}
    assert "lm_head.weight" not in gradients


# ---------------------------------------------------------------- what is refused


def test_settings_that_cannot_work_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="loss_chunk: got 0, expected a number of tokens of at least 1"):
        module(loss_chunk=0)
    with pytest.raises(ValueError, match="loss: got an empty list"):
        module(loss=[])
    with pytest.raises(ValueError, match="loss: MSELoss is called with all logits at once; pass loss_chunk=None"):
        module(loss=nn.MSELoss())
    with pytest.raises(ValueError, match="loss: hidden_states compares layers with those of a teacher; pass teacher="):
        DistillationModule(student=llama(), loss=HiddenStateLoss())


class Shifted(type(llama())):
    """A model whose logits are not its head's."""

    def forward(self, *args, logits_to_keep=0, **kwargs):
        outputs = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs


def test_logits_that_are_not_the_heads_are_refused():
    model = llama()
    model.__class__ = Shifted
    with pytest.raises(MisconfigurationException, match="loss_chunk: the logits of the student, a Shifted, are not its head's; pass"):
        check_head(model, "student", torch.device("cpu"))


def test_a_head_with_one_range_for_all_tokens_is_refused():
    scheme = QuantScheme(weight=TensorSpec(bits=8), input=TensorSpec(bits=8, granularity="tensor"), exclude=("model.embed_tokens",))
    model = llama()
    insert_quantizers(model, scheme)
    with pytest.raises(MisconfigurationException, match=r"head of the student has one range for all tokens .*; pass loss_chunk=None"):
        check_head(model, "student", torch.device("cpu"))


@pytest.mark.parametrize("teacher", [llama, gpt2, opt, qwen3, gemma3, gemma2, cohere, granite, mixtral], ids=lambda f: f.__name__)
def test_heads_are_found(teacher):
    model = teacher()
    check_head(model, "teacher", torch.device("cpu"))
    states = final_states(model, {"input_ids": IDS})
    torch.testing.assert_close(Head(model)(states.final), model(IDS).logits)


# ---------------------------------------------------------------- in a Trainer


def test_every_loss_is_logged_under_its_name():
    loss = [SoftCrossEntropy(), LabelCrossEntropy(weight=0.1)]
    made = DistillationModule(teacher=llama(), loss=loss)
    data = DataLoader([{"input_ids": row} for row in token_ids(4, 9)], batch_size=2)
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
                         enable_model_summary=False, log_every_n_steps=1, callbacks=[QuantizationCallback("w4a8")])  # fmt: skip
    trainer.fit(made, data)
    logged = trainer.callback_metrics
    assert {"train/loss", "train/soft_cross_entropy", "train/label_cross_entropy", "train/kl"} <= logged.keys()
    torch.testing.assert_close(logged["train/loss"], logged["train/soft_cross_entropy"] + 0.1 * logged["train/label_cross_entropy"])
