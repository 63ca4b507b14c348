"""The YAML of a plan for `lightning-qat fit`, and the plan of such a YAML."""

from collections.abc import Mapping
from typing import Any

import yaml

from lightning_qat.plan.setting import GPUS_OF_A_NODE, KEPT_PROBABILITIES, PRECISIONS, STRATEGIES, Setting
from lightning_qat.registry import did_you_mean

SAMPLES = 96_000  # LLM-QAT: 96,000 samples, learning rate 2e-5, cosine schedule, no weight decay
LEARNING_RATE = 2e-5
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"class_path": "torch.optim.AdamW", "init_args": {"lr": LEARNING_RATE, "weight_decay": 0.0, "fused": True}},
    "adamw8bit": {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": LEARNING_RATE, "weight_decay": 0.0}},
    "sgd": {"class_path": "torch.optim.SGD", "init_args": {"lr": LEARNING_RATE}},
}
_CLASSES = {"AdamW": "adamw", "AdamW8bit": "adamw8bit", "PagedAdamW8bit": "adamw8bit", "SGD": "sgd"}


def recipe(model: str, setting: Setting, samples: int = SAMPLES) -> str:
    """A YAML for ``lightning-qat fit``.

    Args:
        model: Folder or hub id of the weights.
        setting: How it is trained.
        samples: How many samples the teacher writes.

    Raises:
        ValueError: A setting that is only good for estimates.
    """
    if setting.teacher == "replicated" and setting.facts.weights:
        raise ValueError("teacher: 'replicated' is for estimates; DistillationModule shards the teacher with the student: use 'bfloat16'")
    steps = max(1, samples // (setting.gpus * setting.batch_size))
    name = f"runs/{model.rstrip('/').rsplit('/', 1)[-1]}-{setting.scheme}"
    content = {
        "seed_everything": 0,
        "quantization": {"scheme": setting.scheme},
        "model": {"class_path": "DistillationModule", "init_args": _module(model, setting, steps)},
        "data": {"class_path": "SyntheticDataModule", "init_args": _data(model, setting, samples, name)},
        "trainer": _trainer(setting, steps, name),
    }
    return yaml.safe_dump(content, sort_keys=False, width=140)


def _module(model: str, setting: Setting, steps: int) -> dict[str, Any]:
    own: dict[str, Any] = {"teacher": None, "student": model} if setting.teacher == "none" else {"teacher": model}
    if setting.teacher in ("nf4", "int8"):
        own["teacher_quantization"] = setting.teacher
    elif setting.teacher != "none":
        own["teacher_dtype"] = "float32" if setting.teacher == "float32" else "bfloat16"
    if setting.teacher == "offload":
        own["teacher_offload"] = True
    if setting.deferred:
        own["defer_loading"] = True
    if setting.param_dtype is not None:
        own["param_dtype"] = setting.param_dtype
    if setting.lora_rank is not None:
        own["lora"] = {"rank": setting.lora_rank}
    return own | {
        "gradient_checkpointing": setting.gradient_checkpointing,
        "loss_chunk": setting.loss_chunk,
        "optimizer": _OPTIMIZERS[setting.optimizer],
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": steps}},
    }


def _data(model: str, setting: Setting, samples: int, name: str) -> dict[str, Any]:
    kept = {"teacher": model, "teacher_logits": KEPT_PROBABILITIES} if setting.teacher == "none" else {}
    sizes = {"num_samples": samples, "max_length": setting.max_length, "batch_size": setting.batch_size}
    return kept | sizes | {"store": f"{name}/generations"}


def _trainer(setting: Setting, steps: int, name: str) -> dict[str, Any]:
    nodes = -(-setting.gpus // GPUS_OF_A_NODE)
    strategy: Any = {"single": "auto"}.get(setting.strategy, setting.strategy)
    if setting.strategy == "fsdp2":
        strategy = {
            "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
            "init_args": {"data_parallel_size": setting.gpus, "tensor_parallel_size": 1},
        }
    saved = {"dirpath": name, "save_last": True, "save_top_k": 0, "every_n_train_steps": 500}
    return {
        "max_steps": steps,
        "accelerator": "gpu",
        "devices": setting.gpus // nodes,
        "num_nodes": nodes,
        "precision": setting.precision,
        "strategy": strategy,
        # FSDP2 gathers weights in validation that training uses next.
        **({"inference_mode": False} if setting.strategy == "fsdp2" else {}),
        "logger": False,
        "default_root_dir": name,
        "callbacks": [{"class_path": "lightning_qat.callbacks.AtomicModelCheckpoint", "init_args": saved}],
    }


def read_recipe(text: str) -> tuple[str, dict[str, Any]]:
    """What a YAML of ``lightning-qat fit`` says about memory.

    Returns:
        (the model, fields of :class:`~lightning_qat.plan.Setting`); `gpus` is left out where the YAML does not say.

    Raises:
        ValueError: It is no such YAML, or names something whose memory is not known.
    """
    content = yaml.safe_load(text)
    model = _section(content, "model")
    if not str(model.get("class_path", "")).endswith("DistillationModule"):
        raise ValueError(f"config: model.class_path is {model.get('class_path')!r}, expected DistillationModule")
    own, data, trainer = model.get("init_args") or {}, _section(content, "data").get("init_args") or {}, _section(content, "trainer")
    name = own.get("student") or own.get("teacher")
    if name is None:
        raise ValueError("config: model.init_args names neither teacher nor student")
    lora = own.get("lora") or {}
    fields = {
        "scheme": _section(content, "quantization").get("scheme"),
        "precision": _precision(trainer.get("precision", "32-true")),
        "optimizer": _optimizer(own.get("optimizer")),
        "teacher": _teacher(own),
        "gradient_checkpointing": bool(own.get("gradient_checkpointing", False)),
        "loss_chunk": own.get("loss_chunk", 1024),
        "param_dtype": own.get("param_dtype"),
        "lora_rank": lora.get("rank", 16) if own.get("lora") else None,
        "batch_size": data.get("batch_size", 8),
        "max_length": data.get("max_length", 2048),
    }
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if isinstance(devices, int) and devices > 0:
        fields["gpus"] = devices * nodes
    return str(name), fields | {"strategy": _strategy(trainer.get("strategy", "auto"), fields.get("gpus", 2))}


def _section(content: Any, key: str) -> dict[str, Any]:
    section = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(section, Mapping):
        raise ValueError(f"config: has no section {key!r}; expected a YAML of lightning-qat fit (quantization, model, data, trainer)")
    return dict(section)


def _precision(value: Any) -> str:
    named = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}.get(str(value), str(value))
    if named not in PRECISIONS:
        raise ValueError(f"config: trainer.precision is {value!r}, {did_you_mean(named, PRECISIONS)}")
    return named


def _optimizer(value: Any) -> str:
    name = "AdamW" if value is None else str(value.get("class_path") if isinstance(value, Mapping) else value).rsplit(".", 1)[-1]
    if name not in _CLASSES:
        raise ValueError(f"config: the optimizer is {name!r}, {did_you_mean(name, _CLASSES)}: of others the memory is not known")
    return _CLASSES[name]


def _teacher(own: Mapping[str, Any]) -> str:
    if own.get("teacher") is None:
        return "none"
    if own.get("teacher_quantization") is not None:
        return str(own["teacher_quantization"])
    if own.get("teacher_offload"):
        return "offload"
    return "float32" if own.get("teacher_dtype", "float32") == "float32" else "bfloat16"


def _strategy(value: Any, gpus: int) -> str:
    name = str(value.get("class_path") if isinstance(value, Mapping) else value).rsplit(".", 1)[-1]
    if isinstance(value, Mapping) and name == "DeepSpeedStrategy":
        name = f"deepspeed_stage_{(value.get('init_args') or {}).get('stage', 2)}"
    known = {"auto": "ddp" if gpus > 1 else "single", "ModelParallelStrategy": "fsdp2", "FSDPStrategy": "fsdp", "DDPStrategy": "ddp"}
    known |= {"SingleDeviceStrategy": "single", "deepspeed": "deepspeed_stage_2", "ddp_find_unused_parameters_true": "ddp"}
    name = known.get(name, name)
    if name not in STRATEGIES:
        raise ValueError(f"config: trainer.strategy is {value!r}, {did_you_mean(name, STRATEGIES)}")
    return name
