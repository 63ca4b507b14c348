"""Teachers that vLLM runs: behind a server, or in its offline engine."""

from lightning_qat.generation.served.offline import OfflineVLLM
from lightning_qat.generation.served.server import ServedTeacher

__all__ = ["OfflineVLLM", "ServedTeacher"]
