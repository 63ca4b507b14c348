"""What samples start with and how they go on: start tokens, prompts, conversations."""

from lightning_qat.generation.scripts.base import ALL, Script, Span, StartTokens, resolve_bos
from lightning_qat.generation.scripts.build import build_script

__all__ = ["ALL", "Script", "Span", "StartTokens", "build_script", "resolve_bos"]
