"""How good a model is: perplexity with a stated protocol."""

from lightning_qat.evaluation.perplexity import TextScore, TokenPerplexity, pad_batch, score_text
from lightning_qat.evaluation.text import HELD_OUT, read_documents, text_windows

__all__ = ["HELD_OUT", "TextScore", "TokenPerplexity", "pad_batch", "read_documents", "score_text", "text_windows"]
