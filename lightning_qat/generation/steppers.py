"""Who computes the logits of a step: a model of transformers with its cache in slots, or a user's own function."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from lightning_qat.generation.slots import Slots, slot_cache
from lightning_qat.generation.teacher import max_positions

_CHECKED_TOKENS = 6  # how far a model in slots is compared with the model as it is


class Stepper(Protocol):
    """Computes the next token's logits for rows that are each at a position of their own."""

    rows: int
    device: torch.device

    def step(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Feed one token per row.

        Args:
            tokens: Ids, int64 [rows].
            positions: Where they stand, int64 [rows]; 0 begins a new sequence in that row.
            longest: The largest position and one.

        Returns:
            Logits [rows, vocabulary], which the caller may overwrite.
        """
        ...


class ModelStepper:
    """A causal language model of transformers.

    Args:
        model: In eval mode, on its device; used as it is, its attention is exchanged only while a step runs.
        rows: Rows computed together.
        max_length: Largest number of tokens in a row.
        compiled: Run the model under ``torch.compile``.

    Raises:
        ValueError: The model has too few positions, or does not give its own logits when it is run in slots.
    """

    def __init__(self, model: Any, rows: int, max_length: int, compiled: bool = False) -> None:
        limit = max_positions(model)
        if limit is not None and max_length > limit:
            raise ValueError(f"max_length: got {max_length}, the teacher has {limit} positions")
        self.model, self.rows, self.max_length, self.device = model, rows, max_length, next(model.parameters()).device
        self.config = model.config.get_text_config()
        kinds = set(getattr(self.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise ValueError(f"teacher: {type(model).__name__} has layers of type {', '.join(sorted(kinds))}; {_WAY_OUT}")
        self.slots = Slots(rows, max_length, self.device)
        self.name = f"lightning_qat_slots_{id(self)}"
        self.run = torch.compile(model, dynamic=False) if compiled else model
        self.cache = slot_cache(self.config, self.slots)
        self._check()

    @contextmanager
    def _in_slots(self) -> Iterator[None]:
        """The model's attention is ours; without a mask function of that name, transformers builds no masks."""
        before = self.config._attn_implementation
        AttentionInterface.register(self.name, self.slots.attention)
        self.config._attn_implementation = self.name
        try:
            yield
        finally:
            self.config._attn_implementation = before
            AttentionInterface._global_mapping.pop(self.name, None)

    def step(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """See :class:`Stepper`."""
        self.slots.place(positions, longest)
        with self._in_slots():
            inputs = {"input_ids": tokens.unsqueeze(-1), "position_ids": positions.unsqueeze(-1)}
            return self.run(**inputs, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def _check(self) -> None:
        """A few tokens in slots and through the untouched model: models that attend in ways of their own are found here."""
        length = min(_CHECKED_TOKENS, self.max_length)
        row = torch.arange(self.rows, device=self.device)
        ids = (torch.arange(length, device=self.device) * 7 + row.unsqueeze(-1)) % self.model.get_input_embeddings().weight.shape[0]
        wanted = self.model(input_ids=ids[:2], use_cache=False).logits.float()
        try:
            got = torch.stack([self.step(ids[:, i], torch.full_like(row, i), i + 1)[:2].float() for i in range(length)], dim=1)
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"teacher: {type(self.model).__name__} cannot be run in slots ({error}); {_WAY_OUT}") from error
        if not bool(wanted.isfinite().all()):
            return  # generation itself says where logits are not finite
        worst, allowed = (got - wanted).abs().max(), torch.finfo(self.model.dtype).eps ** 0.5 * wanted.std() * 2 + 1e-4
        if bool(worst > allowed):
            raise ValueError(
                f"teacher: {type(self.model).__name__} gives other logits in slots than by itself (they differ by {worst:.2g}); {_WAY_OUT}"
            )


_WAY_OUT = "pass a CallableTeacher that runs it, or generate with a server (engine='http://...')"


class CallableTeacher:
    """A user's own function as the teacher.

    Args:
        function: Called with token ids int64 [rows, max_length], returns logits [rows, max_length, vocabulary]; must be causal.
            It is called with the whole length in each step, so that results do not depend on how far other rows are.
        vocab_size: Number of token ids.
        name: Identifies the teacher in the store; change it whenever the function changes.
        end_tokens: Ids that end a sample.
        bos_token: Id a sample starts with, or None.
        device: Where the function wants its ids.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        vocab_size: int,
        name: str,
        end_tokens: tuple[int, ...] = (),
        bos_token: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if not callable(function):
            raise ValueError(f"function: got a {type(function).__name__}, expected something that can be called")
        if vocab_size < 1 or any(not 0 <= token < vocab_size for token in end_tokens):
            raise ValueError(f"end_tokens: got {end_tokens} with vocab_size={vocab_size}; ids are from 0 to vocab_size - 1")
        self.function, self.vocab_size, self.name = function, vocab_size, name
        self.end_tokens, self.bos_token, self.device = tuple(end_tokens), bos_token, torch.device(device)


class CallableStepper:
    """Steps of a :class:`CallableTeacher`: all tokens of all rows are computed anew each time."""

    def __init__(self, teacher: CallableTeacher, rows: int, max_length: int) -> None:
        self.teacher, self.rows, self.device = teacher, rows, teacher.device
        self.history = torch.zeros(rows, max_length, dtype=torch.int64, device=self.device)
        self.row = torch.arange(rows, device=self.device)

    def step(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """See :class:`Stepper`."""
        self.history[self.row, positions] = tokens
        logits = self.teacher.function(self.history)
        if logits.shape != (*self.history.shape, self.teacher.vocab_size):
            wanted = (*self.history.shape, self.teacher.vocab_size)
            raise ValueError(f"teacher: {self.teacher.name} returned logits of shape {tuple(logits.shape)}, expected {wanted}")
        return logits[self.row, positions]
