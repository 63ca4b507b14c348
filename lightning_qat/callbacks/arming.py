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
        self.hooks = {"configure_model": self.fire, "after_build": self.after_build}
        vars(module).update(self.hooks)
        self.armed = True

    def fire(self) -> None:
        """What Lightning calls instead of `configure_model`."""
        try:
            self.early()
            self.original()
            self.late()
        finally:
            self.disarm()

    def after_build(self) -> None:
        """What a module that shards inside `configure_model` calls between building and sharding."""
        self.early()

    def disarm(self) -> None:
        """Put back what was there, unless it is of another arming that is over; harmless when called twice."""
        if not self.armed:
            return
        self.armed = False
        for name, hook in self.hooks.items():
            if vars(self.module).get(name) != hook:
                continue  # somebody armed after us is still at work; what they put back is checked below
            del vars(self.module)[name]
            owner = getattr(self.before.get(name), "__self__", None)
            if name in self.before and not (isinstance(owner, Arming) and not owner.armed):
                vars(self.module)[name] = self.before[name]
