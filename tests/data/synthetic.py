"""A small data module to change, and a run that remembers its batches."""

import lightning.pytorch as pl
import torch
from models import character_tokenizer, llama
from torch import nn

from lightning_qat import SyntheticDataModule

TEXT = "It is a truth universally acknowledged, that a single test in possession of a good oracle must be in want of a bug."
OTHER_TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, I went to sea."

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def teacher(**changes):
    """Several end tokens: samples of many lengths."""
    return llama(eos_token_id=list(range(90, 97)), **changes)


def module(folder, **changes):
    settings = {"num_samples": 21, "max_length": 12, "rows": 8, "batch_size": 4, "val_samples": 5, "store": folder}
    return SyntheticDataModule(**{"teacher": teacher()} | settings | changes)


def ready(folder, stage="fit", **changes):
    data = module(folder, **changes)
    data.setup(stage)
    return data


def ids(dataset):
    """The tokens of all items, as lists."""
    return [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]


def samples(data):
    """Tokens of all samples, the validation samples last."""
    return ids(data.train_dataset) + ids(data.val_dataset)


def chat_tokenizer():
    """Characters, with a template in which special tokens end a message: { and } for a user's, [ and ] for an assistant's."""
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["}", "]"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '{' + m.content + '}' if m.role == 'user' else '[' + m.content + ']' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[' }}{% endif %}"
    )
    return tokenizer


class Reader(pl.LightningModule):
    """Trains nothing and remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen, self.validated = nn.Linear(1, 1, bias=False), [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.current_epoch, rows_of(batch)))
        return self.layer.weight.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated += rows_of(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows_of(batch):
    """Token ids without padding, a list for each row."""
    return [row[: int(length)].tolist() for row, length in zip(batch["input_ids"], batch["attention_mask"].sum(-1), strict=True)]


def fit(data, ckpt_path=None, callbacks=(), **limits):
    reader = Reader()
    options = QUIET | {"num_sanity_val_steps": 1, "enable_checkpointing": bool(callbacks)} | limits
    trainer = pl.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **options)
    trainer.fit(reader, datamodule=data, ckpt_path=ckpt_path)
    return reader
