"""Whether a runtime executes what was trained: part for part, or with parts dropped and conventions changed where the user says so."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qat.formats.exactness.codes import stored_codes
from lightning_qat.modules.kv import kv_of
from lightning_qat.modules.layer import quant_layers
from lightning_qat.modules.weights import LayerWeight, layer_weights
from lightning_qat.registry import did_you_mean
from lightning_qat.runtime import CONVENTIONS, Misfit, Part, Runtime, changes
from lightning_qat.specs import KVSpec, TensorSpec

DROPPABLE = ("input", "kv")


class Place(NamedTuple):
    """A spec where a model has it."""

    name: str
    part: Part
    spec: Any


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a runtime will execute a model.

    Attributes:
        dropped: Parts that are left out.
        inputs: Specs of inputs that it executes instead of the trained ones, by name of the layer.
        kv: Specs of keys and values that it executes instead of the trained ones, by name of the attention module.
        scale_dtypes: Dtypes to which scales of weights must be rounded, by name of the weight.
        notes: What differs from training, in words; nothing where all is exact.
        keeps_buffers: Whether computed buffers, such as rotary tables, are stored and not computed anew.
    """

    dropped: tuple[str, ...] = ()
    inputs: dict[str, TensorSpec]
    kv: dict[str, KVSpec]
    scale_dtypes: dict[str, torch.dtype]
    notes: tuple[str, ...] = ()
    keeps_buffers: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether the runtime executes all that was trained."""
        return not self.notes


def check_drop(drop: Collection[str]) -> None:
    """Refuse names of parts that cannot be dropped."""
    if isinstance(drop, str):
        raise ValueError(f"drop: got {drop!r}, expected a list such as ('kv',)")
    for part in drop:
        if part not in DROPPABLE:
            raise ValueError(f"drop: got {part!r}, {did_you_mean(part, DROPPABLE)}")


def fit_model(model: nn.Module, runtime: Runtime, name: str, scale_dtype: torch.dtype, drop: Collection[str], inexact: bool) -> Fit:
    """How a runtime executes a model.

    Args:
        model: A module with quantizers.
        runtime: What it executes.
        name: The format's name, for errors.
        scale_dtype: What it stores scales of weights in.
        drop: Parts of the scheme to leave out.
        inexact: Accept other conventions than those of training.

    Raises:
        ValueError: Something does not fit; every misfit is named once, with the nearest spec that fits and the ways out.
    """
    check_drop(drop)
    misfits = {place: found for place in quantized_places(model) if place.part not in drop and (found := _misfits(model, runtime, place))}
    hard = [place for place, found in misfits.items() if not inexact or not _are_conventions(place, found)]
    rounded = {weight.name: scale_dtype for weight in layer_weights(model) if not _fits(weight, scale_dtype)}
    if hard or (rounded and not inexact):
        raise ValueError(_refusal(runtime, name, {place: misfits[place] for place in hard}, rounded, drop, inexact))
    fitted = {place: _nearest(runtime, place) for place in misfits}
    dropped = tuple(part for part in DROPPABLE if part in drop and any(place.part == part for place in quantized_places(model)))
    notes = [f"dropped: {part}" for part in dropped]
    notes += sorted({f"{place.part}: executed with {changes(place.spec, spec)}" for place, spec in fitted.items()})
    notes += [f"weight: {len(rounded)} weights have their scales rounded to {_word(scale_dtype)}"] if rounded else []
    return Fit(
        dropped=dropped,
        inputs={place.name: spec for place, spec in fitted.items() if isinstance(spec, TensorSpec)},
        kv={place.name: spec for place, spec in fitted.items() if isinstance(spec, KVSpec)},
        scale_dtypes=rounded,
        notes=tuple(notes),
    )


def quantized_places(model: nn.Module) -> Iterator[Place]:
    """Every spec of a model, part for part."""
    for weight in layer_weights(model):
        if weight.quantizer is not None:
            yield Place(weight.name, "weight", weight.quantizer.spec)
    for name, layer in quant_layers(model):
        if layer.input_quantizer is not None:
            yield Place(name, "input", layer.input_quantizer.spec)
    for name, module in model.named_modules():
        if (kv := kv_of(module)) is not None:
            yield Place(name, "kv", kv)


def _misfits(model: nn.Module, runtime: Runtime, place: Place) -> list[Misfit]:
    """Of weights codes and scales are handed over, so how they were found does not matter, and whether the scales fit their values tell."""
    misfits = runtime.misfits(place.part, place.spec)
    if place.part == "weight":
        return [misfit for misfit in misfits if misfit.field != "scale_dtype"]
    if all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.is_floating_point()):
        return [misfit for misfit in misfits if misfit.field != "arithmetic"]  # the input is float32
    return misfits


def _are_conventions(place: Place, misfits: list[Misfit]) -> bool:
    """Whether the same model can be executed with other conventions; codes of weights are what they are."""
    return place.part != "weight" and all(misfit.field in CONVENTIONS for misfit in misfits)


def _fits(weight: LayerWeight, dtype: torch.dtype) -> bool:
    """Whether every scale of a weight is a number of `dtype`."""
    if weight.quantizer is None:
        return True
    scale: Tensor = stored_codes(weight).scale
    return torch.equal(scale.to(dtype).to(scale.dtype), scale)


def _nearest(runtime: Runtime, place: Place) -> Any:
    nearest = runtime.nearest(place.part, place.spec)
    assert nearest is not None
    return nearest.fit(place.spec)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refusal(
    runtime: Runtime, name: str, hard: dict[Place, list[Misfit]], rounded: dict[str, torch.dtype], drop: Collection[str], inexact: bool
) -> str:
    """One line for each kind of misfit, then the ways out."""
    kinds: dict[str, list[Place]] = {}
    for place, found in hard.items():
        if not runtime.rules(place.part):
            text = f"{place.part}: this format executes no quantized {place.part}"
        else:
            fitted = changes(place.spec, _nearest(runtime, place))
            text = "; ".join(f"{place.part}.{misfit}" for misfit in found) + f"; the nearest that fits: {fitted}"
        kinds.setdefault(text, []).append(place)
    lines = [f"{text} ({_count([place.name for place in places])})" for text, places in kinds.items()]
    if rounded:
        dtype = _word(next(iter(rounded.values())))
        lines.append(f"weight.scale_dtype: this format stores scales as {dtype}, which would round them ({_count(list(rounded))})")
    only_conventions = all(misfit.field in CONVENTIONS for found in hard.values() for misfit in found)
    ways = [f"train with QuantScheme.parse(scheme, target={name!r})"] if only_conventions else ["train with the nearest that fits"]
    ways += [f"export with {options}" for options in _options_that_fit(hard, bool(rounded), drop, inexact)]
    return f"format {name!r} cannot express the scheme:\n  " + "\n  ".join([*lines, "ways out: " + ", or ".join(ways)])


def _options_that_fit(hard: dict[Place, list[Misfit]], rounds: bool, drop: Collection[str], inexact: bool) -> list[str]:
    """Arguments that make the export go through, together with those that were given: all that does not fit left out, or what has to be."""
    if any(place.part == "weight" for place in hard):
        return []
    misfit = {*drop, *(place.part for place in hard)}
    impossible = {*drop, *(place.part for place, found in hard.items() if not _are_conventions(place, found))}
    options = []
    for parts, differs in ((misfit, inexact or rounds), (impossible, True)):
        kept = tuple(part for part in DROPPABLE if part in parts)
        words = ([f"drop={kept!r}"] if kept else []) + (["inexact=True, which measures the difference"] if differs else [])
        options.append(", ".join(words))
    return list(dict.fromkeys(option for option in options if option))


def _count(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
