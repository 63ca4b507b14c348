"""Quantized experts of transformers' mixture-of-experts models, whose weights are 3-d parameters.

A quantizer sees each expert's matrix [out, in] on its own, and only those of experts that tokens were routed to: the others cost nothing.
The forward pass is transformers' eager loop, whatever `config._experts_implementation` says.
"""

import importlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_qat.modules.layer import QuantLayer, product_dtype, register_layer
from lightning_qat.modules.packed import PackedWeight
from lightning_qat.numerics.fake_quantize import straight_through
from lightning_qat.quantizers import Quantizer, build_quantizer
from lightning_qat.specs import TensorSpec

# <model>.<class> of the experts whose eager forward is the loop below; the others are refused by name.
SUPPORTED = """
    afmoe.AfmoeExperts axk1.AXK1Experts axk2.AXK2Experts bailing_hybrid.BailingHybridExperts beam.BeamExperts
    cohere2_moe.Cohere2MoeExperts deepseek_ocr2.DeepseekOcr2TextExperts deepseek_v2.DeepseekV2Experts deepseek_v3.DeepseekV3Experts
    deepseek_v32.DeepseekV32Experts deepseek_v4.DeepseekV4Experts diffusion_gemma.DiffusionGemmaTextExperts dots1.Dots1Experts
    dots3_note.Dots3NoteExperts ernie4_5_moe.Ernie4_5_MoeExperts ernie4_5_vl_moe.Ernie4_5_VLMoeMoeExperts exaone_moe.ExaoneMoeExperts
    flex_olmo.FlexOlmoExperts flint.FlintExperts gemma4.Gemma4TextExperts glm4_moe.Glm4MoeExperts glm4_moe_lite.Glm4MoeLiteExperts
    glm4v_moe.Glm4vMoeTextExperts glm5_next.Glm5NextTextExperts glm_moe_dsa.GlmMoeDsaExperts granitemoe.GraniteMoeExperts
    granitemoe_swa.GraniteMoeSWAExperts granitemoehybrid.GraniteMoeHybridExperts granitemoeshared.GraniteMoeSharedExperts
    hunyuan_v1_moe.HunYuanMoEV1Experts hy_v3.HYV3Experts hy_v4.HYV4Experts inkling.InklingExperts jamba.JambaExperts
    kimi_linear.KimiLinearExperts kolibri1.Kolibri1Experts laguna.LagunaExperts lfm2_moe.Lfm2MoeExperts mellum.MellumExperts
    mimo_v2_flash.MiMoV2FlashExperts minimax.MiniMaxExperts minimax_m2.MiniMaxM2Experts minimax_m3_vl.MiniMaxM3VLExperts
    mistral4.Mistral4Experts mistral_large4.MistralLarge4TextExperts mixtral.MixtralExperts olmoe.OlmoeExperts phimoe.PhimoeExperts
    qwen2_moe.Qwen2MoeExperts qwen3_5_moe.Qwen3_5MoeExperts qwen3_moe.Qwen3MoeExperts qwen3_next.Qwen3NextExperts
    qwen3_omni_moe.Qwen3OmniMoeTalkerTextExperts qwen3_omni_moe.Qwen3OmniMoeThinkerTextExperts qwen3_vl_moe.Qwen3VLMoeTextExperts
    qwen4_exp.Qwen4ExpTextExperts solar_open.SolarOpenExperts unlimited_ocr.UnlimitedOcrTextExperts zaya.ZayaExperts
"""
HOMES = {name: f"transformers.models.{model}.modeling_{model}" for model, name in (entry.split(".") for entry in SUPPORTED.split())}
PREFIX = "Quant"


class QuantExperts(QuantLayer):
    """Quantized experts: down(act(gate(x)) * up(x)) of each expert, with both weights and both inputs on their grids.

    gate_up_proj is [experts, 2 * intermediate, hidden], down_proj [experts, hidden, intermediate]; one scale per output row of each expert,
    or per group of it. Hidden states are quantized once, before they are routed.

    Attributes:
        gate_up_proj_quantizer: Quantizer of the first weight, its packed codes, or None.
        down_proj_quantizer: The same of the second.
        down_input_quantizer: Quantizer of what the second weight is multiplied with, or None.
        routed: Which experts were ever given a token, bool [experts]; None before the first call. Not part of the state.
    """

    weight_names: ClassVar[tuple[str, ...]] = ("gate_up_proj", "down_proj")
    input_granularities = ("token", "group")  # a range over a whole tensor would depend on which tokens share an expert

    gate_up_proj: Tensor
    down_proj: Tensor
    num_experts: int
    gate_up_proj_quantizer: Quantizer | PackedWeight | None
    down_proj_quantizer: Quantizer | PackedWeight | None
    down_input_quantizer: Quantizer | None
    routed: Tensor | None
    _apply_gate: Any

    @classmethod
    def check(cls, module: nn.Module) -> str | None:
        """Settings of one instance that the loop below does not know."""
        more = sorted({name for name, _ in module.named_parameters(recurse=False)} - set(cls.weight_names))
        if more or getattr(module, "is_transposed", False):
            return f"experts with {', '.join(more) or 'transposed weights'} are not supported yet"
        return None

    @classmethod
    def check_weight(cls, spec: TensorSpec) -> str | None:
        """A row's scale must not depend on other rows, nor on other experts."""
        if spec.granularity not in ("channel", "group"):
            return f"weight.granularity: got {spec.granularity!r}, experts take 'channel' or 'group'"
        if spec.axis not in (None, 0):
            return f"weight.axis: got {spec.axis}, experts take None or 0"
        if build_quantizer(spec).state_dict():
            return f"weight.quantizer: {spec.quantizer!r} learns or remembers values, which is not supported for experts"
        return None

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        """[experts, out, in] -> [experts * out, in]."""
        return weight.flatten(0, 1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse view."""
        return matrix.view(self.num_experts, -1, matrix.shape[1])

    def attach(self, weight: TensorSpec | None, input: TensorSpec | None) -> None:
        """See :meth:`QuantLayer.attach`."""
        super().attach(weight, input)
        self.down_input_quantizer = None if input is None else build_quantizer(input)
        self.routed = None

    def detach(self) -> None:
        """See :meth:`QuantLayer.detach`."""
        del self.down_input_quantizer, self.routed
        super().detach()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the experts it replaces.

        Args:
            hidden_states: Shape [tokens, hidden].
            top_k_index: Experts of each token, shape [tokens, k]; `num_experts` stands for one of another rank.
            top_k_weights: Their weights, shape [tokens, k].

        Returns:
            Shape [tokens, hidden].
        """
        dtype = product_dtype(hidden_states)
        out = torch.zeros_like(hidden_states)
        x = self.quantized_input(hidden_states, dtype)
        gate_up, down = (getattr(self, name).unbind() for name in self.weight_names)
        for expert, places in self._hits(top_k_index):
            k, tokens = torch.where(places)
            y = self._apply_gate(functional.linear(x[tokens], self._matrix("gate_up_proj", gate_up, expert, dtype)))
            if self.down_input_quantizer is not None:
                y = self.down_input_quantizer(y, dtype)
            y = functional.linear(y, self._matrix("down_proj", down, expert, dtype)) * top_k_weights[tokens, k, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        return out

    def _hits(self, top_k_index: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(expert, its places [k, tokens]) of every expert with tokens; the host waits once for all of them."""
        with torch.no_grad():
            places = functional.one_hot(top_k_index, self.num_experts + 1).permute(2, 1, 0)
            hit = places[:-1].flatten(1).any(1)
            self.routed = hit if self.routed is None else self.routed.to(hit.device) | hit
            experts = hit.nonzero().flatten().tolist()
        return ((expert, places[expert]) for expert in experts)

    def _matrix(self, name: str, matrices: tuple[Tensor, ...], expert: int, dtype: torch.dtype | None) -> Tensor:
        """One expert's weight on its grid, [out, in]; kept like the weight of any other layer."""
        quantizer = getattr(self, f"{name}_quantizer")
        # Packed codes leave an empty parameter behind, which only knows a dtype.
        weight = matrices[expert] if matrices else getattr(self, name)
        if quantizer is None or (isinstance(quantizer, Quantizer) and not quantizer.enabled):
            return weight
        trains = torch.is_grad_enabled() and weight.requires_grad
        if self.keeps == "nothing" or (trains and not self._may_keep_in_training(quantizer)):
            return self._compute_matrix(quantizer, weight, expert, dtype)
        if self.kept_weight is None:
            self.kept_weight = {}
        key = (name, expert, dtype)
        if key not in self.kept_weight:
            with torch.inference_mode(False), torch.no_grad():
                self.kept_weight[key] = self._compute_matrix(quantizer, weight, expert, dtype)
        values: Tensor = self.kept_weight[key]
        return straight_through(weight, values) if trains else values

    def _compute_matrix(self, quantizer: Quantizer | PackedWeight, weight: Tensor, expert: int, dtype: torch.dtype | None) -> Tensor:
        if not isinstance(quantizer, PackedWeight):
            return quantizer(self.as_quantized(weight), dtype or weight.dtype, part=(expert, self.num_experts))
        rows = quantizer.shape[0] // self.num_experts
        return quantizer.dequantize(slice(expert * rows, (expert + 1) * rows)).to(dtype or weight.dtype)


def experts_class(float_type: type[nn.Module]) -> type[QuantLayer] | None:
    """The quantized class of one exact type of experts, registered; None for any other type.

    It is made when first asked for, here or by pickle (:func:`__getattr__`): importing every model of transformers would take long.
    """
    name = float_type.__name__
    if HOMES.get(name) != float_type.__module__:
        return None
    about = {"__module__": __name__, "__qualname__": f"{PREFIX}{name}", "__doc__": f"Quantized `{name}`."}
    return globals().setdefault(f"{PREFIX}{name}", register_layer(float_type)(type(f"{PREFIX}{name}", (QuantExperts, float_type), about)))


def __getattr__(name: str) -> Any:
    home = HOMES.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return experts_class(getattr(importlib.import_module(home), name.removeprefix(PREFIX)))


def expert_coverage(model: nn.Module) -> dict[str, tuple[int, int]]:
    """How many of its experts every quantized experts module was ever routed to.

    Returns:
        Name -> (experts that were given a token since quantizers were inserted, all experts), on this rank. The others were never
        quantized, and their weights got no gradient.

    Example:
        >>> expert_coverage(torch.nn.Linear(2, 2))
        {}
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantExperts)}
    return {name: (0 if layer.routed is None else int(layer.routed.sum()), layer.num_experts) for name, layer in layers.items()}
