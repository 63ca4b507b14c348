"""A chat template as tokens, so that the teacher can write both sides of a conversation.

The template is applied to made-up conversations only, and cut where the tokens change with a message: what stays the same is given to
the teacher, everything else it writes. What it wrote is never rendered again. So nothing is stripped, think blocks included, and
templates that rewrite the history (Qwen3 and DeepSeek drop the thinking of earlier turns) do no harm: a sample is what the teacher saw.
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from lightning_qat.generation.sample import ASSISTANT, USER
from lightning_qat.generation.scripts.base import Span, digest

# Samples must not depend on the day, which templates such as Llama 3.2's write into the system message. The day is Llama's own default.
_DAY = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri", "%H": "12", "%M": "00"}
_FORMATTED = "format" + "".join(f"|replace('{part}', '{value}')" for part, value in _DAY.items())
# The last line break is cut off, and the template still begins at the start of a line, where Jinja strips white space.
_SET_DAY = "{%- macro strftime_now(format) -%}{{ " + _FORMATTED + " }}{%- endmacro %}\n"

_PROBES = ("Why is that?", "Because it is."), ("3 and 4", "Seven, of course")  # of a user and an assistant
_OTHER = "no"  # begins and ends unlike any probe


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The tokens around the messages of a conversation that begins with the user.

    Attributes:
        head: In front of the first message: BOS, system message, the user's header.
        after_user: From the end of a user's message to where an answer begins.
        after_assistant: From the end of an answer to where the next user's message begins.
        user_end: The token of `after_user` that shows that the message is over.
        assistant_end: The same of `after_assistant`; None where ordinary text follows an answer.
    """

    head: tuple[int, ...]
    after_user: tuple[int, ...]
    after_assistant: tuple[int, ...]
    user_end: int
    assistant_end: int | None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, system: str | None = None) -> "ChatTemplate":
        """Take a tokenizer's chat template apart.

        Args:
            tokenizer: A transformers tokenizer.
            system: System message; None leaves the role out, and the template may put in one of its own.

        Raises:
            ValueError: There is no template, it fails, or the tokens around a message depend on more than who wrote it.
        """
        if tokenizer is None:
            raise ValueError("tokenizer: needed with mode='chat'; pass the teacher's own")
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("mode: got 'chat', but the tokenizer has no chat template; use a chat-tuned teacher, or mode='hybrid'")
        (question, answer), (question_2, answer_2) = _PROBES
        head, after_user = _pieces(tokenizer, system, [question])
        # Between a question and its answer an earlier turn may differ from the last, because that is where thinking is dropped.
        first, _, middle, _, again, last = _pieces(tokenizer, system, [question_2, answer_2, question, answer, question_2])
        if (first, middle, last) != (head, again, after_user):
            raise ValueError(
                "mode: got 'chat', but the tokenizer's chat template writes other tokens around the same turn in a longer conversation"
                f"{', perhaps because of `system`; leave it out' if system is not None else ''}; use mode='hybrid' or 'prefix'"
            )
        if not head:
            raise ValueError("mode: got 'chat', but the tokenizer's chat template has nothing in front of a user's message to begin with")
        if (user_end := _end(tokenizer, after_user)) is None:
            raise ValueError(
                "mode: got 'chat', but the tokenizer's chat template has ordinary text behind a user's message, "
                f"{tokenizer.decode(after_user)!r}, so no token shows that it is over; use mode='hybrid' or 'prefix'"
            )
        pieces = {"head": tuple(head), "after_user": tuple(after_user), "after_assistant": tuple(middle)}
        return cls(**pieces, user_end=user_end, assistant_end=_end(tokenizer, middle))


class Chat:
    """The teacher writes both sides of a conversation.

    A turn ends with the template's end token or with any end token of the model. It stays in the sample and stands for the template's, so
    what follows is given without it. Where an answer consists of several messages (GPT-OSS: first one of thinking), it is the first only.

    Args:
        template: Tokens around the messages.
        turns: Pairs of a user's message and an answer.
        ends: Ids that end a sequence of the model.
        vocab_size: Of the teacher.
        max_length: Tokens per sample.

    Raises:
        ValueError: The template does not fit the teacher, or nothing ends a turn.
    """

    keeps_roles = True

    def __init__(self, template: ChatTemplate, turns: int, ends: Sequence[int], *, vocab_size: int, max_length: int) -> None:
        if len(template.head) >= max_length:
            raise ValueError(f"max_length: got {max_length}, expected more than the {len(template.head)} tokens before a user's message")
        if (largest := max(template.head + template.after_user + template.after_assistant)) >= vocab_size:
            raise ValueError(f"tokenizer: got token {largest} in its chat template, expected 0 to {vocab_size - 1}; use the teacher's own")
        answered = frozenset(ends if template.assistant_end is None else [*ends, template.assistant_end])
        if not answered:
            raise ValueError("mode: got 'chat', but neither the chat template nor the model has a token that ends an answer; use 'hybrid'")
        question = Span(_behind(template.assistant_end, template.after_assistant), USER, 0, frozenset([*ends, template.user_end]))
        answer = Span(_behind(template.user_end, template.after_user), ASSISTANT, 0, answered)
        self._spans = [question._replace(forced=list(template.head)), answer, *[question, answer] * (turns - 1)]
        self.identity: dict[str, Any] = {"chat_template": digest(astuple(template)), "end_tokens": sorted(ends)}

    def spans(self, index: int) -> Iterator[Span]:
        """The same for every sample; what differs is what the teacher says."""
        yield from self._spans


def _pieces(tokenizer: Any, system: str | None, messages: list[str]) -> list[list[int]]:
    """The tokens in front of, between and behind messages, by turns of the user and the assistant: those no message changes."""
    whole = _render(tokenizer, system, messages)
    pieces, start = [], 0
    for place in range(len(messages)):
        other = _render(tokenizer, system, [*messages[:place], _OTHER, *messages[place + 1 :]])
        if other == whole:
            raise ValueError("mode: got 'chat', but the tokenizer's chat template leaves messages out; use mode='hybrid' or 'prefix'")
        pieces.append(whole[start : _common(whole, other)])
        start = len(whole) - _common(whole[::-1], other[::-1])
    return [*pieces, whole[start:]]


def _render(tokenizer: Any, system: str | None, messages: list[str]) -> list[int]:
    """Token ids up to where the next answer begins."""
    chat = [{"role": ("user", "assistant")[place % 2], "content": message} for place, message in enumerate(messages)]
    if system is not None:
        chat.insert(0, {"role": "system", "content": system})
    try:
        template = _SET_DAY + tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(chat, chat_template=template, add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        way_out = "leave out `system`" if system is not None else "use mode='hybrid' or 'prefix'"
        raise ValueError(f"mode: got 'chat', but the tokenizer's chat template fails: {error}; {way_out}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two lists have in common from their start on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _end(tokenizer: Any, piece: list[int]) -> int | None:
    """The token behind a message, white space aside, if no text of a message can be it: special or added to the vocabulary."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    token = next((token for token in piece if tokenizer.decode([token]).strip()), None)
    return token if token in special else None


def _behind(end: int | None, piece: tuple[int, ...]) -> list[int]:
    """What is left to give when the teacher has written the end token itself."""
    return list(piece[piece.index(end) + 1 :] if end is not None else piece)
