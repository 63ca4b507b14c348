"""Quantization-aware training in a loop of your own, with Lightning Fabric in place of the Trainer: real digits, a few seconds on a CPU.

    python examples/fabric_qat.py --scheme w4a4              # needs scikit-learn
    python examples/fabric_qat.py --scheme w4a4 --devices 2  # two processes, DDP

Prints, with one process:

    w4a4, seed 0, 540 test images
      full precision                           97.22 %
      rounded to nearest, not trained          96.67 %
      trained in a Fabric loop                 97.22 %
      exported and reloaded                    97.22 %

Three lines make an ordinary Fabric loop a quantization-aware one: `insert_quantizers` before `fabric.setup`, which wraps the model and
may shard it; `merge_ranges` after each step, which folds the ranges that static quantizers saw into one that all processes share
(a scheme string has none: its ranges are those of the tensor at hand); and `export` at the end.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from digits_data import digits, print_table, train_loader
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_qat import QuantScheme, export, insert_quantizers, load_quantized
from lightning_qat.quantizers.running_range import merge_ranges


def network() -> nn.Module:
    """An ordinary network: nothing in it knows about quantization."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def train(fabric: Fabric, model: nn.Module, epochs: int, lr: float, seed: int) -> nn.Module:
    """Train a model in place, quantized or not, and return it unwrapped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)  # after insert_quantizers: quantizers may have parameters
    wrapped, optimizer = fabric.setup(model, optimizer)
    batches = fabric.setup_dataloaders(train_loader(seed))
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            loss = cross_entropy(wrapped(images), labels)
            fabric.backward(loss)
            optimizer.step()
            merge_ranges(wrapped)
    return model


@torch.no_grad()
def predictions(model: nn.Module) -> Tensor:
    """Predicted classes of the test images, shape [540]."""
    _, (images, _) = digits()
    return model.eval().cpu()(images).argmax(-1)


def accuracy(model: nn.Module) -> float:
    """Percent of the test images."""
    _, (_, labels) = digits()
    return 100 * (predictions(model) == labels).float().mean().item()


def run(fabric: Fabric, scheme: str | QuantScheme, seed: int = 0, epochs: int = 6) -> tuple[nn.Module, dict[str, float]]:
    """Train in full precision, quantize, train on; the quantized model and its accuracies."""
    fabric.seed_everything(seed, verbose=False)
    model = train(fabric, network(), epochs, lr=5e-3, seed=seed)
    rows = {"full precision": accuracy(model)}

    insert_quantizers(model, scheme)
    rows["rounded to nearest, not trained"] = accuracy(model)
    train(fabric, model.train(), epochs, lr=1e-3, seed=seed)
    rows["trained in a Fabric loop"] = accuracy(model)
    return model, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a4", help="a scheme string or a preset's name (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the data (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="of each of the two trainings (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="empty folder for the export (default: a temporary one)")
    args = parser.parse_args()

    fabric = Fabric(accelerator="cpu", devices=args.devices, strategy="ddp" if args.devices > 1 else "auto")
    fabric.launch()
    model, rows = run(fabric, args.scheme, args.seed, args.epochs)
    if fabric.is_global_zero:
        with tempfile.TemporaryDirectory() as scratch:
            reloaded = load_quantized(export(model, args.out or Path(scratch) / "digits"), model=network())
        rows["exported and reloaded"] = accuracy(reloaded)
        print_table(f"{args.scheme}, seed {args.seed}, 540 test images", rows)


if __name__ == "__main__":
    main()
