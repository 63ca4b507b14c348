"""What insertion did, and what it left alone and why."""

from dataclasses import dataclass

from lightning_qat.specs import KVSpec, TensorSpec

MINIMUM_COVERAGE = 0.9


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """One layer that holds quantizers now."""

    name: str
    type: str
    weight: TensorSpec | None
    input: TensorSpec | None
    elements: int


@dataclass(frozen=True, kw_only=True)
class QuantizedAttention:
    """One attention module whose keys and values are quantized now."""

    name: str
    type: str
    kv: KVSpec


@dataclass(frozen=True, kw_only=True)
class LeftAlone:
    """One module with matrix weights that holds no quantizer.

    Attributes:
        name: Dotted name relative to the root.
        type: Class name.
        reason: Why it was left alone.
        elements: Weight elements it owns.
        on_purpose: Whether the scheme excludes it; only the others count against the coverage.
    """

    name: str
    type: str
    reason: str
    elements: int
    on_purpose: bool


@dataclass(frozen=True, kw_only=True)
class InsertionReport:
    """The result of :func:`~lightning_qat.insert_quantizers`.

    Attributes:
        layers: Every quantized layer under the root.
        attention: Every attention module with quantized keys and values.
        left_alone: Every other module with matrix weights.
        inserted: How many layers and attention modules were changed by this call; 0 when it found its own work.
    """

    layers: tuple[QuantizedLayer, ...]
    attention: tuple[QuantizedAttention, ...]
    left_alone: tuple[LeftAlone, ...]
    inserted: int

    @property
    def coverage(self) -> float:
        """Share of the matrix weights that is quantized, those excluded on purpose left out of the count."""
        done = sum(layer.elements for layer in self.layers)
        missed = sum(item.elements for item in self.left_alone if not item.on_purpose)
        return done / (done + missed) if done + missed else 1.0

    @property
    def share_of_all(self) -> float:
        """Share of all matrix weights under the root that is quantized."""
        done = sum(layer.elements for layer in self.layers)
        total = done + sum(item.elements for item in self.left_alone)
        return done / total if total else 0.0

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers quantized: {self.coverage:.1%} of the matrix weights in reach of the scheme, "
            f"{self.share_of_all:.1%} of all; keys and values of {len(self.attention)} attention modules"
        ]
        lines += [f"  left alone: {item.name} ({item.type}, {item.elements:,} weights): {item.reason}" for item in self.left_alone]
        return "\n".join(lines)
