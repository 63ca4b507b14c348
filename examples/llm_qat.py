"""LLM-QAT in a script: no training data, a 4-bit student of the bundled teacher, exported and read back.

python examples/llm_qat.py                       # about two minutes on 2 CPU cores
python examples/llm_qat.py --teacher path/or/hub/id --scheme w4a8kv4 --steps 12000 --max-length 2048
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_qat import DistillationModule, QuantizationCallback, SyntheticDataModule, export, load_quantized


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="tiny-teacher")
    parser.add_argument("--scheme", default="w4a8kv4")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4, help="the paper uses 2e-5 for LLaMA 7B")
    parser.add_argument("--out", type=Path, default=Path("runs/llm_qat_script"))
    args = parser.parse_args()

    module = DistillationModule(
        args.teacher,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps),
    )
    data = SyntheticDataModule(
        args.teacher,
        num_samples=args.steps * args.batch_size + 64,
        val_samples=64,
        max_length=args.max_length,
        batch_size=args.batch_size,
        store=args.out / "generations",
        validation="held-out",
    )
    trainer = pl.Trainer(
        max_steps=args.steps,
        accelerator="auto",
        precision="bf16-mixed",
        val_check_interval=args.steps // 2,
        limit_val_batches=8,
        logger=False,
        enable_checkpointing=False,
        callbacks=[QuantizationCallback(args.scheme)],
    )
    trainer.fit(module, data)
    folder = export(module.student, args.out / "export")
    student = load_quantized(folder)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.2f} MB, {type(student).__name__}")


if __name__ == "__main__":
    main()
