"""What the digits examples share: data, accuracy, command line. See `digits_cnn.py` and `digits_vit.py`.

Real handwritten digits, 1797 images of 8 x 8 that ship with scikit-learn, so nothing is downloaded. The split is fixed (1257 images
to train, 540 to test), so runs differ by their training seed alone.
"""

import argparse
import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

SPLIT_SEED = 0
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to train on, and to test on; images [n, 1, 8, 8] in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.3, random_state=SPLIT_SEED, stratify=labels)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for part in parts[:2])
    train_y, test_y = (torch.tensor(part) for part in parts[2:])
    return (train_x, train_y), (test_x, test_y)


def train_loader(seed: int, batch_size: int = 64) -> DataLoader:
    (images, labels), _ = digits()
    order = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(images, labels), batch_size, shuffle=True, drop_last=True, generator=order)


@torch.no_grad()
def predictions(module: pl.LightningModule) -> Tensor:
    """Predicted classes of the test images, shape [540]."""
    _, (images, _) = digits()
    mode = module.training
    logits = module.eval()(images.to(module.device))
    module.train(mode)  # `fit` trains in the mode it finds: batch norm left in eval would stay frozen
    return logits.argmax(-1).cpu()


def accuracy(module: pl.LightningModule) -> float:
    """Percent of the test images."""
    _, (_, labels) = digits()
    return 100 * (predictions(module) == labels).float().mean().item()


def parse_args(description: str | None, epochs: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a4", help="a scheme string or a preset's name (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the data (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=epochs, help="of quantization-aware fine-tuning (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="empty folder for the export (default: a temporary one)")
    # The output is the table; Lightning's notes on devices, data workers and loggers would bury it.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    return parser.parse_args()


def print_table(title: str, rows: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:<40}{value:6.2f} %")
