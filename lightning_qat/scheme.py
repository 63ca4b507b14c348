"""Which tensors of a model are quantized, as data: the only description that the callback, the layers and the exporters read.

A scheme string is the paper's W-A-KV notation (LLM-QAT, section 4), for example ``w4a8kv4``.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_qat.registry import Registry, did_you_mean
from lightning_qat.runtime import PARTS, Part, Runtime, runtimes
from lightning_qat.specs import KVSpec, TensorSpec

if TYPE_CHECKING:
    from torch import nn

DEFAULT_EXCLUDE = ("lm_head", "type:Embedding")


@dataclass(frozen=True, kw_only=True)
class Override:
    """Other specs for the modules whose names match; a part left at ``inherit`` keeps the scheme's own.

    Args:
        names: Patterns as in :class:`QuantScheme`; `kv` looks at the names of attention modules.
        weight: Spec of weights there, or None to leave them alone.
        input: Spec of inputs there, or None to leave them alone.
        kv: Spec of keys and values there, or None to leave them alone.
    """

    names: tuple[str, ...]
    weight: TensorSpec | Literal["inherit"] | None = "inherit"
    input: TensorSpec | Literal["inherit"] | None = "inherit"
    kv: KVSpec | Literal["inherit"] | None = "inherit"

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not self.names:
            raise ValueError(f"Override.names: got {self.names!r}, expected a non-empty list of patterns")
        object.__setattr__(self, "names", tuple(self.names))
        if not all(isinstance(pattern, str) for pattern in self.names):
            raise ValueError(f"Override.names: got {self.names!r}, expected a non-empty list of patterns")
        _check_parts(self)
        _drop_off_parts(self)


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """What is quantized in a model, and what is left alone.

    Patterns are shell patterns (fnmatch, not regular expressions) on names relative to the quantization root; they match any
    dotted suffix, so ``lm_head`` is also ``*.lm_head``. ``type:Embedding`` matches by layer type.

    Args:
        weight: Spec of layer weights, or None.
        input: Spec of layer inputs ("activations"), or None.
        kv: Spec of attention keys and values, or None.
        output: Spec of layer outputs; not implemented yet.
        attention: Spec of attention probabilities; not implemented yet.
        salient: Spec of salient weights; not implemented yet.
        include: Patterns of layers to quantize.
        exclude: Patterns of layers to leave alone; the defaults may match nothing, patterns you write may not.
        overrides: Other specs by name; the last match wins.
    """

    weight: TensorSpec | None = None
    input: TensorSpec | None = None
    kv: KVSpec | None = None
    output: TensorSpec | None = None
    attention: TensorSpec | None = None
    salient: TensorSpec | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        for field in ("include", "exclude"):
            if isinstance(getattr(self, field), str):
                raise ValueError(f"QuantScheme.{field}: got {getattr(self, field)!r}, expected a list of patterns")
            object.__setattr__(self, field, tuple(getattr(self, field)))
            if not all(isinstance(pattern, str) for pattern in getattr(self, field)):
                raise ValueError(f"QuantScheme.{field}: got {getattr(self, field)!r}, expected a list of patterns")
        object.__setattr__(self, "overrides", tuple(self.overrides))
        _check_parts(self)
        _drop_off_parts(self)
        for field in ("output", "attention", "salient"):
            if getattr(self, field) is not None:
                raise ValueError(f"QuantScheme.{field}: not implemented yet; leave it null")
        for owner, spec in self._input_specs():
            if spec.granularity in ("channel", "token_head") or (spec.bits is not None and spec.bits < 2):
                raise ValueError(
                    f"{owner}: got bits={spec.bits}, granularity={spec.granularity!r}; inputs take 2 to 8 bits per "
                    "'token', 'group' or 'tensor' (a channel's range would mix tokens)"
                )
        if self.is_off:
            raise ValueError("QuantScheme: nothing is quantized; give weight, input or kv fewer than 16 bits")

    @property
    def is_off(self) -> bool:
        """Whether no part of the scheme quantizes anything."""
        parts = [self.weight, self.input, self.kv, *(p for o in self.overrides for p in (o.weight, o.input, o.kv))]
        return not any(isinstance(part, TensorSpec | KVSpec) for part in parts)

    def _input_specs(self) -> Iterator[tuple[str, TensorSpec]]:
        if self.input is not None:
            yield "QuantScheme.input", self.input
        for i, override in enumerate(self.overrides):
            if isinstance(override.input, TensorSpec):
                yield f"QuantScheme.overrides[{i}].input", override.input

    @classmethod
    def parse(cls, scheme: "str | QuantScheme | Mapping[str, Any]", target: str | None = None) -> "QuantScheme":
        """A scheme from its string, a preset's name, a plain dictionary, or itself.

        ``w<bits>[g<size>][a<bits>][kv<bits>]``: weights per output channel (or group), inputs per token, keys and values per token
        and head after RoPE, all symmetric min-max; weights of 1 and 2 bits take the mean-|w| levels. A part left out or 16 is off.

        Args:
            scheme: The scheme in one of these forms.
            target: Registered name of a runtime, such as ``compressed-tensors`` or ``gguf``: the scheme gets the conventions (divisor, code
                range, dtype of scales, rounding) that this runtime executes exactly.

        Raises:
            ValueError: Unknown string or key, bits out of range, or a scheme that the target cannot execute; the message names what is
                allowed.

        Example:
            >>> QuantScheme.parse("w4a8kv4").kv.position
            'post_rope'
        """
        if target is not None:
            return cls.parse(scheme)._fitted(runtimes.get(target), target)
        if isinstance(scheme, QuantScheme):
            return scheme
        if isinstance(scheme, Mapping):
            return scheme_from_dict(scheme)
        match = re.fullmatch(r"w(N)(?:g(\d+))?(?:a(N))?(?:kv(N))?".replace("N", r"\d+(?:\.\d+)?"), scheme)
        if match is None and scheme in PRESETS:
            return PRESETS.get(scheme)
        if match is None:
            raise ValueError(
                f"scheme: got {scheme!r}, expected w<bits>[g<size>][a<bits>][kv<bits>] such as 'w4a8kv4' or 'w4g32', "
                f"or a preset; for one {did_you_mean(scheme, PRESETS.names())}"
            )
        weight, group, inputs, kv = match.groups()
        return cls(weight=_weight(weight, group), input=_input(inputs), kv=None if kv is None else KVSpec(bits=_number(kv)))

    def _fitted(self, runtime: Runtime, target: str) -> "QuantScheme":
        def fit(owner: Any, place: str) -> dict[str, Any]:
            specs: dict[Part, Any] = {part: spec for part in PARTS if isinstance(spec := getattr(owner, part), TensorSpec | KVSpec)}
            return {part: runtime.fit(part, spec, f"{place}.{part}", target) for part, spec in specs.items()}

        overrides = enumerate(self.overrides)
        fitted = tuple(dataclasses.replace(item, **fit(item, f"QuantScheme.overrides[{i}]")) for i, item in overrides)
        return dataclasses.replace(self, **fit(self, "QuantScheme"), overrides=fitted)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML, manifests and checkpoints."""
        return _plain(dataclasses.asdict(self))

    def effective_bits(self, model: "nn.Module") -> float:
        """Bits per quantized weight, scales and zero points counted, over the layers of a model with quantizers inserted.

        Raises:
            ValueError: The model holds no weight quantizer.
        """
        bits = elements = 0
        for module in model.modules():
            for name in getattr(module, "weight_names", ()):
                spec = getattr(getattr(module, f"{name}_quantizer", None), "spec", None)
                if spec is not None:
                    rows, columns = module.matrix_shape(name)  # type: ignore[operator]
                    bits, elements = bits + spec.storage_bits(rows, columns), elements + rows * columns
        if elements == 0:
            raise ValueError("effective_bits: the model holds no weight quantizer; call insert_quantizers first")
        return bits / elements


PRESETS: Registry[QuantScheme] = Registry("preset", "lightning_qat.formats")  # each target brings those that fit it


def differences(there: Any, here: Any, place: str, name: str = "scheme") -> list[str]:
    """One readable line for each value in which two schemes differ, from their plain dictionaries; `place` says where `there` is."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted({*there, *here})
        return [line for key in keys for line in differences(there.get(key), here.get(key), place, f"{name}.{key}")]
    return [] if there == here else [f"{name}: {there!r} {place}, {here!r} here"]


def _number(text: str | float) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _weight(bits: str, group: str | None) -> TensorSpec:
    quantizer = "mean_abs" if float(bits) in (1, 2) else "minmax"
    size = None if group is None else int(group)
    return TensorSpec(bits=_number(bits), quantizer=quantizer, granularity="channel" if size is None else "group", group_size=size)


def _input(bits: str | None) -> TensorSpec | None:
    return None if bits is None else TensorSpec(bits=_number(bits), granularity="token")


def _check_parts(owner: Any) -> None:
    allowed = (None, "inherit") if isinstance(owner, Override) else (None,)
    for name, kind in (("weight", TensorSpec), ("input", TensorSpec), ("kv", KVSpec)):
        part = getattr(owner, name)
        if not isinstance(part, kind) and part not in allowed:
            raise ValueError(f"{type(owner).__name__}.{name}: got {part!r}, expected a {kind.__name__} or one of {allowed}")


def _drop_off_parts(owner: Any) -> None:
    """Bits of 16 or None are the same as no spec, so that equal schemes compare equal."""
    for field in dataclasses.fields(owner):
        if isinstance(part := getattr(owner, field.name), TensorSpec | KVSpec) and part.is_off:
            object.__setattr__(owner, field.name, None)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def scheme_from_dict(data: Mapping[str, Any]) -> QuantScheme:
    """The inverse of :meth:`QuantScheme.to_dict`; unknown keys are refused by name."""
    fields = dict(data)
    for key, kind in (("weight", TensorSpec), ("input", TensorSpec), ("kv", KVSpec)):
        fields[key] = _build(kind, key, fields.get(key))
    overrides = []
    for i, item in enumerate(fields.get("overrides") or ()):
        parts = dict(item)
        for key, kind in (("weight", TensorSpec), ("input", TensorSpec), ("kv", KVSpec)):
            parts[key] = _build(kind, f"overrides[{i}].{key}", parts.get(key, "inherit"))
        overrides.append(_build(Override, f"overrides[{i}]", parts))
    return _build(QuantScheme, "scheme", {**fields, "overrides": tuple(overrides)})


def _build(kind: type, where: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    known = [field.name for field in dataclasses.fields(kind)]
    for key in value:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}, {did_you_mean(key, known)}")
    return kind(**value)


PRESETS.add(
    "llm-qat",
    QuantScheme(
        weight=_weight("4", None),
        input=_input("8"),
        kv=KVSpec(bits=4, position="pre_rope", granularity="token"),
    ),
)
