"""Files that survive kills and power cuts, and what to say when the disk refuses them."""

import contextlib
import errno
import os
import secrets
from pathlib import Path

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it: whoever looks finds the old content or the new, also after a power cut."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(folder: Path, error: OSError, safe: int | None = None) -> ValueError:
    """The error to raise when a store cannot be written: what is safe, and the way out."""
    if error.errno not in FULL:
        return ValueError(f"store: cannot write to {str(folder)!r}: {error}; make it writable or choose another folder for `store`")
    kept = "" if safe is None else f"; {safe} samples are safe"
    return ValueError(
        f"store: no space is left for {str(folder)!r} ({error.strerror}){kept}; free space there and give the same command again, it goes "
        "on with what is missing"
    )
