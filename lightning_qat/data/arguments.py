"""What is refused before any work starts."""

from pathlib import Path
from typing import Any, get_args

from lightning_qat.data.datasets import LossOn
from lightning_qat.data.teachers import is_source
from lightning_qat.generation import CallableTeacher, GenerationSettings
from lightning_qat.registry import did_you_mean

MODES = ("store", "stream", "mix")
WITH_ROLES = ("chat", "prefix")  # generations that know who wrote a token
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_arguments(data: Any) -> None:
    """Refuse arguments that cannot work, alone or together.

    Raises:
        ValueError: Names the argument, what is expected, and the way out.
    """
    for field, allowed in (("mode", MODES), ("dtype", _DTYPES), ("loss_on", get_args(LossOn)), ("stream_worker", ("inline", "process"))):
        if (got := getattr(data, field)) not in allowed:
            raise ValueError(f"{field}: got {got!r}, {did_you_mean(got, allowed)}")
    if data.batch_size < 1:
        raise ValueError(f"batch_size: got {data.batch_size}, expected at least 1")
    if data.buffer < 1:
        raise ValueError(f"buffer: got {data.buffer}, expected at least 1")
    if data.num_samples is not None:
        check_split(data.num_samples, data.val_samples)
    _check_teacher(data)
    _check_text(data)
    if data.mode == "stream":
        _check_stream(data)


def check_split(count: int, val_samples: int | None) -> None:
    """Refuse a set of which nothing would be left for training."""
    if count < 1 or not 0 <= (val_samples or 0) < count:
        raise ValueError(f"num_samples: got {count} with val_samples={val_samples}; at least one must be left for training")


def _check_teacher(data: Any) -> None:
    teacher, generation, engine = data.teacher, data.settings.mode, data.engine
    if engine not in ("transformers", "vllm") and not engine.startswith(("http://", "https://")):
        raise ValueError(f"engine: got {engine!r}, expected 'transformers', 'vllm' or the address of a server, 'http://...'")
    if teacher is None:
        if not (data.folder / "store.json").is_file() and data.mode != "stream":
            raise ValueError(f"teacher: got None, but {str(data.folder)!r} holds no samples; name the teacher, or a store that is there")
        return
    for field in ("num_samples", *(() if is_source(teacher) else ("max_length",))):
        if getattr(data, field) is None:
            raise ValueError(f"{field}: got None, expected a number; only with teacher=None is it taken from the store")
    if is_source(teacher):
        return
    if data.loss_on == "assistant" and generation not in WITH_ROLES:
        raise ValueError(f"loss_on: got 'assistant' with generation={generation!r}, which has none; use 'chat', or loss_on='all'")
    if (data.prompts is None) == (generation == "prefix"):
        got = "no prompts" if data.prompts is None else f"{data.prompts!r}"
        raise ValueError(f"prompts: got {got} with generation={generation!r}; they belong to generation='prefix', and only there")
    if data.system is not None and generation != "chat":
        raise ValueError(f"system: got {data.system!r} with generation={generation!r}; a system message needs generation='chat'")
    if engine != "transformers" and (isinstance(teacher, CallableTeacher) or (engine == "vllm" and not isinstance(teacher, str))):
        raise ValueError(f"teacher: got a {type(teacher).__name__} with engine={engine!r}, expected the name of a model")


def _check_text(data: Any) -> None:
    if (data.text is None) == (data.mode == "mix"):
        got = "no text" if data.text is None else f"{data.text!r}"
        raise ValueError(f"text: got {got} with mode={data.mode!r}; real text to train on belongs to mode='mix', and only there")
    if not 0 < data.text_ratio < 1:
        raise ValueError(f"text_ratio: got {data.text_ratio}, expected more than 0 and less than 1; for no text use mode='store'")
    if data.text is not None and data.validation is not None:
        same = data.text == data.validation or (Path(data.text).is_file() and Path(data.text).resolve() == Path(data.validation).resolve())
        if same:
            raise ValueError(f"text: got {data.text!r}, which is the `validation` text too; train on other text than is validated on")


def _check_stream(data: Any) -> None:
    if data.teacher is None:
        raise ValueError("mode: got 'stream' with teacher=None, but somebody must write the samples; name the teacher, or use mode='store'")
    if data.filters is not None:
        raise ValueError("filters: got some with mode='stream', which trains on every sample that is written; use mode='store'")
    if data.packing:
        raise ValueError("packing: got True with mode='stream', where the lengths are not known in advance; use mode='store'")
    if data.num_workers > 0:
        raise ValueError(f"num_workers: got {data.num_workers} with mode='stream'; use num_workers=0 and stream_worker='process'")


def check_agreement(data: Any, identity: dict[str, Any], where: str) -> None:
    """Refuse settings that were given and are not those of samples that are there; what is left at its default agrees with everything.

    Args:
        data: Its settings.
        identity: What the samples depend on, as far as it says.
        where: Whose they are, with a verb.

    Raises:
        ValueError: Names the first setting.
    """
    names, default = {"mode": "generation", "logits": "teacher_logits"}, GenerationSettings(max_length=2).to_dict()
    given = {field: value for field, value in data.settings.to_dict().items() if value != default[field]}
    given |= {"max_length": data.max_length, "rows": data.rows}
    for field, value in given.items():
        if field != "seed" and value not in (None, identity.get(field, value)):  # the seed is that of the training order too
            raise ValueError(f"{names.get(field, field)}: got {value!r}, {where} {identity[field]!r}; leave it out, or take another one")
    if identity.get("max_length", data.max_length) is None:
        raise ValueError(f"max_length: got None, {where} none; pass it")
    if data.loss_on == "assistant" and identity.get("mode") not in WITH_ROLES:
        raise ValueError(f"loss_on: got 'assistant', {where} generation={identity.get('mode')!r}, where nobody is told apart; use 'all'")
