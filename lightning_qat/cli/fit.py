"""`lightning-qat fit` and its siblings: LightningCLI with a `quantization` group and a teacher that is named once."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_qat.callbacks import QuantizationCallback
from lightning_qat.cli.errors import TrainerParser
from lightning_qat.data import SyntheticDataModule  # noqa: F401  named in YAML files without their module
from lightning_qat.distillation import DistillationModule  # noqa: F401


class QATCli(LightningCLI):
    """Reads ``quantization``, ``model``, ``data`` and ``trainer`` from YAML and the command line.

    ``auto_configure_optimizers`` is off: an optimizer built before quantizers are inserted would not hold their parameters.
    """

    def __init__(self, run: bool = True) -> None:
        super().__init__(
            run=run,
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with readable errors."""
        kwargs.setdefault("dump_header", ["lightning_qat"])
        kwargs.setdefault("prog", "lightning-qat")
        parser = TrainerParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="Path to a configuration file in json or yaml format.")
        return parser

    def _parse_ckpt_path(self) -> None:
        """Settings come from the configuration alone; Lightning would lay a checkpoint's hyperparameters over it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callback's arguments."""
        parser.add_lightning_class_args(QuantizationCallback, "quantization")

    def before_instantiate_classes(self) -> None:
        """The teacher is named once, with the model, unless the data names its own: a student may train without one in memory.

        Data of another class that takes a ``tokenizer`` and no teacher gets the model's; samples' ``max_length`` is the data's alone, which
        checks it against the teacher's positions.
        """
        config = self.config[self.subcommand] if self.subcommand else self.config
        _check_checkpoint(config.get("ckpt_path"))
        model, data = config.get("model.init_args"), config.get("data.init_args")
        if model is None or data is None:
            return
        if "teacher" in data:
            data.teacher = data.teacher if data.teacher is not None else model.get("teacher")
        elif "tokenizer" in data and data.tokenizer is None:
            data.tokenizer = model.get("teacher") or model.get("student")


def _check_checkpoint(path: str | None) -> None:
    if path is None or path in ("best", "last", "hpc") or ":" in path:  # words and addresses that the Trainer resolves
        return
    if not Path(path).exists():
        raise ValueError(f"ckpt_path: no file or folder at {path!r}")


def run_trainer_command(args: Sequence[str], run: bool = True) -> QATCli:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` as if its arguments came from the command line.

    Args:
        args: The command and its options.
        run: With False, only build the model, data and trainer.
    """
    # The program's own name stays: on several devices Lightning starts it once more for each further process.
    with mock.patch.object(sys, "argv", [sys.argv[0], *(args if run else args[1:])]):
        return QATCli(run)
