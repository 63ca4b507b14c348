"""Manifests of exports, edited as somebody would who knows how their checksum is made."""

import hashlib
import json


def read(folder):
    return json.loads((folder / "manifest.json").read_text("utf-8"))


def checksum(manifest):
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write(folder, manifest):
    """With the checksum that belongs to it."""
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checksum": checksum(manifest)}), encoding="utf-8")


def edit(folder, **changes):
    write(folder, read(folder) | changes)


def accept(folder, name):
    """Write the checksum of a file that was changed into the manifest."""
    edit(folder, sha256=read(folder)["sha256"] | {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()})
