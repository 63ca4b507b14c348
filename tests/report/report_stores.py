"""Stores that are made by hand, for the tests of reports about them."""

import numpy as np
import torch

from lightning_qat.generation.sample import Sample
from lightning_qat.generation.store import GenerationStore


def sample(index, tokens, chosen=None, **fields):
    """A sample; without anything else said, the teacher chose all tokens but the first, at 1 nat each."""
    chosen = len(tokens) - 1 if chosen is None else chosen
    arrays = {name: torch.as_tensor(fields.pop(name)) for name in ("targets", "tails") if name in fields}
    if "roles" in fields:
        arrays["roles"] = torch.tensor(fields.pop("roles"), dtype=torch.uint8)
    return Sample(index=index, tokens=torch.tensor(tokens), chosen=chosen, nll=fields.pop("nll", float(chosen)), **arrays, **fields)


def store_of(folder, samples, requested=None, **identity):
    samples = list(samples)
    store = GenerationStore(folder).open({"vocab_size": 97, **identity}, len(samples) if requested is None else requested)
    with store.writing() as writer:
        writer.append(samples)
    return store


class Markov:
    """A language whose next token depends on the last one only, and texts in it, drawn by numpy."""

    def __init__(self, vocab_size=12, seed=0):
        self.vocab_size = vocab_size
        self.probabilities = np.random.default_rng(seed).dirichlet(np.full(vocab_size, 0.3), vocab_size) * 0.99 + 0.01 / vocab_size
        self.logits = torch.from_numpy(np.log(self.probabilities)).float()

    def texts(self, count, length, seed=0):
        draw = np.random.default_rng([seed, 1])
        for _ in range(count):
            tokens = [int(draw.integers(self.vocab_size))]
            while len(tokens) < length:
                tokens.append(int(draw.choice(self.vocab_size, p=self.probabilities[tokens[-1]])))
            yield tokens

    def __call__(self, ids):
        return self.logits[ids]
