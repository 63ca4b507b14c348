"""How good a model is: perplexity with a stated protocol."""

from lightning_qat.evaluation.perplexity import TextScore, TokenPerplexity, score_text
from lightning_qat.evaluation.text import HELD_OUT, read_documents, text_windows

__all__ = ["HELD_OUT", "TextScore", "TokenPerplexity", "read_documents", "score_text", "text_windows"]
