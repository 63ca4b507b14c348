"""The best way to train that fits, and what would help where none does."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_qat.plan.memory import Estimate, at_least, estimate
from lightning_qat.plan.setting import KEPT_PROBABILITIES, STRATEGIES, Setting
from lightning_qat.plan.shapes import Shape

MOST_GPUS = 256
LORA_RANK = 16
# What to give up, cheapest first, each beside those before it; (choices, what it costs).
CHECKPOINTING: tuple[dict[str, Any], str] = ({"gradient_checkpointing": True}, "about a third more time")
GATHER_BF16: tuple[dict[str, Any], str] = ({"param_dtype": "bfloat16"}, "the grid of the weights rounded to bf16 is trained")
EIGHT_BIT: tuple[dict[str, Any], str] = ({"optimizer": "adamw8bit"}, "the optimizer's state is rounded to 8 bits")
OFFLOAD: tuple[dict[str, Any], str] = ({"teacher": "offload"}, "the teacher comes from the host's memory in each step")
NO_TEACHER: tuple[dict[str, Any], str] = ({"teacher": "none"}, f"only its {KEPT_PROBABILITIES} most probable tokens are known")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to train.

    Attributes:
        setting: It.
        estimate: What it needs.
        memory: What each GPU has, bytes.
        costs: What was given up to make it fit.
    """

    setting: Setting
    estimate: Estimate
    memory: int
    costs: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it runs."""
        return self.estimate.total <= self.memory


def best_plan(shape: Shape, memory: int, fixed: Mapping[str, Any]) -> Plan:
    """The first way that fits, of those that give up as little as possible; where none does, the one that needs least.

    Args:
        shape: The model.
        memory: Bytes of one GPU.
        fixed: Fields of :class:`~lightning_qat.plan.Setting` that are not free; `gpus` among them.

    Raises:
        ValueError: A field that is not known or cannot be combined; the model cannot be run without values.
    """
    least: Plan | None = None
    rungs = [(Setting(**{**choices, **fixed}), costs) for choices, costs in _ladder(fixed)]
    for setting, costs in rungs:
        if at_least(shape, setting) > memory and setting is not rungs[-1][0]:
            continue
        plan = Plan(setting=setting, estimate=estimate(shape, setting), memory=memory, costs=costs)
        if plan.fits:
            return plan
        least = plan if least is None or plan.estimate.total < least.estimate.total else least
    assert least is not None  # a ladder has a first rung
    return least


def _ladder(fixed: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    free: tuple[str, ...] = ("single",) if fixed["gpus"] == 1 else ("ddp", "fsdp2")
    strategies = (fixed["strategy"],) if "strategy" in fixed else free
    for strategy in strategies:
        choices: dict[str, Any] = {"strategy": strategy, "gradient_checkpointing": False}
        costs: tuple[str, ...] = ()
        yield dict(choices), costs
        for change, cost in _rungs(strategy, last=strategy == strategies[-1]):
            if not set(change) <= set(fixed):
                choices, costs = choices | change, (*costs, cost)
                yield dict(choices), costs


def _rungs(strategy: str, last: bool) -> Iterator[tuple[dict[str, Any], str]]:
    yield CHECKPOINTING
    if not last:
        return  # sharding costs less than what follows
    if strategy == "fsdp2":
        yield GATHER_BF16
    if strategy in STRATEGIES and not STRATEGIES[strategy].weights:
        yield EIGHT_BIT  # bitsandbytes knows no sharded weights
        yield OFFLOAD  # and what is sharded is read by one process, which leaves no teacher with the others
    yield NO_TEACHER


def remedies(shape: Shape, plan: Plan, fixed: Mapping[str, Any]) -> list[str]:
    """What would make a plan that does not fit run, preferred first."""
    found = []
    base = {key: fixed[key] for key in ("scheme", "batch_size", "max_length") if key in fixed}
    free = best_plan(shape, plan.memory, {**base, "gpus": plan.setting.gpus})
    if free.fits:
        found.append(f"on the same GPUs: {describe(free.setting)}, {_gigabytes(free)} per GPU")
    else:
        found += _more_gpus(shape, plan, base)
    lora = best_plan(shape, plan.memory, {**base, "gpus": 1, "lora_rank": LORA_RANK})
    if lora.fits:
        found.append(f"LoRA of rank {LORA_RANK} in place of all weights: {_gigabytes(lora)} on each GPU, whatever their number")
    if plan.setting.teacher != "none":
        without = Setting(**{**vars(plan.setting), "teacher": "none"})
        kept = Plan(setting=without, estimate=estimate(shape, without), memory=plan.memory)
        found.append(f"a smaller teacher with the same vocabulary: at most {_gigabytes(plan, kept)} less per GPU")
        word = "which fits" if kept.fits else "which alone is not enough"
        found.append(f"stored probabilities in place of the teacher (teacher: none): {_gigabytes(kept)} per GPU, {word}")
    return found


def _more_gpus(shape: Shape, plan: Plan, base: Mapping[str, Any]) -> list[str]:
    count = plan.setting.gpus * 2
    while count <= MOST_GPUS:
        more = best_plan(shape, plan.memory, {**base, "gpus": count})
        if more.fits:
            return [f"{count} GPUs: {describe(more.setting)}, {_gigabytes(more)} per GPU"]
        count *= 2
    return []


def describe(setting: Setting) -> str:
    """A setting in words."""
    parts = [setting.strategy, setting.precision, setting.optimizer, f"teacher {setting.teacher}"]
    parts += ["gradient checkpointing"] if setting.gradient_checkpointing else []
    parts += [f"weights gathered in {setting.param_dtype}"] if setting.param_dtype is not None else []
    return ", ".join(parts)


def _gigabytes(plan: Plan, less: Plan | None = None) -> str:
    return f"{(plan.estimate.total - (0 if less is None else less.estimate.total)) / 1e9:.1f} GB"
