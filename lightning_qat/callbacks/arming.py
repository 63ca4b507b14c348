"""Run code between the building of a LightningModule and everything that depends on its parameters.

Lightning has no callback hook between `configure_model` and the loading of weights, wrapping and optimizers. So `arm` puts a
`configure_model` on the instance that runs ours around the one that was there, and removes itself, also on failure: a module with a
local function on it does not pickle.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

_HOOKS = ("configure_model", "after_build")


class Arming:
    """One armed module.

    Args:
        module: The module whose `configure_model` will fire.
        early: Called before the original `configure_model`, and by `after_build`, with layers possibly missing.
        late: Called after it, when everything is built.
    """

    def __init__(self, module: pl.LightningModule, early: Callable[[], None], late: Callable[[], None]) -> None:
        self.module, self.early, self.late = module, early, late
        self.before: dict[str, Any] = {name: vars(module)[name] for name in _HOOKS if name in vars(module)}
        self.original = module.configure_model
        vars(module)["configure_model"] = self.fire
        vars(module)["after_build"] = early
        self.armed = True

    def fire(self) -> None:
        """What Lightning calls instead of `configure_model`."""
        try:
            self.early()
            self.original()
            self.late()
        finally:
            self.disarm()

    def disarm(self) -> None:
        """Put back what was there; harmless when called twice."""
        if not self.armed:
            return
        self.armed = False
        for name in _HOOKS:
            vars(self.module).pop(name, None)
        vars(self.module).update(self.before)
