"""What a runtime executes, as data: the grids it has code for.

    Rule       for fields of a spec the values that a runtime executes; fields that are not named are free
    Runtime    the rules for weights, inputs, and keys and values; a part that is left alone (None) always fits

Every runtime hard-wires its grids, most of all that of activations. A model trained on them is served without a changed bit. Only
conventions are ever fitted: how many bits there are and what shares a scale stays the user's choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

from lightning_qat.registry import Registry
from lightning_qat.specs import KVSpec, TensorSpec

Part = Literal["weight", "input", "kv"]
Spec = TypeVar("Spec", TensorSpec, KVSpec)
PARTS: tuple[Part, ...] = ("weight", "input", "kv")
CONVENTIONS = ("code_range", "divisor", "scale_dtype", "scale_rounding", "round_via", "arithmetic")


class Misfit(NamedTuple):
    """One field of a spec that a runtime does not execute.

    Attributes:
        field: Name of the field.
        got: Its value.
        allowed: What the runtime executes instead.
    """

    field: str
    got: Any
    allowed: tuple[Any, ...]

    def __str__(self) -> str:
        """A part of a sentence."""
        return f"{self.field}: got {self.got!r}, executed is {' or '.join(map(repr, self.allowed))}"


@dataclass(frozen=True)
class Rule:
    """One family of grids that a runtime executes.

    Args:
        allowed: For names of fields of a spec the values that fit; the first is what a spec is fitted to.
    """

    allowed: Mapping[str, tuple[Any, ...]]

    def misfits(self, spec: TensorSpec | KVSpec) -> list[Misfit]:
        """The fields of `spec` that do not fit."""
        fields = self.allowed.items()
        return [Misfit(field, getattr(spec, field), allowed) for field, allowed in fields if getattr(spec, field) not in allowed]

    def fit(self, spec: Spec) -> Spec:
        """The nearest spec that fits; what another field makes meaningless goes with it."""
        changed = {misfit.field: misfit.allowed[0] for misfit in self.misfits(spec)}
        if changed.get("symmetric") is True:
            changed.setdefault("zero_point", "integer")  # which says that there is none
        if changed.get("granularity", "group") != "group" and isinstance(spec, TensorSpec):
            changed.setdefault("group_size", None)
        return replace(spec, **changed)


def rule(**allowed: tuple[Any, ...]) -> Rule:
    """A :class:`Rule` from keywords.

    Example:
        >>> rule(bits=(4, 8), granularity=("channel",)).misfits(TensorSpec(bits=3))
        [Misfit(field='bits', got=3, allowed=(4, 8))]
    """
    return Rule(allowed)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What one runtime executes.

    Args:
        weight: Rules for weights; a spec fits if it fits one of them.
        input: Rules for inputs; none where activations stay floating point.
        kv: Rules for keys and values.
    """

    weight: tuple[Rule, ...]
    input: tuple[Rule, ...] = ()
    kv: tuple[Rule, ...] = ()

    def rules(self, part: Part) -> tuple[Rule, ...]:
        """The rules of one part."""
        rules: tuple[Rule, ...] = getattr(self, part)
        return rules

    def nearest(self, part: Part, spec: TensorSpec | KVSpec) -> Rule | None:
        """The rule that the fewest fields of a spec break, conventions counted last; None where nothing of the part is executed."""

        def cost(candidate: Rule) -> tuple[int, int]:
            misfits = candidate.misfits(spec)
            return sum(misfit.field not in CONVENTIONS for misfit in misfits), len(misfits)

        return min(self.rules(part), key=cost, default=None)

    def misfits(self, part: Part, spec: TensorSpec | KVSpec) -> list[Misfit]:
        """What of a spec does not fit; nothing if it fits."""
        nearest = self.nearest(part, spec)
        return [Misfit("bits", spec.bits, (None,))] if nearest is None else nearest.misfits(spec)

    def fit(self, part: Part, spec: Spec, owner: str, name: str) -> Spec:
        """The spec with the runtime's conventions.

        Args:
            part: What the spec is for.
            spec: The spec.
            owner: Where the spec stands, for errors.
            name: The runtime's name, for errors.

        Raises:
            ValueError: Bits, granularity, or another thing that is not a convention does not fit; the message names the nearest that does.
        """
        nearest = self.nearest(part, spec)
        if nearest is None:
            raise ValueError(f"{owner}: {name!r} executes no quantized {part}; leave {part} out of the scheme for this target")
        wrong = [misfit for misfit in nearest.misfits(spec) if misfit.field not in CONVENTIONS]
        if wrong:
            raise ValueError(f"{owner}.{wrong[0]} by {name!r}; the nearest that fits: {changes(spec, nearest.fit(spec))}")
        return nearest.fit(spec)


def changes(spec: Any, fitted: Any) -> str:
    """The fields in which a spec was changed, as one would write them."""
    names = [name for name in fitted.__dataclass_fields__ if getattr(fitted, name) != getattr(spec, name)]
    return ", ".join(f"{name}={getattr(fitted, name)!r}" for name in names)


runtimes: Registry[Runtime] = Registry("target", "lightning_qat.formats")
