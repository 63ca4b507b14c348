"""What a student is trained on: losses of its logits, a chunk of tokens at a time, and losses of its layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.distillation.batches import Batch
from lightning_qat.distillation.passes import Head, States, final_states
from lightning_qat.losses import LayerLoss, RowLoss, SoftCrossEntropy, chunked_sums, next_token_labels, row_sums
from lightning_qat.losses.forms import Teacher, select_rows
from lightning_qat.losses.logits import NO_LABEL

Values = dict[str, Tensor]


class Objective(nn.Module):
    """Losses of a student beside its teacher.

    Args:
        losses: One or several; each is weighted by its ``weight``, and one that has none by 1. None for the paper's.
        chunk: Tokens whose logits exist at once; None computes all logits at once, which a user's own losses are called with.

    Raises:
        ValueError: No losses; `chunk` is below 1, or a loss needs all logits.
    """

    def __init__(self, losses: nn.Module | Sequence[nn.Module] | None, chunk: int | None) -> None:
        super().__init__()
        terms = [SoftCrossEntropy()] if losses is None else [losses] if isinstance(losses, nn.Module) else list(losses)
        if not terms:
            raise ValueError("loss: got an empty list, expected at least one loss, such as SoftCrossEntropy()")
        if chunk is not None and chunk < 1:
            raise ValueError(f"loss_chunk: got {chunk}, expected a number of tokens of at least 1, or None for all at once")
        self.terms, self.chunk = nn.ModuleList(terms), chunk
        self.rows = [term for term in terms if isinstance(term, RowLoss)]
        self.layers = [term for term in terms if isinstance(term, LayerLoss)]
        self.whole = [term for term in terms if not isinstance(term, RowLoss | LayerLoss)]
        if self.whole and chunk is not None:
            raise ValueError(
                f"loss: {type(self.whole[0]).__name__} is called with all logits at once; pass loss_chunk=None, or derive it from "
                "lightning_qat.losses.RowLoss"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What models must return beside logits: ``hidden_states``, ``attentions``."""
        return frozenset(term.needs for term in self.layers)

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss compares with a teacher."""
        return any(getattr(term, "needs_teacher", True) for term in self.terms)

    def forward(self, student: Any, teacher: Any, batch: Batch, metrics: Sequence[str] = ()) -> Values:
        """Compute the losses of one batch.

        Args:
            student: The model to train.
            teacher: The model to learn from; None where the batch holds its distributions.
            batch: The batch.
            metrics: Any of ``kl``, ``top1``: means over the tokens that count.

        Returns:
            ``loss``, the weighted sum; where there are several, each without its weight under its own name; metrics. All but ``loss`` are
            detached.
        """
        own, other = self._run(student, batch), None
        if teacher is not None:
            with torch.no_grad():
                other = self._run(teacher, batch)
        values: Values = {loss.name: loss(_of(own, loss), _of(other, loss), batch.mask) for loss in self.layers}
        parts = [loss.weight * values[loss.name] for loss in self.layers]
        for term in self.whole:
            values[type(term).__name__] = term(own.logits, batch.teacher if other is None else other.logits, batch.counts)
            parts.append(values[type(term).__name__])
        if self.rows or metrics:
            weighted, more = self._rows(self.rows, (student, own), (teacher, other), batch, metrics)
            values |= more
            parts += [weighted] if self.rows else []
        single = len(self.terms) == 1
        return {"loss": torch.stack(parts).sum()} | {k: v.detach() for k, v in values.items() if not single or k in metrics}

    @torch.no_grad()
    def measure(self, student: Any, teacher: Any, batch: Batch, metrics: Sequence[str]) -> Values:
        """Metrics alone, as in :meth:`forward`, at the cost of no loss."""
        other = None if teacher is None else self._run(teacher, batch, layers=False)
        return self._rows([], (student, self._run(student, batch, layers=False)), (teacher, other), batch, metrics)[1]

    @torch.no_grad()
    def nats(self, student: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of negative log-likelihoods of next tokens, in nats, how many there were)."""
        labels = next_token_labels(batch.ids, batch.scored)
        where = labels != NO_LABEL
        states, labels = self._run(student, batch, layers=False), labels[where]
        sums = row_sums([], self._head(student), None, labels, ("nll",))
        final = self._final(states)[where]
        return chunked_sums(sums, final, (), self.chunk or len(final))[1].double(), where.sum()

    def _run(self, model: Any, batch: Batch, layers: bool = True) -> Any:
        needs = self.needs if layers else frozenset()
        if self.chunk is not None:
            return final_states(model, batch.inputs, needs)
        return model(**batch.inputs, use_cache=False, **{f"output_{need}": True for need in needs})

    def _rows(
        self, losses: list[RowLoss], student: tuple[Any, Any], teacher: tuple[Any, Any], batch: Batch, metrics: Sequence[str]
    ) -> tuple[Tensor, Values]:
        """The weighted sum of losses of logits, and each of them and each metric by name, as means over the tokens that count."""
        where = batch.counts.bool()
        labels = next_token_labels(batch.ids, batch.scored)[where] if any(loss.needs_labels for loss in losses) else None
        target = batch.teacher if teacher[0] is None else self._final(teacher[1])
        target_head = self._head(teacher[0])
        kept = select_rows(target, where)
        final, head = self._final(student[1])[where], self._head(student[0])

        def of_teacher(rows: slice) -> Teacher:
            return target_head(select_rows(kept, rows))

        function = row_sums(losses, head, of_teacher, labels, metrics)
        whole = self.chunk is None
        sums = function(slice(None), final) if whole else chunked_sums(function, final, head.parameters(), self.chunk or 1)
        means = sums / final.shape[0]
        return means[0], dict(zip([*(loss.name for loss in losses), *metrics], means[1:], strict=True))

    def _head(self, model: Any) -> Any:
        """From what :meth:`_final` returns to logits; of a teacher that is none, its distributions as they are."""
        return Head(model) if self.chunk is not None and model is not None else _as_it_is

    def _final(self, outputs: Any) -> Tensor:
        final: Tensor = outputs.logits if self.chunk is None else outputs.final
        return final


def _as_it_is(logits: Any) -> Any:
    return logits


def _of(outputs: States | Any, loss: LayerLoss) -> Any:
    return getattr(outputs, loss.needs)
