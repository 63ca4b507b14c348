"""The whole of LLM-QAT on the bundled teacher, with the classes and the YAML that a user would use."""

from lightning_qat.cli.demo.run import demo

__all__ = ["demo"]
