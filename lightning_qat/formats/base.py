"""What a format has to offer, and what it is given.

To add one, write `formats/foo.py` with a :class:`Format` under ``@formats.register("foo")``; what its runtime executes goes into
:data:`~lightning_qat.runtime.runtimes` under the same name, so that models can be trained for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_qat.formats.exactness.executed import Example
from lightning_qat.formats.exactness.fitting import Fit
from lightning_qat.registry import Registry
from lightning_qat.runtime import Runtime
from lightning_qat.scheme import QuantScheme


@dataclass(frozen=True, kw_only=True)
class Job:
    """One export.

    Attributes:
        model: What is written: a transformers model for formats that need one, else the whole module.
        scheme: What it was quantized with.
        fit: How the runtime will execute it.
        tokenizer: The model's tokenizer, or None.
        example: Keyword arguments to run the model with, or None.
        results: Figures for the model card.
    """

    model: nn.Module
    scheme: QuantScheme
    fit: Fit
    tokenizer: Any = None
    example: Example | None = None
    results: Mapping[str, float] | None = None


class Format(ABC):
    """One way of writing a quantized model, for one runtime.

    Attributes:
        name: Its registered name.
        runtime: What its runtime executes; None for everything that was trained.
        packages: Modules that must be importable; the extra that installs them is called like the format.
        transformers_only: Whether only models of transformers can be written.
        transformers_first: Whether a model of transformers is written alone, without the module that holds it.
        traces: Whether the forward pass itself is written: a module that there is an example for is then written whole.
        library: What the hub calls the library that loads the folder, such as ``transformers``; for the model card.
    """

    name: ClassVar[str]
    runtime: ClassVar[Runtime | None] = None
    packages: ClassVar[tuple[str, ...]] = ()
    transformers_only: ClassVar[bool] = False
    transformers_first: ClassVar[bool] = False
    traces: ClassVar[bool] = False
    library: ClassVar[str] = "lightning_qat"

    def scale_dtype(self, model: nn.Module) -> torch.dtype:
        """What scales of weights are stored in; one that is not a number of this type does not fit."""
        return torch.float32

    def check(self, job: Job) -> None:
        """Refuse with a ValueError what rules cannot tell, such as shapes and a missing tokenizer; nothing is written yet."""
        return None

    @abstractmethod
    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """Write codes, scales and all that belongs to the model into an empty folder; returns further entries of the manifest."""

    @abstractmethod
    def verify(self, job: Job, folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
        """Read everything back with the runtime's own library and compare it bit for bit.

        Args:
            job: What was written.
            folder: Where.
            entries: What :meth:`write` returned.

        Returns:
            What was compared, for the manifest: ``codes_different``, ``scales_different`` and ``max_logit_difference`` where there is one.

        Raises:
            RuntimeError: Something reads back differently.
        """

    def usage(self, job: Job) -> str:
        """Lines of Python for the model card that load the folder, called ``"folder"`` in them, with the runtime's own library."""
        own = "" if isinstance(job.model, PreTrainedModel) else ", model=MyModel()"
        return f'from lightning_qat import load_quantized\n\nmodel = load_quantized("folder"{own})'

    @abstractmethod
    def load(self, folder: Path, manifest: dict[str, Any], model: nn.Module | None = None) -> Any:
        """The model of an export, as the runtime's own library loads it."""


formats: Registry[type[Format]] = Registry("format", "lightning_qat.formats")


def check_packages(cls: type[Format]) -> None:
    """Refuse a format whose libraries are not installed."""
    if missing := [package for package in cls.packages if find_spec(package) is None]:
        raise ValueError(f"format: {cls.name!r} needs {', '.join(missing)}, not installed; pip install 'lightning-qat[{cls.name}]'")
