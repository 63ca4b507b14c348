"""`store.json`: what the samples of a store were generated from, and how many were asked for."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_qat.generation.store.durable import replace_file
from lightning_qat.generation.store.records import FOREIGN, FORMAT_VERSION, HEADER, ShardFormat
from lightning_qat.generation.store.shards import find_shards

MANIFEST = "store.json"
_OTHER_FOLDER = "choose another folder for `store`"
_REWRITTEN = f"generate with the settings that these samples were generated with and it is written anew, or {_OTHER_FOLDER}"


class DamagedManifestError(ValueError):
    """`store.json` is not what was written."""


@dataclass(frozen=True)
class Manifest:
    """What `store.json` says.

    Attributes:
        identity: Plain data, all that samples depend on.
        requested: How many samples were asked for; no part of the identity.
    """

    identity: dict[str, Any]
    requested: int

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """What the folder's file says, None if there is no such file.

        Raises:
            DamagedManifestError: It is not what was written.
            ValueError: It cannot be read, or is of another format version.
        """
        path = folder / MANIFEST
        try:
            found = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ValueError(f"store: cannot read {str(path)!r}: {error.strerror}") from error
        except ValueError as error:  # no UTF-8, or no JSON
            raise DamagedManifestError(f"store: {str(path)!r} is damaged ({error})") from error
        version = found.get("format_version") if isinstance(found, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise ValueError(f"store: {str(folder)!r} has format version {version}, expected {FORMAT_VERSION}; {_OTHER_FOLDER}")
        if version is None or found.pop("sha256", None) != _digest(found):
            raise DamagedManifestError(f"store: {str(path)!r} is damaged (its checksum differs)")
        return cls(found["identity"], found["requested"])

    @classmethod
    def existing(cls, folder: Path) -> "Manifest":
        """What the folder's file says; a ValueError names the way out if it says nothing."""
        try:
            manifest = cls.read(folder)
        except DamagedManifestError as error:
            raise ValueError(f"{error}; {_REWRITTEN}") from error
        if manifest is None:
            way_out = _REWRITTEN if any(folder.glob("shard-*")) else "expected a folder that `lightning-qat generate` wrote"
            raise ValueError(f"store: {MANIFEST} is missing in {str(folder)!r}; {way_out}")
        return manifest

    @classmethod
    def matching(cls, folder: Path, identity: dict[str, Any]) -> "Manifest | None":
        """What the folder's file says if it is about this identity; None if it is to be written.

        It is, too, where it was lost or damaged and the shards say that they are of this identity.

        Raises:
            ValueError: The folder holds samples of other settings.
        """
        problem = f"{MANIFEST} is missing in {str(folder)!r}"
        try:
            manifest = cls.read(folder)
        except DamagedManifestError as error:
            manifest, problem = None, str(error).removeprefix("store: ")
        if manifest is not None:
            if changed := differences(manifest.identity, identity):
                raise ValueError(f"store: {str(folder)!r} holds samples of other settings ({'; '.join(changed)}); {_OTHER_FOLDER}")
            return manifest
        faults = _header_faults(folder, ShardFormat.of(identity))
        if foreign := [name for name, fault in faults.items() if fault == FOREIGN]:
            raise ValueError(f"store: {problem}, and {foreign[0]} holds samples of other settings than these; {_REWRITTEN}")
        if (folder / MANIFEST).exists() and None not in faults.values():
            raise ValueError(f"store: {problem}, and no shard says what it was about; {_OTHER_FOLDER}")
        return None

    def write(self, folder: Path) -> None:
        """Put it into the folder, whole or not at all."""
        content = {"format_version": FORMAT_VERSION, "requested": self.requested, "identity": self.identity}
        replace_file(folder / MANIFEST, (json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n").encode())


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _header_faults(folder: Path, layout: ShardFormat) -> dict[str, str | None]:
    paths = [shard.index for shard in find_shards(folder, layout) if shard.index.exists()]
    return {path.name: layout.header_fault(path.read_bytes()[: HEADER.size]) for path in paths}


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


_NOTHING = _Nothing()


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Fields of two identities that differ, as ``name: X there, Y here``, in the order of `here`."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = {key: f"{name}.{key}" if name else key for key in [*here, *there]}
        return [text for key, full in names.items() for text in differences(there.get(key, _NOTHING), here.get(key, _NOTHING), full)]
    shown = [value if value is _NOTHING else json.dumps(value, sort_keys=True) for value in (there, here)]  # 1, 1.0 and true differ
    return [] if shown[0] == shown[1] else [f"{name}: {there!r} there, {here!r} here"]
