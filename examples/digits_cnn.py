"""A small convolutional network on real digits, down to 4-bit weights and 4-bit activations with one callback.

    python examples/digits_cnn.py --scheme w4a4         # needs scikit-learn; CPU is enough

Prints:

    4 layers quantized: 100.0% of the matrix weights in reach of the scheme, 100.0% of all; keys and values of 0 attention modules

    w4a4, seed 0, 540 test images
      full precision                           98.15 %
      rounded to nearest, not trained          97.41 %
      trained with QuantizationCallback        97.96 %
      exported and reloaded                    97.96 %
    4.15 bits per weight with scales; the reloaded model predicts the same

The same with --scheme w2a4:

    w2a4, seed 0, 540 test images
      full precision                           98.15 %
      rounded to nearest, not trained          96.48 %
      trained with QuantizationCallback        97.78 %
      exported and reloaded                    97.78 %
    2.15 bits per weight with scales; the reloaded model predicts the same
"""

import copy
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from digits_data import QUIET, accuracy, parse_args, predictions, print_table, train_loader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_qat import QuantizationCallback, QuantScheme, export, insert_quantizers, load_quantized


class DigitsCNN(pl.LightningModule):
    """An ordinary module: nothing in it knows about quantization."""

    def __init__(self, lr: float = 5e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self(images), labels)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_float(seed: int, epochs: int = 8) -> DigitsCNN:
    """A network trained in full precision."""
    pl.seed_everything(seed, verbose=False)
    module = DigitsCNN()
    pl.Trainer(max_epochs=epochs, **QUIET).fit(module, train_loader(seed))
    return module


def finetune(module: DigitsCNN, scheme: str, seed: int = 0, epochs: int = 6, lr: float = 1e-3) -> DigitsCNN:
    """Quantize the module in place and train it on; a fifth of the learning rate, because the weights only have to settle on a grid."""
    pl.seed_everything(seed, verbose=False)
    module.lr = lr
    pl.Trainer(max_epochs=epochs, callbacks=[QuantizationCallback(scheme)], **QUIET).fit(module, train_loader(seed))
    return module


def main() -> None:
    args = parse_args(__doc__, epochs=6)
    module = train_float(args.seed)
    rows = {"full precision": accuracy(module)}

    rounded = copy.deepcopy(module)
    print(insert_quantizers(rounded, args.scheme))
    rows["rounded to nearest, not trained"] = accuracy(rounded)

    finetune(module, args.scheme, args.seed, args.epochs)
    rows["trained with QuantizationCallback"] = accuracy(module)

    with tempfile.TemporaryDirectory() as scratch:
        folder = export(module, args.out or Path(scratch) / "digits_cnn")
        reloaded = load_quantized(folder, model=DigitsCNN())
    rows["exported and reloaded"] = accuracy(reloaded)

    print_table(f"{args.scheme}, seed {args.seed}, 540 test images", rows)
    bits = QuantScheme.parse(args.scheme).effective_bits(module)
    same = torch.equal(predictions(module), predictions(reloaded))
    print(f"{bits:.2f} bits per weight with scales; the reloaded model predicts {'the same' if same else 'something else'}")


if __name__ == "__main__":
    main()
