"""The models that are timed, and the variants of each: unquantized, ours by scheme, and the peers."""

import copy
import itertools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers import insert_formula, insert_torchao, torchao_missing
from lightning_qat import QuantScheme, TensorSpec, insert_quantizers
from lightning_qat.numerics.backends import compiled

PLAIN = "unquantized"
GROUP = 128
LIKE_TORCHAO = QuantScheme(
    weight=TensorSpec(bits=4, granularity="group", group_size=GROUP, code_range="full", divisor="half_range"),
    input=TensorSpec(bits=8, granularity="token", symmetric=False),
)


def ready_at_once() -> None:
    """On the CPU the library compiles its kernels after some seconds of use; here at the first call, so that warm-up is short."""
    compiled.WORTH_COMPILING = 0


@dataclass(frozen=True)
class Workload:
    """A Llama and the batch it is given; `trains` times a whole training step, else forward and backward of its layers only."""

    name: str
    batch: int
    tokens: int
    trains: bool = True
    llama: dict[str, Any] = field(default_factory=dict)

    @property
    def meaning(self) -> str:
        sizes = self.llama
        layers = f"{sizes['num_hidden_layers']} decoder layer{'s' if sizes['num_hidden_layers'] > 1 else ''}"
        return (
            f"{layers} of hidden size {sizes['hidden_size']}, MLP {sizes['intermediate_size']}, {sizes['num_attention_heads']} heads"
            + (f", vocabulary {sizes['vocab_size']}" if self.trains else "")
            + f"; batch {self.batch} x {self.tokens} tokens; "
            + ("forward, backward, fused AdamW, zero_grad" if self.trains else "forward and backward, without loss and optimizer")
        )

    def build(self, device: str) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(**self.llama, tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa")
        with torch.device(device):
            return LlamaForCausalLM(config).train()

    def inputs(self, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.trains:
            ids = torch.randint(self.llama["vocab_size"], (self.batch, self.tokens), generator=generator)
            return ids.to(device)
        return torch.randn(self.batch, self.tokens, self.llama["hidden_size"], generator=generator).to(device)


def llama(hidden: int, mlp: int, layers: int, heads: int, vocab: int = 4096, kv_heads: int | None = None) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": vocab}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads or heads}


@dataclass(frozen=True)
class Variant:
    """A way to quantize a model in place."""

    name: str
    meaning: str
    insert: Callable[[nn.Module], Any]
    missing: Callable[[], str | None] = lambda: None


def _int8(scheme: str) -> Callable[[nn.Module], Any]:
    def insert(model: nn.Module) -> None:
        from lightning_qat.modules.int8 import use_int8_forward

        insert_quantizers(model, scheme)
        refused = use_int8_forward(model)
        assert not refused, f"int8 forward refused: {refused}"

    return insert


def _int8_missing() -> str | None:
    try:
        from lightning_qat.modules.int8 import use_int8_forward  # noqa: F401
    except ImportError:
        return "this version of lightning_qat has no int8 forward"
    return None


def ours(name: str, scheme: str | QuantScheme, meaning: str) -> Variant:
    return Variant(name, meaning, lambda model: insert_quantizers(model, scheme))


VARIANTS = [
    Variant(PLAIN, "the same model without quantizers", lambda model: None),
    ours("w4a8kv4", "w4a8kv4", "weights 4 bits per channel, inputs 8 bits per token, keys and values 4 bits per token and head"),
    ours("w8a8", "w8a8", "weights 8 bits per channel, inputs 8 bits per token"),
    ours("w4g128", "w4g128", "weights 4 bits per group of 128, inputs as they are"),
    Variant("w4a8kv4 int8 forward", "w4a8kv4 with the forward products on integer codes", _int8("w4a8kv4"), _int8_missing),
    Variant("w8a8 int8 forward", "w8a8 with the forward products on integer codes", _int8("w8a8"), _int8_missing),
    Variant(
        "formula w4a8kv4",
        "peer: w4a8kv4 by the plain formula in eager torch, the way of LLM-QAT's reference code",
        lambda model: insert_formula(model, 4, 8, 4),
    ),
    ours("8da4w g128", LIKE_TORCHAO, "ours like torchao's: weights 4 bits per group of 128, inputs 8 bits per token, asymmetric"),
    Variant(
        "torchao 8da4w g128", "peer: torchao's QAT with the same two grids", lambda model: insert_torchao(model, GROUP), torchao_missing
    ),
]
BY_NAME = {variant.name: variant for variant in VARIANTS}


def variant_of(plain: nn.Module, variant: Variant) -> Any:
    """A copy of `plain` on the same parameters, quantized: many variants fit side by side, and one optimizer trains them all."""
    model = copy.deepcopy(plain, {id(parameter): parameter for parameter in plain.parameters()})
    variant.insert(model)
    return model


def autocast(device: str, mode: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if mode.startswith("bf16") else nullcontext()


_numbers = itertools.count()


def _train(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def _layers(model: Any, x: Tensor) -> Tensor:
    return model.model(inputs_embeds=x).last_hidden_state


def make_step(workload: Workload, model: Any, inputs: Tensor, optimizer: Any, mode: str, device: str) -> Callable[[], None]:
    """One step of the workload as a call."""
    forward: Any = _train if workload.trains else _layers
    if mode.endswith("compiled"):
        # A code object of its own: torch keeps compiled graphs per code object, and would look through those of other variants first.
        code = forward.__code__.replace(co_name=f"{forward.__name__}_{next(_numbers)}")
        own = types.FunctionType(code, forward.__globals__)
        forward = torch.compile(own, dynamic=False)

    def step() -> None:
        with autocast(device, mode):
            out = forward(model, inputs)
        if workload.trains:
            out.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        else:
            out.backward(torch.ones_like(out))
            model.zero_grad(set_to_none=True)

    return step


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
