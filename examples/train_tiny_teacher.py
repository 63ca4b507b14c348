"""Train the Llama that ships with lightning_qat, from the source code of the Python standard library.

    python examples/train_tiny_teacher.py --minutes 50        # about 50 minutes on 2 cores; CPU only, no downloads

Writes weights (bf16 safetensors), tokenizer, config and model card to `lightning_qat/assets/tiny_teacher`, and the held-out text
with its licence note to `lightning_qat/assets/held_out`.
Needs the pinned Python, so that anybody gets the same text; see `stdlib_corpus.py` for what is in it and what is held out.
"""

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from stdlib_corpus import PINNED_PYTHON, Module, collect, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent.parent / "lightning_qat" / "assets"
CONTEXT = 512  # tokens
BATCH = 12  # sequences of CONTEXT tokens
VOCABULARY = 2048
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every byte string round-trips, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=[PAD, BOS, EOS], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]


class RandomCrops(Dataset):
    """Item i is a window of the shuffled corpus at a place drawn from (seed, i): resuming at step k needs only k."""

    def __init__(self, documents: list[list[int]], size: int, seed: int = 0) -> None:
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
        self.tokens = torch.tensor([token for i in order for token in documents[i]])
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        start = int(torch.randint(len(self.tokens) - CONTEXT, (1,), generator=generator))
        return self.tokens[start : start + CONTEXT + 1]


class TinyTeacher(pl.LightningModule):
    """Next-token training; Muon for the matrices inside the blocks, AdamW for embedding, head and norms."""

    def __init__(self, config: LlamaConfig, total_steps: int, warmup: int = 50) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = LlamaForCausalLM(config)
        self.total_steps, self.warmup = total_steps, warmup

    def configure_optimizers(self):
        inner = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "layers" in n]
        outer = [p for n, p in self.model.named_parameters() if p.ndim == 1 or "layers" not in n]
        muon = torch.optim.Muon(inner, lr=6e-3, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(outer, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        schedule = [torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate) for optimizer in (muon, adamw)]
        return [muon, adamw], schedule

    def rate(self, step: int) -> float:
        """Warm up, stay, then decay linearly over the second half."""
        left = (self.total_steps - step) / max(self.total_steps, 1)
        return min((step + 1) / self.warmup, 1.0, max(left / 0.5, 0.0))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            scheduler.step()
        self.log("train/loss", loss, prog_bar=True)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, module: Module) -> float:
    """All tokens of a module, in windows of CONTEXT inputs that do not overlap; nothing of a module goes unscored."""
    ids = torch.tensor(encode(tokenizer, module.text))
    nats = 0.0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = ids[start : start + CONTEXT + 1]
        logits = model(input_ids=window[None, :-1]).logits[0].float()
        nats += cross_entropy(logits, window[1:], reduction="sum").item()
    return nats / math.log(2) / len(module.text.encode())


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=5,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.04,
    )  # fmt: skip


def write_held_out(modules: list[Module], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"name": m.name, "text": m.text}) + "\n" for m in modules)
    (folder / "text.jsonl").write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "README.md").write_text(
        f"Held-out modules of the Python {PINNED_PYTHON} standard library, one JSON object a line (`name`, `text`).\n"
        "Licence: PSF-2.0 (Copyright (c) 2001-2023 Python Software Foundation; all rights reserved).\n"
        f"sha256 of text.jsonl: {digest}\n",
        encoding="utf-8",
    )


def write_card(path: Path, facts: dict[str, object]) -> None:
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    path.write_text(
        "---\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n"
        "# tiny_teacher\n\nA very small Llama that writes Python, trained by `examples/train_tiny_teacher.py` so that every "
        "program of lightning_qat runs offline.\nIt exists to be quantized, not to be useful.\n\n"
        f"| | |\n|---|---|\n{rows}\n",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=50.0, help="training time; the schedule is fitted to it")
    parser.add_argument("--steps", type=int, default=None, help="train this many steps instead of --minutes")
    parser.add_argument("--tokens-per-second", type=float, default=7000.0, help="speed used to turn minutes into steps")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--resume", type=Path, default=None, help="a checkpoint of an interrupted run")
    args = parser.parse_args()
    if platform.python_version() != PINNED_PYTHON:
        sys.exit(f"python: got {platform.python_version()}, the corpus is pinned to {PINNED_PYTHON}; use that interpreter")

    pl.seed_everything(0)
    modules = collect()
    train, held_out = split(modules)
    tokenizer = train_tokenizer([m.text for m in train])
    steps = args.steps or int(args.minutes * 60 * args.tokens_per_second / (BATCH * CONTEXT))
    data = RandomCrops([encode(tokenizer, m.text) for m in train], size=steps * BATCH)
    module = TinyTeacher(build_config(tokenizer), total_steps=steps)
    keep = ModelCheckpoint(dirpath=Path("runs") / "teacher", every_n_train_steps=400, save_last=True, save_top_k=0)
    trainer = pl.Trainer(
        max_steps=2 * steps,  # Lightning counts the steps of both optimizers
        max_epochs=1, accelerator="cpu", precision="bf16-mixed", logger=False, callbacks=[keep], log_every_n_steps=20,
    )  # fmt: skip
    started = time.monotonic()
    trainer.fit(module, DataLoader(data, batch_size=BATCH), ckpt_path=args.resume)

    model = module.model.to(torch.bfloat16).eval()
    folder = args.out / "tiny_teacher"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_held_out(held_out, args.out / "held_out")
    bits = sorted((bits_per_byte(model.float(), tokenizer, m), len(m.text.encode()), m.name) for m in held_out)
    write_card(
        folder / "README.md",
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "training tokens": f"{steps * BATCH * CONTEXT:,} of {len(data.tokens):,} distinct, {len(train)} modules",
            "settings": f"Muon 6e-3 (matrices) + AdamW 3e-3, bf16-mixed, batch {BATCH} x {CONTEXT}, {steps} steps, seed 0",
            "training time": f"{(time.monotonic() - started) / 60:.0f} minutes on {torch.get_num_threads()} CPU threads",
            "held-out bits per byte": f"{sum(b * n for b, n, _ in bits) / sum(n for _, n, _ in bits):.3f}",
            "median module": f"{bits[len(bits) // 2][2]}: {bits[len(bits) // 2][0]:.3f}",
            "worst module": f"{bits[-1][2]}: {bits[-1][0]:.3f}",
            "text": f"Python {PINNED_PYTHON} standard library (PSF-2.0), {len(held_out)} modules held out",
        },
    )
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
