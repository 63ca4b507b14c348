"""Parser errors a person can read: what was wrong and what is allowed, instead of every option and every union that did not fit."""

import importlib
import inspect
import re
from typing import NoReturn

import jsonargparse
from lightning.pytorch.cli import LightningArgumentParser

from lightning_qat.registry import did_you_mean

_NOISE = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class", "Given value", "usage:", "tip:")


def brief(message: str) -> str:
    """The lines of a jsonargparse error that say something, with what would have been accepted."""
    lines = [line.strip() for line in message.splitlines()]
    useful = [line.removeprefix("- ") for line in lines if line and not line.startswith(_NOISE)]
    text = "\n  ".join(useful or lines)
    option, owner = re.search(r"Option '(\w+)' is not accepted", text), re.findall(r"class_path '([\w.]+)'", text)
    if option and owner:
        text += f"; {did_you_mean(option[1], _parameters(owner[-1]))}"
    return text


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    return [parameter for parameter in inspect.signature(cls).parameters if parameter != "self"]


class _BriefErrors:
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage of every option."""
        raise ValueError(brief(message)) from None


class CommandParser(_BriefErrors, jsonargparse.ArgumentParser):
    """Parser of the commands that are functions."""


class TrainerParser(_BriefErrors, LightningArgumentParser):
    """Parser of the commands of the Trainer."""
