"""The teacher's most probable tokens in 4 bytes each: what is kept of a distribution for training without the teacher.

    word = code << id_bits | token        id_bits = bits of V - 1,  code_bits = min(32 - id_bits, 20)
    code = round(-log p / step)           step = RANGE / (2^code_bits - 1)
    tail = sum of p over all other tokens, float32

Reading scales the probabilities to the sum 1 - tail, which leaves each of them within a factor exp(+-step) of what it was, as far as
fp32 resolves 1 - tail:

    V up to        4096     32768    65536    131072   262144   524288
    code bits      20       17       16       15       14       13
    step           1.9e-5   1.5e-4   3.1e-4   6.1e-4   1.2e-3   2.4e-3
"""

import torch
from torch import Tensor

# The last code stands for all of -log p >= 20 nats: what is below 2.1e-9 is read as 2.1e-9, less than fp32 resolves in a sum of 1.
RANGE = 20.0
MOST_CODE_BITS = 20  # fp32 logarithms up to 20 are exact to a tenth of this step


def bytes_per_token(k: int) -> int:
    """What the `k` most probable tokens and the mass of all others take, in bytes per token."""
    return 4 * k + 4


def top_targets(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Encode the `k` most probable tokens of the softmax (temperature 1), computed in fp32.

    Args:
        logits: [rows, V], finite.
        k: How many tokens to keep, 1 to V.

    Returns:
        Words int32 [rows, k], the most probable token first, and the probability of all other tokens, float32 [rows]. Among tokens of
        one probability, which come first is torch.topk's choice.

    Raises:
        ValueError: `k` is not between 1 and V.
    """
    logits = logits.float()
    exponentials = (logits - logits.amax(-1, keepdim=True)).exp_()
    return top_targets_from(exponentials, exponentials.sum(-1), k)


def top_targets_from(exponentials: Tensor, total: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`top_targets` of a softmax that is half computed.

    Args:
        exponentials: exp(logits - maximum), float32 [rows, V]; overwritten.
        total: Their sum, float32 [rows].
        k: How many tokens to keep, 1 to V.

    Returns:
        Words and tails, as there.

    Raises:
        ValueError: `k` is not between 1 and V.
    """
    vocab_size = exponentials.shape[-1]
    if not 1 <= k <= vocab_size:
        raise ValueError(f"logits: got {k}, the teacher has {vocab_size} tokens; at least 1 and at most {vocab_size}, or 'full'")
    top, ids = exponentials.topk(k, -1)
    words = pack_targets(ids, top.log() - total.log().unsqueeze(-1), vocab_size)
    # The others themselves are summed: 1 - sum(top) would be rounding alone where the teacher is sure.
    return words, exponentials.scatter_(-1, ids, 0).sum(-1) / total


def pack_targets(ids: Tensor, log_probabilities: Tensor, vocab_size: int) -> Tensor:
    """Encode tokens whose probabilities are known.

    Args:
        ids: int64 [..., k], each row's most probable token first.
        log_probabilities: float32 [..., k], in nats; -inf is allowed.
        vocab_size: The teacher's V.

    Returns:
        Words, int32 [..., k].
    """
    id_bits, codes = _layout(vocab_size)
    code = (log_probabilities * (-codes / RANGE)).clamp_(0, codes).round_()
    return code.int() << id_bits | ids.int()


def unpack_targets(words: Tensor, tails: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Read words and the mass of the other tokens.

    Args:
        words: int32 [..., k].
        tails: float32 [...].
        vocab_size: The teacher's V.

    Returns:
        Token ids, int64 [..., k], and their probabilities, float32 [..., k], which sum to 1 - tail.
    """
    id_bits, codes = _layout(vocab_size)
    ids = words & ((1 << id_bits) - 1)
    code = words >> id_bits & codes  # & drops the copies of the sign bit that >> shifts in
    return ids.long(), torch.softmax(code * (-RANGE / codes), -1) * (1 - tails).unsqueeze(-1)


def _layout(vocab_size: int) -> tuple[int, int]:
    """(bits of a token id, the largest code)."""
    id_bits = (vocab_size - 1).bit_length()
    return id_bits, (1 << min(32 - id_bits, MOST_CODE_BITS)) - 1
