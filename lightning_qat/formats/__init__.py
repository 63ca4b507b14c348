"""Export formats, one to a file, found by their registered names.

To add one, write `formats/foo.py` with a :class:`~lightning_qat.formats.base.Format` under ``@formats.register("foo")``. A format writes
our codes and scales; it never calls a quantizer of the target's own.

The room is called `formats` and not `export`, because a submodule of that name would hide the function `lightning_qat.export`.
"""

from lightning_qat.formats.base import Format, export, formats
from lightning_qat.formats.native import load_quantized

__all__ = ["Format", "export", "formats", "load_quantized"]
