"""Export formats, one to a file, found by their registered names.

To add one, write `formats/foo.py` with a :class:`~lightning_qat.formats.base.Format` under ``@formats.register("foo")``. A format writes
our codes and scales; it never calls a quantizer of the target's own. What all share is `exactness` (integers, what a runtime executes),
`folder` (whole or not there, manifest, card) and `verification`.

The room is called `formats` and not `export`, because a submodule of that name would hide the function `lightning_qat.export`.
"""

from lightning_qat.formats.base import Format, Job, formats
from lightning_qat.formats.exporting import export
from lightning_qat.formats.loading import load_quantized

__all__ = ["Format", "Job", "export", "formats", "load_quantized"]
