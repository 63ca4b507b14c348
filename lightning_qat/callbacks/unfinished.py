"""A checkpoint from the middle of a schedule needs that schedule: without it the model would be another one than was trained."""

from collections.abc import Collection, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def refuse_unfinished_schedules(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint in which a schedule that this Trainer does not have was still to change something.

    Args:
        trainer: With its callbacks.
        checkpoint: As Lightning loads it.

    Raises:
        MisconfigurationException: It names the schedule.
    """
    present = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
    if (unfinished := unfinished_schedule(checkpoint, present)) is not None:
        said, settings = unfinished
        raise MisconfigurationException(f"{said}; add it to the Trainer's callbacks, with these settings: {settings}")


def unfinished_schedule(checkpoint: Mapping[str, Any], present: Collection[str]) -> tuple[str, Any] | None:
    """A schedule that was still to change something when a checkpoint was saved: (what is to be said, its settings), or None.

    Args:
        checkpoint: As Lightning loads it.
        present: Keys of callbacks that do not count.
    """
    for key, state in checkpoint.get("callbacks", {}).items():
        if key in present or not isinstance(state, dict) or not {"active_step", "last_step"} <= state.keys():
            continue
        if state["active_step"] is not None and state["active_step"] < state["last_step"]:
            said = f"{key}: the checkpoint was saved at step {state['active_step']} of this schedule, whose last change is due at step "
            return f"{said}{state['last_step']}", state["settings"]
    return None
