"""The twin package `pytorch_lightning`: the classes of `lightning.pytorch` once more, of which neither package knows the other's.

Objects of both do not work together, and Lightning says so only for its own classes, never for subclasses. Nothing is imported here.
"""

import sys
import warnings

TWIN = "pytorch_lightning"
FIX = "replace `import pytorch_lightning as pl` by `import lightning.pytorch as pl`, also in `from ... import`"


def is_twin(thing: object) -> bool:
    """Whether a Trainer, a module, data or a callback, or a class of its bases, is one of `pytorch_lightning`."""
    return any(base.__module__.split(".")[0] == TWIN for base in type(thing).__mro__)


def twin_message(thing: object) -> str:
    """What is wrong with an object for which :func:`is_twin` holds, and what to change."""
    return f"{type(thing).__name__} comes from {TWIN}, lightning_qat works with lightning.pytorch, and the two do not mix: {FIX}"


def warn_of_twin() -> None:
    """Warn whoever builds one of our objects in a process that has imported the twin; Lightning's own checks come before any hook."""
    if TWIN in sys.modules:
        message = f"{TWIN} is imported; lightning_qat works with lightning.pytorch, whose classes are others. If an error follows, {FIX}"
        warnings.warn(message, stacklevel=3)
