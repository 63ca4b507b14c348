"""Forward passes that stop before the output head: hidden states are small, the logits of all tokens are not."""

import inspect
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_qat.modules.compiled import is_compiled


class States(NamedTuple):
    """What a model computed.

    Attributes:
        final: What its head turns into logits, [batch, tokens, features].
        hidden_states: Output of the embedding and of each block, [batch, tokens, features] each; None unless asked for.
        attentions: Attention probabilities of each block, [batch, heads, tokens, tokens]; None unless asked for.
    """

    final: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


def final_states(model: Any, inputs: dict[str, Tensor], needs: frozenset[str] = frozenset()) -> States:
    """Run a causal language model of transformers without its head, but for one token.

    The model itself is called, and not its decoder: what hangs on its calls (sharding, offloading, compilation) happens.

    Args:
        model: The model.
        inputs: Its arguments.
        needs: Any of ``hidden_states``, ``attentions``.
    """
    caught: list[Tensor] = []
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    compiled = is_compiled(model)  # a compiled graph does not call hooks that came after it
    if "attentions" in needs:
        options["output_attentions"] = True
    if compiled or "hidden_states" in needs:
        outputs = model(**inputs, **options, output_hidden_states=True)
        return States(outputs.hidden_states[-1], outputs.hidden_states, outputs.get("attentions"))
    hook = model.get_decoder().register_forward_hook(lambda module, args, output: caught.append(output[0]))
    try:
        outputs = model(**inputs, **options)
    finally:
        hook.remove()
    return States(caught[0], None, outputs.get("attentions"))


class Head:
    """From final hidden states to logits, with what some families do to them.

    Args:
        model: A causal language model of transformers.
    """

    def __init__(self, model: Any) -> None:
        self.layer = model.get_output_embeddings()
        config = model.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        self.scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self.scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., features] -> [..., vocabulary]."""
        logits: Tensor = self.layer(hidden)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def parameters(self) -> list[nn.Parameter]:
        """Those of the head."""
        return list(self.layer.parameters())


@torch.no_grad()
def check_head(model: Any, who: str, device: torch.device) -> None:
    """Try whether logits are those of the head on the final hidden states; models are free to do something else with them.

    Args:
        model: A causal language model of transformers; left as it was.
        who: ``student`` or ``teacher``.
        device: Where it computes.

    Raises:
        MisconfigurationException: They are not.
    """
    way_out = "pass loss_chunk=None to DistillationModule, which computes all logits at once"
    kind, plain = type(model).__name__, getattr(model, "_orig_mod", model)
    if "logits_to_keep" not in inspect.signature(plain.forward).parameters:
        raise MisconfigurationException(f"loss_chunk: the {who}, a {kind}, cannot leave out logits (it takes no logits_to_keep); {way_out}")
    if (quantizer := getattr(plain.get_output_embeddings(), "input_quantizer", None)) and quantizer.spec.granularity == "tensor":
        raise MisconfigurationException(f"loss_chunk: the head of the {who} has one range for all tokens (granularity 'tensor'); {way_out}")
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 4]], device=device)}
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        expected = model(**inputs, use_cache=False).logits
        found = Head(model)(final_states(model, inputs).final)
    finally:
        for module, mode in modes:
            module.training = mode
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=0.01 * expected.abs().max().item()):
        raise MisconfigurationException(f"loss_chunk: the logits of the {who}, a {kind}, are not its head's; {way_out}")
