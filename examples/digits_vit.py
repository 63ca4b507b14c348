"""A tiny vision transformer from transformers, inside a LightningModule of one's own, down to 4-bit weights and activations.

    python examples/digits_vit.py --scheme w4a4         # needs scikit-learn; CPU is enough

Prints:

    14 layers quantized: 96.7% of the matrix weights in reach of the scheme, 96.7% of all; keys and values of 0 attention modules
      left alone: vit.vit.embeddings (ViTEmbeddings, 576 weights): no quantized layer is registered for this type

    w4a4, seed 0, 540 test images
      full precision                           95.56 %
      rounded to nearest, not trained          95.19 %
      trained with QuantizationCallback        95.74 %
      exported and reloaded                    95.74 %
    4.93 bits per weight with scales; the reloaded model predicts the same

The same with --scheme w2a4:

    w2a4, seed 0, 540 test images
      full precision                           95.56 %
      rounded to nearest, not trained          88.70 %
      trained with QuantizationCallback        95.93 %
      exported and reloaded                    95.93 %
    2.93 bits per weight with scales; the reloaded model predicts the same
"""

import copy
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from digits_data import QUIET, accuracy, parse_args, predictions, print_table, train_loader
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from lightning_qat import QuantizationCallback, QuantScheme, export, insert_quantizers, load_quantized


class DigitsViT(pl.LightningModule):
    """16 patches of 2 x 2 pixels, two layers of width 32; about 17,000 weights, all but the position table in quantized layers."""

    def __init__(self, lr: float = 5e-3) -> None:
        super().__init__()
        self.lr = lr
        config = ViTConfig(
            image_size=8, patch_size=2, num_channels=1, num_labels=10, hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=4,
        )  # fmt: skip
        self.vit = ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(pixel_values=images).logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return self.vit(pixel_values=images, labels=labels).loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_float(seed: int, epochs: int = 20) -> DigitsViT:
    """A transformer trained in full precision."""
    pl.seed_everything(seed, verbose=False)
    module = DigitsViT()
    pl.Trainer(max_epochs=epochs, gradient_clip_val=1.0, **QUIET).fit(module, train_loader(seed))
    return module


def finetune(module: DigitsViT, scheme: str, seed: int = 0, epochs: int = 10, lr: float = 2e-3) -> DigitsViT:
    """Quantize the module in place and train it on."""
    pl.seed_everything(seed, verbose=False)
    module.lr = lr
    callbacks = [QuantizationCallback(scheme)]
    pl.Trainer(max_epochs=epochs, gradient_clip_val=1.0, callbacks=callbacks, **QUIET).fit(module, train_loader(seed))
    return module


def main() -> None:
    args = parse_args(__doc__, epochs=10)
    module = train_float(args.seed)
    rows = {"full precision": accuracy(module)}

    rounded = copy.deepcopy(module)
    print(insert_quantizers(rounded, args.scheme))
    rows["rounded to nearest, not trained"] = accuracy(rounded)

    finetune(module, args.scheme, args.seed, args.epochs)
    rows["trained with QuantizationCallback"] = accuracy(module)

    with tempfile.TemporaryDirectory() as scratch:
        folder = export(module, args.out or Path(scratch) / "digits_vit")
        reloaded = load_quantized(folder, model=DigitsViT())
    rows["exported and reloaded"] = accuracy(reloaded)

    print_table(f"{args.scheme}, seed {args.seed}, 540 test images", rows)
    bits = QuantScheme.parse(args.scheme).effective_bits(module)
    same = torch.equal(predictions(module), predictions(reloaded))
    print(f"{bits:.2f} bits per weight with scales; the reloaded model predicts {'the same' if same else 'something else'}")


if __name__ == "__main__":
    main()
