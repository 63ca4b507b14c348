"""Where generated samples are kept."""

from lightning_qat.generation.store.store import GenerationStore

__all__ = ["GenerationStore"]
