"""Which parts of a scheme apply to a name."""

import fnmatch
from collections.abc import Iterable

from torch import nn

from lightning_qat.registry import did_you_mean
from lightning_qat.scheme import DEFAULT_EXCLUDE, QuantScheme
from lightning_qat.specs import KVSpec, TensorSpec


class Matcher:
    """Answers for one model and scheme, remembering which patterns were of use.

    Args:
        model: The quantization root.
        scheme: The scheme.
    """

    def __init__(self, model: nn.Module, scheme: QuantScheme) -> None:
        self.scheme = scheme
        self._heads = {id(head) for head in _output_heads(model)}
        self._used: set[str] = set()

    def excluded(self, name: str, module: nn.Module) -> str | None:
        """Why the scheme leaves this module alone, or None."""
        if (reason := self._why_excluded(name, module)) is not None:
            return reason
        included = self._any_hit(self.scheme.include, name, module)
        return None if included else f"not in include={list(self.scheme.include)}"

    def layer_specs(self, name: str, module: nn.Module) -> tuple[TensorSpec | None, TensorSpec | None]:
        """(weight, input) specs of a layer after overrides; the last match wins."""
        weight, input = self.scheme.weight, self.scheme.input
        for override in self.scheme.overrides:
            if self._any_hit(override.names, name, module):
                weight = weight if isinstance(override.weight, str) else override.weight
                input = input if isinstance(override.input, str) else override.input
        return weight, input

    def kv_spec(self, name: str, module: nn.Module) -> KVSpec | None:
        """Key/value spec of an attention module after overrides."""
        kv = None if self._why_excluded(name, module) else self.scheme.kv
        for override in self.scheme.overrides:
            if self._any_hit(override.names, name, module):
                kv = kv if isinstance(override.kv, str) else override.kv
        return kv

    def check_all_used(self, names: Iterable[str]) -> None:
        """Raise a ValueError for the first pattern the user wrote that matched nothing."""
        scheme = self.scheme
        written = {
            "include": [p for p in scheme.include if p != "*"],
            "exclude": [p for p in scheme.exclude if p not in DEFAULT_EXCLUDE],
            "overrides": [p for override in scheme.overrides for p in override.names],
        }
        for field, patterns in written.items():
            for pattern in patterns:
                if pattern not in self._used:
                    leaves = {name.rsplit(".", 1)[-1] for name in names}
                    raise ValueError(
                        f"QuantScheme.{field}: pattern {pattern!r} matches nothing below the quantization root "
                        f"(append '.*' to name what a container holds); layer names end in: {did_you_mean(pattern, leaves)}"
                    )

    def _why_excluded(self, name: str, module: nn.Module) -> str | None:
        """Excludes the user wrote always hold; the default ones give way to an override that names the module."""
        hits = [pattern for pattern in self.scheme.exclude if self._hit(pattern, name, module)]
        named = [o for o in self.scheme.overrides if self._any_hit([p for p in o.names if p != "*"], name, module)]
        wanted = any(isinstance(part, TensorSpec) for override in named for part in (override.weight, override.input))
        if not hits or (wanted and set(hits) <= set(DEFAULT_EXCLUDE)):
            return None
        return f"excluded by {hits[0]!r}"

    def _any_hit(self, patterns: Iterable[str], name: str, module: nn.Module) -> bool:
        """Every pattern is tried, so that each one that is of use is remembered."""
        return sum(self._hit(pattern, name, module) for pattern in patterns) > 0

    def _hit(self, pattern: str, name: str, module: nn.Module) -> bool:
        if pattern.startswith("type:"):
            hit = any(fnmatch.fnmatchcase(cls.__name__, pattern[5:]) for cls in type(module).__mro__)
        else:
            hit = fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
            hit = hit or (pattern == "lm_head" and id(module) in self._heads)
        if hit:
            self._used.add(pattern)
        return hit


def _output_heads(model: nn.Module) -> Iterable[nn.Module]:
    """Output layers of transformers models, whatever their name is."""
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if getter is None:
            continue
        try:
            head = getter()
        except (NotImplementedError, AttributeError):
            continue
        if head is not None:
            yield head
