"""Quantized models for the tests of export targets, and a LightningModule of a user's own."""

import lightning.pytorch as pl
import torch
from models import VOCABULARY, llama, token_ids
from torch.nn import functional

from lightning_qat import QuantizationCallback, insert_quantizers

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # groups of 32 and 64 fit


def wide_llama(**changes):
    return llama(**WIDE | changes)


def in_half(build, dtype=torch.bfloat16):
    """As transformers loads it: weights in half precision, rotary frequencies in fp32."""

    def cast(**changes):
        model = build(**changes)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    return cast


def quantized(build, scheme, **changes):
    model = build(**changes)
    insert_quantizers(model, scheme, allow_partial=True)
    return model


class NextToken(pl.LightningModule):
    """A plain user's module around a transformers model: it knows nothing of quantization."""

    def __init__(self, network, vocabulary=VOCABULARY, length=10, lr=1e-3):
        super().__init__()
        self.network, self.vocabulary, self.length, self.lr = network, vocabulary, length, lr

    def training_step(self, batch, index):
        logits = self.network(batch).logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        rows = token_ids(64, self.length) % self.vocabulary
        return torch.utils.data.DataLoader(rows, batch_size=2)


def trained(network, scheme, steps, **settings):
    """A LightningModule whose network was trained by a Trainer that has the callback and nothing else."""
    module = NextToken(network, **settings)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = QuantizationCallback(scheme, allow_partial=True)
    pl.Trainer(max_steps=steps, accelerator="cpu", devices=1, callbacks=[callback], **quiet).fit(module)
    return module
