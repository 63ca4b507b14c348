"""Names for things that live one to a file: quantizers, export formats, scheme presets.

A registry that is given a package imports the modules of that package the first time somebody asks for a name, so that adding a
file is all it takes to add an entry.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


def did_you_mean(got: object, allowed: Iterable[str]) -> str:
    """The tail of an error message: what is allowed, and the closest of it."""
    names = sorted(allowed)
    close = difflib.get_close_matches(str(got), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"expected one of {names}{hint}"


class Registry(Generic[T]):
    """A mapping from names to entries of one kind.

    Args:
        kind: What an entry is called in error messages, for example ``"quantizer"``.
        package: A package whose modules register entries when they are imported.

    Example:
        >>> shapes = Registry("shape")
        >>> @shapes.register("square")
        ... class Square: ...
        >>> shapes.names()
        ['square']
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Add one entry; a name is given once."""
        if name in self._entries:
            raise ValueError(f"{self.kind}: the name {name!r} is taken by {self._entries[name]!r}")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of :meth:`add`."""
        return lambda entry: self.add(name, entry)

    def get(self, name: str) -> T:
        """The entry called `name`; a ValueError names the allowed ones."""
        self._discover()
        if name not in self._entries:
            raise ValueError(f"{self.kind}: got {name!r}, {did_you_mean(name, self._entries)}")
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self._discover()
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        self._discover()
        return name in self._entries

    def _discover(self) -> None:
        if self._package is None:
            return
        package, self._package = importlib.import_module(self._package), None
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
