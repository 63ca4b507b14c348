"""What people want to know about generated samples, as one page."""

from lightning_qat.report.generations import GenerationStatistics, collect
from lightning_qat.report.write import write_generation_report

__all__ = ["GenerationStatistics", "collect", "write_generation_report"]
