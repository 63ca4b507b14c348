"""The planned peak against the one that the allocator counts in a real step of a Trainer: peaks of 500 MB and more, within 15 %.

They were seen within 0.5 %; with compiled kernels 5 % are asked for, so that a forgotten tensor shows.
"""

import json

import pytest
import torch
from counting import counted_peak
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_qat.numerics.backends import compiled
from lightning_qat.plan import Setting, estimate, read_shape

SIZES = {"vocab_size": 8000, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024}
DEEP = SIZES | {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 10}  # 40 million
WIDE = SIZES | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 16000}  # 53 million
SHALLOW = SIZES | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4}  # 41 million


def planned_and_counted(folder, sizes, setting):
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, tie_word_embeddings=False)
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    planned = estimate(read_shape(str(folder), setting.scheme), setting).allocated
    model = LlamaForCausalLM(config)
    if setting.teacher == "none":
        return planned, counted_peak(None, model, setting, config.vocab_size)
    return planned, counted_peak(model.to(getattr(torch, setting.teacher)), None, setting, config.vocab_size)


def check(folder, sizes, record=None, tolerance=0.15, **choices):
    setting = Setting(**{"gpus": 1, "strategy": "single", "device": "cpu", **choices})
    planned, counted = planned_and_counted(folder, sizes, setting)
    if record is not None:
        print(f"\nROW {record} | {planned / 1e6:,.0f} | {counted / 1e6:,.0f} | {planned / counted:.3f}")
    assert counted >= 500_000_000
    assert planned == pytest.approx(counted, rel=tolerance)


def test_planned_peak(tmp_path):
    """The quick one: a step of 128 tokens."""
    check(tmp_path, SHALLOW, precision="32-true", teacher="float32", batch_size=1, max_length=128, gradient_checkpointing=False)


TEACHER_OF = {"32-true": "float32", "bf16-mixed": "bfloat16"}
CASES = [
    (sizes, precision, teacher, checkpointing, chunk)
    for sizes in ("deep", "wide")
    for precision in TEACHER_OF
    for teacher, checkpointing, chunk in (
        (True, False, None),
        (True, True, None),
        (True, False, 128),
        (True, True, 128),
        (False, True, 128),
        (False, False, None),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "precision", "teacher", "checkpointing", "chunk"), CASES)
def test_planned_peaks(sizes, precision, teacher, checkpointing, chunk, tmp_path, monkeypatch):
    """Kernels are compiled, as after some steps of a long run."""
    monkeypatch.setattr(compiled, "WORTH_COMPILING", 0)
    settings = {"precision": precision, "gradient_checkpointing": checkpointing, "loss_chunk": chunk, "batch_size": 2, "max_length": 256}
    record = f"{sizes} | {precision} | {'yes' if teacher else 'no'} | {'yes' if checkpointing else 'no'} | {chunk or 'plain'}"
    check(tmp_path, {"deep": DEEP, "wide": WIDE}[sizes], record, 0.05, teacher=TEACHER_OF[precision] if teacher else "none", **settings)
