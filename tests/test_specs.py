"""Specs of one tensor as data: refusals by the name of the field, options, frozenness, stored sizes."""

import dataclasses
from typing import Any

import pytest

from lightning_qat import KVSpec, QuantScheme, TensorSpec

W4 = TensorSpec(bits=4)


@pytest.mark.parametrize("bits", [-1, 0.5, 17, "4", float("nan"), float("inf")], ids=repr)
def test_bits_of_a_spec(bits: Any) -> None:
    for kind in (TensorSpec, KVSpec):
        with pytest.raises(ValueError, match=f"{kind.__name__}.bits: got {bits!r}"):
            kind(bits=bits)


def test_keys_and_values_take_two_bits_or_more() -> None:
    with pytest.raises(ValueError, match=r"bits: got 1"):
        KVSpec(bits=1)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (TensorSpec, {"granularity": "chanel"}, r"TensorSpec.granularity: got 'chanel'.*did you mean 'channel'\?"),
        (TensorSpec, {"code_range": "ful"}, r"TensorSpec.code_range: got 'ful'.*did you mean 'full'\?"),
        (TensorSpec, {"divisor": "qmx"}, r"TensorSpec.divisor: .*did you mean 'qmax'\?"),
        (TensorSpec, {"scale_dtype": "bfloat"}, r"TensorSpec.scale_dtype: .*did you mean 'bfloat16'\?"),
        (TensorSpec, {"round_via": "divid"}, r"TensorSpec.round_via: .*did you mean 'divide'\?"),
        (TensorSpec, {"arithmetic": "imput"}, r"TensorSpec.arithmetic: .*did you mean 'input'\?"),
        (TensorSpec, {"arithmetic": "input", "symmetric": False}, r"TensorSpec.arithmetic: got 'input' with symmetric=False"),
        (KVSpec, {"arithmetic": "input", "symmetric": False}, r"arithmetic: got 'input' with symmetric=False"),
        (TensorSpec, {"range_finder": "absmx"}, r"TensorSpec.range_finder: .*did you mean 'absmax'\?"),
        (KVSpec, {"position": "pre-rope"}, r"KVSpec.position: .*did you mean 'pre_rope'\?"),
        (KVSpec, {"granularity": "token_heads"}, r"KVSpec.granularity: .*did you mean 'token_head'\?"),
        (KVSpec, {"granularity": "channel"}, r"KVSpec.granularity: got 'channel'"),
        (KVSpec, {"divisor": "qmx"}, r"divisor: .*did you mean 'qmax'\?"),
        (TensorSpec, {"granularity": "group"}, r"TensorSpec.group_size: got None with granularity='group'"),
        (TensorSpec, {"group_size": 8}, r"TensorSpec.group_size: got 8 with granularity='channel'"),
        (TensorSpec, {"granularity": "group", "group_size": 0}, r"TensorSpec.group_size: got 0"),
        (TensorSpec, {"granularity": "group", "group_size": 2.5}, r"TensorSpec.group_size: got 2.5"),
        (TensorSpec, {"zero_point": "flaot", "symmetric": False}, r"TensorSpec.zero_point: got 'flaot'.*did you mean 'float'\?"),
        (TensorSpec, {"zero_point": "float"}, r"TensorSpec.zero_point: got 'float' with symmetric=True"),
        (KVSpec, {"zero_point": "float"}, r"zero_point: got 'float' with symmetric=True"),
        (TensorSpec, {"code_range": "unsinged"}, r"TensorSpec.code_range: .*did you mean 'unsigned'\?"),
        (TensorSpec, {"axis": 1, "granularity": "token"}, r"TensorSpec.axis: got 1 with granularity='token'"),
        (TensorSpec, {"axis": 0.5}, r"TensorSpec.axis: got 0.5"),
        (TensorSpec, {"dynamic": False}, r"TensorSpec.dynamic: got False with granularity='channel'"),
        (TensorSpec, {"dynamic": False, "granularity": "token"}, r"TensorSpec.dynamic: got False with granularity='token'"),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_fields_are_refused_by_name(kind: type, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(bits=4, **fields)


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o.__setitem__("ste", "identity"),
        lambda o: o.update(ste="identity"),
        lambda o: o.setdefault("clip_value", 1.0),
        lambda o: o.pop("ste"),
        lambda o: o.popitem(),
        lambda o: o.clear(),
        lambda o: o.__delitem__("ste"),
        lambda o: o.__ior__({"ste": "identity"}),
    ],
    ids=["set", "update", "setdefault", "pop", "popitem", "clear", "del", "ior"],
)
def test_options_cannot_change(change: Any) -> None:
    """A spec is a key of dictionaries and sets; its hash must not move."""
    given_options = {"ste": "clip"}
    spec = TensorSpec(bits=4, options=given_options)
    given_options["ste"] = "identity"
    assert spec.options == {"ste": "clip"}
    with pytest.raises((TypeError, AttributeError)):
        change(spec.options)


def test_specs_are_frozen() -> None:
    for value, field in ((W4, "bits"), (KVSpec(bits=4), "bits"), (QuantScheme.parse("w4"), "weight")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 8)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (W4, 10 * 64 * 4 + 10 * 32),
        (TensorSpec(bits=8, granularity="tensor"), 10 * 64 * 8 + 32),
        (TensorSpec(bits=4, granularity="group", group_size=32, scale_dtype="float16"), 10 * 64 * 4 + 20 * 16),
        (TensorSpec(bits=3, granularity="group", group_size=16, symmetric=False), 10 * 64 * 3 + 40 * (32 + 3)),
        (TensorSpec(bits=4, symmetric=False, scale_dtype="bfloat16"), 10 * 64 * 4 + 10 * (16 + 4)),
        (TensorSpec(bits=1, quantizer="mean_abs"), 10 * 64 + 10 * 32),
        (TensorSpec(bits=4, symmetric=False, zero_point="float", scale_dtype="float16"), 10 * 64 * 4 + 10 * (16 + 16)),
        (TensorSpec(bits=4, symmetric=False, granularity="tensor", zero_point="float"), 10 * 64 * 4 + 32 + 32),
        (TensorSpec(bits=8, granularity="token"), 10 * 64 * 8 + 10 * 32),
    ],
    ids=["channel", "tensor", "group", "group-asymmetric", "channel-asymmetric", "binary", "float-zero", "tensor-float-zero", "token"],
)
def test_storage_counts_codes_scales_and_zero_points(spec: TensorSpec, bits: int) -> None:
    assert spec.storage_bits(10, 64) == bits


def test_a_kv_spec_is_a_tensor_spec() -> None:
    kv = KVSpec(bits=3, granularity="token", symmetric=False, scale_dtype="float16", round_via="reciprocal")
    assert kv.tensor == TensorSpec(bits=3, granularity="token", symmetric=False, scale_dtype="float16", round_via="reciprocal")


def test_a_kv_spec_takes_its_arithmetic_along() -> None:
    assert KVSpec(bits=4, arithmetic="input", code_range="full").tensor == TensorSpec(
        bits=4, granularity="token_head", arithmetic="input", code_range="full"
    )


def test_a_kv_spec_has_float_zero_points_too() -> None:
    kv = KVSpec(bits=4, granularity="token", symmetric=False, zero_point="float")
    assert kv.tensor == TensorSpec(bits=4, granularity="token", symmetric=False, zero_point="float")
