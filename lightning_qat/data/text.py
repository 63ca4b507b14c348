"""Real text to train on: its windows, and the teacher's targets for them."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_qat.evaluation import pad_batch, read_documents, text_windows
from lightning_qat.generation import CallableTeacher, TeacherSource
from lightning_qat.generation.sample import Sample
from lightning_qat.generation.targets import top_targets

FOLDER = "text"  # of the targets, inside the store of the generated samples
LOGITS_AT_ONCE = 2**26  # numbers; 256 MiB in fp32
_TEACHER = ("engine", "engine_version", "teacher", "tokenizer", "dtype", "vocab_size", "logits", "rows")


def read_windows(tokenizer: Any, text: str, length: int, validation: str | None = None) -> list[Tensor]:
    """Windows of a text to train on.

    Args:
        tokenizer: The teacher's.
        text: A .txt or .jsonl file, or ``held-out``.
        length: Most tokens of a window.
        validation: Another text, of which nothing may be trained on.

    Raises:
        ValueError: There is too little text, or the two have a document in common.
    """
    documents = read_documents(text)
    if validation is not None and (common := set(documents) & set(read_documents(validation))):
        raise ValueError(
            f"text: {text!r} and validation={validation!r} have {len(common)} of {len(documents)} documents in common, "
            f"for example {next(iter(common))[:40]!r}; train on other text than is validated on"
        )
    if not (windows := text_windows(tokenizer, documents, length)):
        raise ValueError(f"text: {text!r} holds no document of two tokens or more")
    return windows


def shown_per_epoch(ratio: float, generated: int, tokens: int, rows: int) -> int:
    """How many rows of text an epoch takes, so that text is a given share of its tokens.

    Args:
        ratio: The share.
        generated: Tokens of generated samples in an epoch.
        tokens: Tokens of text in all rows.
        rows: How many rows of text there are.
    """
    shown = max(1, round(ratio / (1 - ratio) * generated * rows / tokens))
    if shown > rows:
        rank_zero_info(f"text: {rows:,} rows of text for {shown:,} places in an epoch, so each is shown {shown / rows:.1f} times per epoch")
    return shown


def text_identity(identity: dict[str, Any], windows: Sequence[Tensor], length: int) -> dict[str, Any]:
    """What targets of text windows depend on: who writes them, and the windows."""
    digest = hashlib.sha256(repr([window.tolist() for window in windows]).encode()).hexdigest()[:16]
    return {**{name: identity.get(name) for name in _TEACHER}, "windows": digest, "max_length": length}


class TextTargets:
    """The teacher's distributions over real text, as a source of samples: sample i is window i.

    Windows are computed in the same groups whoever asks for which of them, because matrix products of other sizes round differently.

    Args:
        source: The teacher; its settings say what is kept.
        windows: Token ids.

    Raises:
        ValueError: The teacher does not run in this process.
    """

    def __init__(self, source: Any, windows: Sequence[Tensor]) -> None:
        if not isinstance(source, TeacherSource):
            raise ValueError(
                f"teacher_logits: got {source.identity.get('logits')!r} with real text, which needs the teacher itself in this process, "
                f"not a {type(source).__name__}; use engine='transformers', or teacher_logits=None with a teacher in DistillationModule"
            )
        self.source, self.windows, self.length = source, windows, source.settings.max_length
        self.vocab_size = source.vocab_size
        self.identity = text_identity(source.identity, windows, self.length)
        fitting = max(1, LOGITS_AT_ONCE // (self.length * self.vocab_size))
        # A callable is promised its number of rows.
        self.rows = source.settings.rows if isinstance(source.teacher, CallableTeacher) else min(fitting, source.settings.rows)
        self.teacher = source.teacher  # to be in eval mode while it computes

    def samples(self, indices: Iterable[int]) -> Iterator[Sample]:
        """The windows of these numbers, and those that are computed together with them, with targets after each token but the last."""
        for group in sorted({index // self.rows for index in indices}):
            start = group * self.rows
            windows = self.windows[start : start + self.rows]
            logits = self._logits(windows)
            for place, window in enumerate(windows):
                targets, tails = self._targets(logits[place, : len(window) - 1])
                yield Sample(index=start + place, tokens=window, targets=targets, tails=tails)

    @torch.no_grad()
    def _logits(self, windows: Sequence[Tensor]) -> Tensor:
        """[rows, length, vocabulary]; no mask is needed, because what stands behind a token does not matter to it."""
        ids = torch.zeros(self.rows, self.length, dtype=torch.int64)
        padded, _ = pad_batch(windows)
        ids[: padded.shape[0], : padded.shape[1]] = padded
        if isinstance(self.teacher, CallableTeacher):
            logits = self.teacher.function(ids.to(self.teacher.device))
        else:
            logits = self.teacher(input_ids=ids.to(self.teacher.device), use_cache=False).logits
        if not bool(logits.isfinite().all()):
            raise ValueError("text: the teacher's logits are not finite; try another dtype, for example float32")
        if self.source.never:
            logits[..., self.source.never] = -torch.inf  # as in generation
        return logits

    def _targets(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        kept = self.source.settings.logits
        if kept == "full":
            return logits.to("cpu", torch.float16), None
        words, tails = top_targets(logits, int(kept))  # type: ignore[arg-type]
        return words.cpu(), tails.cpu()
