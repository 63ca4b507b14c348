"""A small regression and a Trainer for the tests of schedules: 8 batches an epoch, one optimizer step each."""

import lightning.pytorch as pl
import torch
from models import mlp
from torch.utils.data import DataLoader

from lightning_qat.quantizers.minmax import MinMaxQuantizer

ROWS = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))


class Recording(pl.LightningModule):
    """16 numbers in, 8 out; calls `look(module)` in every training and validation step and keeps what it says by step."""

    def __init__(self, look=lambda module: None, lr=1e-2):
        super().__init__()
        self.net = mlp().train()
        self.look, self.lr = look, lr
        self.seen, self.validated, self.losses = {}, [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.seen[self.trainer.global_step] = self.look(self)
        loss = self(batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated.append((self.trainer.global_step, self.look(self)))
        self.log("loss", self(batch).square().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


def loader(batch_size=4):
    return DataLoader(ROWS, batch_size=batch_size)


def trainer(*callbacks, steps=8, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": -1, "max_steps": steps, "num_sanity_val_steps": 0}
    return pl.Trainer(callbacks=list(callbacks), **quiet | defaults | settings)


class LearnedQuantizer(MinMaxQuantizer):
    """Min-max with a learned gain."""

    def __init__(self, spec):
        super().__init__(spec)
        self.gain = torch.nn.Parameter(torch.ones(1))

    def scale_and_zero_point(self, rows):
        scale, zero_point = super().scale_and_zero_point(rows.detach())
        return scale * self.gain, zero_point
