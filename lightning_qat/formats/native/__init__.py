"""The library's own format: everything it can train, packed without gaps."""

from lightning_qat.formats.native.format import NativeFormat

__all__ = ["NativeFormat"]
