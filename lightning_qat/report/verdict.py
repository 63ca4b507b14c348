"""What the statistics mean, in plain words."""

from lightning_qat.report.generations import AT_ONCE, GenerationStatistics
from lightning_qat.report.marginals import sampled_otherwise
from lightning_qat.report.wording import amount, number, percent

MANY_AT_ONCE, MANY_REPETITIVE, MANY_DUPLICATES = 0.5, 0.1, 0.01  # shares of the samples from which on something looks wrong
UNTRAINED = 0.5  # perplexity by vocabulary size: a teacher that has learned nothing has 1


def verdict(found: GenerationStatistics) -> str:
    """A short paragraph: what is there, and what it is like."""
    limit = found.identity.get("max_length")
    reach = f"reach the maximum length of {limit} tokens" if limit else "do not end with an end token"
    sentences = [f"{amount(found.samples, 'sample')}, {amount(found.tokens, 'token')}."]
    sentences.append(f"{percent(1 - found.ended)} {reach}, {percent(found.ended)} end by themselves.")
    repeated = "None repeats itself" if found.repetitive == 0 else f"{percent(found.repetitive)} repeat themselves"
    twice = "none occurs twice" if found.duplicates == 0 else f"{amount(found.duplicates, 'exact duplicate')}"
    sentences.append(f"{repeated} (more than half of the runs of four tokens occurred before), {twice}.")
    if found.perplexity is not None:
        sentences.append(f"The teacher's perplexity on its own samples is {number(found.perplexity)}.")
    return " ".join([*sentences, _agreement(found)])


def _agreement(found: GenerationStatistics) -> str:
    agreement = found.agreement
    if agreement is None:
        return f"Frequencies of tokens are compared with nothing: {found.not_compared}."
    state = "differ from" if agreement.is_far else "agree with"
    return (
        f"Frequencies of tokens {state} the teacher's: distance {agreement.distance:.3f}, "
        f"{agreement.distance_by_chance:.3f} expected from chance."
    )


def warnings(found: GenerationStatistics) -> list[str]:
    """What looks wrong, a sentence each."""
    share = found.duplicates / found.samples
    otherwise = sampled_otherwise(found.identity)
    far = found.agreement is not None and found.agreement.is_far
    checks = {
        f"{percent(found.at_once)} of the samples end after {AT_ONCE} tokens or fewer. Is the teacher a trained language model, does it "
        "need a BOS token, and are its end tokens right?": found.at_once >= MANY_AT_ONCE,
        f"{percent(found.repetitive)} of the samples repeat themselves. Drop them with a filter, take fewer greedy tokens, or raise the "
        "temperature.": found.repetitive >= MANY_REPETITIVE,
        f"{percent(share)} of the samples are exact duplicates. Raise the temperature, or start from more different "
        "tokens or prompts.": share > MANY_DUPLICATES,
        "The teacher finds its own samples hardly more likely than random tokens. Is it a trained language model?": (
            found.perplexity is not None and found.perplexity > UNTRAINED * found.vocab_size
        ),
        "Tokens are more or less frequent than the teacher says, by more than chance. Is it the teacher that wrote these "
        "samples, in the same dtype?": far and not otherwise,
        f"The samples were not drawn from the teacher's own distribution ({', '.join(otherwise)}), so their tokens have other "
        "frequencies. That is meant to be so.": far and bool(otherwise),
        f"{found.samples:,} of the {amount(found.requested, 'sample')} asked for are there. Short samples are finished first, so these "
        "are shorter than all of them will be.": found.samples < found.requested,
    }
    return [*(text for text, wrong in checks.items() if wrong), *found.remarks]
