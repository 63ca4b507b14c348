"""The tiny module that the tests of this folder train beside other people's callbacks: 16 numbers in, 8 out."""

import lightning.pytorch as pl
import torch
from models import mlp
from torch.utils.data import DataLoader

from lightning_qat.modules import QuantLayer

INPUTS = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


class Regression(pl.LightningModule):
    """Any module a user might have; it calls itself with keywords."""

    def __init__(self, lr=1e-2, batch_size=4):
        super().__init__()
        self.lr, self.batch_size = lr, batch_size
        self.net = mlp().train()

    def forward(self, x, *, gain=1.0):
        return self.net(x) * gain

    def training_step(self, batch, batch_idx):
        return self(batch, gain=2.0).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def train_dataloader(self):
        return DataLoader(INPUTS, batch_size=self.batch_size)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def loader(batch_size=4):
    """Two batches, one epoch."""
    return DataLoader(INPUTS, batch_size=batch_size)


def trainer(*callbacks, epochs=2, **kwargs):
    return pl.Trainer(**QUIET | {"max_epochs": epochs, "callbacks": list(callbacks)} | kwargs)


def quantized_layers(module):
    return [name for name, layer in module.named_modules() if isinstance(layer, QuantLayer)]


def same_state(one, other):
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
