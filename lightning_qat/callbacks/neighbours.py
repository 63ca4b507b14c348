"""Who else works on the model: what cannot stand beside a QuantizationCallback is refused by name when a run starts."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_qat.twin import is_twin, twin_message


def check_neighbours(trainer: pl.Trainer, pl_module: pl.LightningModule, callback: Callback) -> None:
    """Refuse what cannot work together.

    Args:
        trainer: The trainer.
        pl_module: The module it trains.
        callback: The callback whose neighbours are checked.

    Raises:
        MisconfigurationException: An object of the twin package, or a WeightAveraging that is listed before `callback`.
    """
    check_package(trainer, pl_module)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(earlier, WeightAveraging) for earlier in callbacks[: callbacks.index(callback)]):
        raise MisconfigurationException(
            "WeightAveraging copies the model in its setup, before quantizers are in it; list QuantizationCallback before it"
        )


def check_package(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse objects of the twin package; half of what Lightning asks with `isinstance` is answered wrongly for them.

    Raises:
        MisconfigurationException: There is one.
    """
    data = getattr(trainer, "datamodule", None)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    twins = [thing for thing in (trainer, pl_module, data, *callbacks) if is_twin(thing)]
    if twins:
        raise MisconfigurationException(twin_message(twins[0]))
