"""The teacher's distributions over the tokens of a store: computed anew, or read from the targets that the store holds."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_qat.generation.sample import FORCED, Sample
from lightning_qat.generation.steppers import CallableTeacher
from lightning_qat.generation.store import GenerationStore
from lightning_qat.generation.targets import unpack_targets
from lightning_qat.generation.teacher import check_causal_lm
from lightning_qat.report.agreement import Agreement, FrequencyCounts

_ROWS = 16  # samples in one forward pass, at most
_ELEMENTS = 2**26  # logits of a forward pass and probabilities at once, about: 256 MiB each in fp32


def compare(
    store: GenerationStore, teacher: Any = None, *, scored: int = 64, never: list[int] | None = None
) -> tuple[Agreement | None, str]:
    """Compare frequencies with a teacher's distributions, or with those in the store if there is no teacher.

    Args:
        store: The samples.
        teacher: A causal language model in eval mode, or a :class:`CallableTeacher`.
        scored: How many samples to compare at most; they are spread evenly over the store.
        never: Ids that generation never drew.

    Returns:
        What was found, or None and the reason why there is nothing to compare.

    Raises:
        ValueError: The teacher is not the one of these samples, or its logits are not finite.
    """
    # The rule takes the most probable tokens there: no draw that could tell how probable they are.
    skip = store.identity.get("greedy_tokens", (0, 0))[1] if store.identity.get("mode") == "hybrid" else 0
    eligible = store.records[store.records["chosen"] > skip]
    if not scored:
        return None, "that was not asked for"
    if not len(eligible):
        return None, "no sample holds a token that was drawn"
    spread = np.linspace(0, len(eligible) - 1, min(scored, len(eligible))).round().astype(np.int64)
    records, counts = eligible[spread], FrequencyCounts(store.layout.vocab_size)
    if teacher is not None:
        _add_teacher(counts, teacher, store, records, skip, never or [])
    else:
        for record in records:
            _add_targets(counts, store.read(int(record["index"])), skip)
    if counts.positions:
        return counts.agreement("targets" if teacher is None else "teacher"), ""
    if teacher is None and not counts.samples:
        return None, "no teacher was given and the store holds no targets"
    return None, "no sample holds a token that was drawn"


def written(tokens: int, chosen: int, roles: NDArray[np.uint8] | None) -> NDArray[np.bool_]:
    """Which tokens of a sample the teacher chose; without roles, those that were given are in front.

    Args:
        tokens: How many there are.
        chosen: How many the teacher chose.
        roles: Who wrote each token, or None.
    """
    return np.arange(tokens) >= tokens - chosen if roles is None else roles != FORCED


def _places(tokens: int, chosen: int, roles: NDArray[np.uint8] | None, skip: int) -> Tensor:
    """Positions whose next token was drawn: chosen by the teacher, and not among the first `skip` of those."""
    return torch.from_numpy(np.flatnonzero(written(tokens, chosen, roles)[1:])[skip:])


def _add_teacher(counts: FrequencyCounts, teacher: Any, store: GenerationStore, records: NDArray[Any], skip: int, never: list[int]) -> None:
    """Run samples through the teacher."""
    run = _runner(teacher)
    for batch in _batches(records, counts.vocab_size):
        views = [store.view(int(record["index"])) for record in batch]
        tokens = [torch.from_numpy(view["tokens"].astype(np.int64)) for view in views]
        ids, mask = pad_sequence(tokens, batch_first=True), pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
        logits = run(ids, mask)
        if logits.shape != (wanted := (*ids.shape, counts.vocab_size)):
            raise ValueError(
                f"teacher: got logits of shape {tuple(logits.shape)}, expected {wanted}; pass the teacher that wrote these samples"
            )
        logits[..., never] = -math.inf
        for record, view, row, ids_of in zip(batch, views, logits, tokens, strict=True):
            places = _places(len(ids_of), int(record["chosen"]), view.get("roles"), skip)
            _add_logits(counts, row, ids_of, places, int(record["index"]))


def _batches(records: NDArray[Any], vocab_size: int) -> Iterator[NDArray[Any]]:
    """Samples that are run through the teacher together."""
    rows = min(_ROWS, max(1, _ELEMENTS // (vocab_size * int(records["tokens"].max()))))
    for start in range(0, len(records), rows):
        yield records[start : start + rows]


def _runner(teacher: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of (ids, mask) that gives logits."""
    if isinstance(teacher, CallableTeacher):
        return torch.no_grad()(lambda ids, mask: teacher.function(ids.to(teacher.device)).clone())
    if check_causal_lm(teacher, "teacher").training:
        raise ValueError("teacher: got a model in training mode, expected eval mode, where nothing is dropped; call teacher.eval() first")
    device = next(teacher.parameters()).device
    return torch.no_grad()(lambda ids, mask: teacher(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits)


def _add_logits(counts: FrequencyCounts, logits: Tensor, tokens: Tensor, places: Tensor, index: int) -> None:
    """Add the drawn tokens of a sample by logits [tokens, vocabulary]."""
    counts.samples += 1
    for part in places.split(max(1, _ELEMENTS // counts.vocab_size)) if len(places) else ():
        probabilities = torch.softmax(logits[part.to(logits.device)].float(), -1)
        if not bool(probabilities.isfinite().all()):
            raise ValueError(f"teacher: its logits are not finite in sample {index}; try another dtype, for example float32")
        counts.add(probabilities, tokens[part + 1])


def _add_targets(counts: FrequencyCounts, sample: Sample, skip: int) -> None:
    """Add the drawn tokens of a sample by the targets it has, if any."""
    if sample.targets is None:
        return
    places = _places(len(sample.tokens), sample.chosen, None if sample.roles is None else sample.roles.numpy(), skip)
    if sample.tails is None:  # logits of the whole vocabulary
        _add_logits(counts, sample.targets, sample.tokens, places, sample.index)
        return
    counts.samples += 1
    if len(places):
        tails = sample.tails[places].clamp(min=0)
        ids, probabilities = unpack_targets(sample.targets[places], tails, counts.vocab_size)
        others = torch.full_like(ids[:, :1], counts.vocab_size)
        counts.add(torch.cat([probabilities, tails.unsqueeze(-1)], -1), sample.tokens[places + 1], torch.cat([ids, others], -1))


def sampled_otherwise(identity: dict[str, Any]) -> list[str]:
    """Settings by which tokens are no plain draws from the teacher's distribution, so that a distance is meant to be there."""
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    changed = [f"{name} {identity[name]:g}" for name, value in plain.items() if identity.get(name, value) != value]
    return ["always the most probable token", *changed] if identity.get("mode") == "greedy" else changed
