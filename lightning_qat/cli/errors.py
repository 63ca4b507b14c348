"""Parser errors a person can read: what was wrong and what is allowed, instead of every option and every union that did not fit."""

import inspect
import re
import sys
from typing import Any, NoReturn

import jsonargparse
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser

import lightning_qat
from lightning_qat import callbacks, losses
from lightning_qat.registry import did_you_mean

_NOISE: tuple[str, ...] = (
    "Does not validate",
    "- Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "- Problem with given",
    "usage:",
    "tip:",
)
_NOISE += ("- Expected a <class", "Expected a path but", "- Expected a path but")
_NOISE += ("Not a valid subclass", "- Not a valid subclass", "Subclass types expect")
_NOISE += ("- a class path (", "- a dict with", "a class path (", "a dict with")
_UNKNOWN_CLASS = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")


_UNION = re.compile(
    r'Parser key "([\w.]+)":\s+Does not validate against any of the Union subtypes\s+Subtypes: \[(.*)\]\n(?s:.*)Given value: (.*)'
)
_CLASS_PATH = re.compile(r"""class_path['"]?:? ?['"]([\w.]+)['"]""")
_SHORT_NAME = re.compile(r"Expected a dot import path string: (\w+)$")
_PLAIN = re.compile(r"<class '(\w+)'>|typing\.Literal\[([^\]]*)\]")


def _one_of_several(message: str) -> str | None:
    """A value that is of none of the plain types that an option takes."""
    found = _UNION.search(message)
    if found is None or _PLAIN.sub("", found[2]).strip(" ,|"):
        return None
    names = [name.replace("NoneType", "null") or literal for name, literal in _PLAIN.findall(found[2])]
    return f"{found[1]}: got {found[3].strip()!r}, expected {' or '.join(names)}"


def brief(message: str) -> str:
    """The lines of a jsonargparse error that say something, with what would have been accepted."""
    if (plain := _one_of_several(message)) is not None:
        return plain
    lines = [line.strip() for line in message.splitlines()]
    useful = [line.removeprefix("- ") for line in lines if line and not line.startswith(_NOISE)]
    text = "\n  ".join(useful or lines)
    if (unknown := _UNKNOWN_CLASS.search(text)) and (names := getattr(sys.modules.get(unknown[1]), "__all__", None)):
        text = text.replace(unknown[0], f"{unknown[0]}; {did_you_mean(unknown[2], [name for name in names if name[0].isupper()])}")
    if short := _SHORT_NAME.search(text):
        known = {name for room in (lightning_qat, callbacks, losses) for name in room.__all__ if name[0].isupper()}
        text = text.replace(
            short[0], f"no class has the short name {short[1]!r}, {did_you_mean(short[1], known)} (others: their full path)"
        )
    option = re.search(r"Option '(\w+)' is not accepted(?!; expected)", text)
    owners = _CLASS_PATH.findall(message[: message.find("is not accepted")] if option else "")
    owners = owners or _CLASS_PATH.findall(message)
    keys = re.findall(r'Parser key "(\w+)"', text)
    if option and owners and (allowed := _parameters(owners[-1])) and not set(keys[-1:]) & set(allowed):  # not of an argument's own fields
        text = text.replace(option[0], f"{option[0]}; {did_you_mean(option[1], allowed)}")
    return text


def _parameters(class_path: str) -> list[str]:
    """What the constructor of a class takes; short names are those that YAML files may use."""
    name = class_path.rsplit(".", 1)[-1]
    found: Any = next((getattr(room, name) for room in (lightning_qat, callbacks, losses) if hasattr(room, name)), None)
    for base in (LightningModule, LightningDataModule):
        found = found or next((cls for cls in base.__subclasses__() if cls.__name__ == name), None)
    return [] if found is None else [parameter for parameter in inspect.signature(found).parameters if parameter != "self"]


class _BriefErrors:
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage of every option."""
        raise ValueError(brief(message)) from None


class CommandParser(_BriefErrors, jsonargparse.ArgumentParser):
    """Parser of the commands that are functions."""


class TrainerParser(_BriefErrors, LightningArgumentParser):
    """Parser of the commands of the Trainer."""
