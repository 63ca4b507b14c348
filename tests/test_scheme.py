"""Schemes as data: strings, dictionaries, overrides, and every refusal by the name of what was wrong."""

import copy
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qat import KVSpec, QuantScheme, TensorSpec
from lightning_qat.scheme import DEFAULT_EXCLUDE, PRESETS, Override

W4, A8 = TensorSpec(bits=4), TensorSpec(bits=8, granularity="token")


@pytest.mark.parametrize(
    ("text", "weight", "input", "kv"),
    [
        ("w4", W4, None, None),
        ("w4a8", W4, A8, None),
        ("w4a8kv4", W4, A8, KVSpec(bits=4)),
        ("w4kv8", W4, None, KVSpec(bits=8)),
        ("w16a8", None, A8, None),
        ("w4a16kv4", W4, None, KVSpec(bits=4)),
        ("w4a8kv16", W4, A8, None),
        ("w16kv2", None, None, KVSpec(bits=2)),
        ("w3g128", TensorSpec(bits=3, granularity="group", group_size=128), None, None),
        ("w4g32a8kv4", TensorSpec(bits=4, granularity="group", group_size=32), A8, KVSpec(bits=4)),
        ("w1", TensorSpec(bits=1, quantizer="mean_abs"), None, None),
        ("w2a8", TensorSpec(bits=2, quantizer="mean_abs"), A8, None),
        ("w2g64", TensorSpec(bits=2, quantizer="mean_abs", granularity="group", group_size=64), None, None),
        ("w1.0", TensorSpec(bits=1, quantizer="mean_abs"), None, None),
        ("w4.0a8", W4, A8, None),
    ],
    ids=lambda v: v if isinstance(v, str) else "-",
)
def test_strings(text: str, weight: TensorSpec | None, input: TensorSpec | None, kv: KVSpec | None) -> None:
    scheme = QuantScheme.parse(text)
    assert (scheme.weight, scheme.input, scheme.kv) == (weight, input, kv)
    assert (scheme.include, scheme.exclude, scheme.overrides) == (("*",), DEFAULT_EXCLUDE, ())


def test_the_defaults_are_the_papers() -> None:
    scheme = QuantScheme.parse("w4a8kv4")
    for spec in (scheme.weight, scheme.input, scheme.kv.tensor):
        assert (spec.symmetric, spec.code_range, spec.divisor) == (True, "narrow", "qmax")
        assert (spec.scale_dtype, spec.round_via, spec.quantizer) == ("float32", "divide", "minmax")
    assert (scheme.kv.position, scheme.kv.granularity) == ("post_rope", "token_head")


@pytest.mark.parametrize(
    "text", ["", "w", "a8", "kv4", "w4a", "w4kv", "w4g", "4", "W4A8", "w4a8kv4 ", "w4kv4a8", "w-4", "w4g3.5", "wfour", "w4..5", "w."]
)
def test_other_strings_are_refused_with_the_notation(text: str) -> None:
    with pytest.raises(ValueError, match=r"scheme: got .*expected w<bits>\[g<size>\]\[a<bits>\]\[kv<bits>\]"):
        QuantScheme.parse(text)


def test_a_misspelt_preset_is_recognised() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'llm-qat'\?"):
        QuantScheme.parse("llmqat")


@pytest.mark.parametrize("text", ["w16", "w16a16", "w16a16kv16"])
def test_a_scheme_that_quantizes_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="nothing is quantized"):
        QuantScheme.parse(text)


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ("w0", "TensorSpec"),
        ("w9", "TensorSpec"),
        ("w32", "TensorSpec"),
        ("w4.5", "TensorSpec"),
        ("w4a15", "TensorSpec"),
        ("w4kv9", "KVSpec"),
    ],
)
def test_bits_out_of_range(text: str, owner: str) -> None:
    with pytest.raises(ValueError, match=rf"{owner}.bits: got .*, allowed are .* 8; 16 or null turns quantization off"):
        QuantScheme.parse(text)


@pytest.mark.parametrize("text", ["w4a1"])
def test_inputs_take_two_bits_or_more(text: str) -> None:
    with pytest.raises(ValueError, match=r"QuantScheme.input: got bits=1"):
        QuantScheme.parse(text)


@pytest.mark.parametrize("granularity", ["channel", "token_head"])
def test_inputs_do_not_mix_tokens(granularity: str) -> None:
    bad = TensorSpec(bits=8, granularity=granularity)
    with pytest.raises(ValueError, match=rf"QuantScheme.input: got bits=8, granularity='{granularity}'"):
        QuantScheme(input=bad)
    with pytest.raises(ValueError, match=r"QuantScheme.overrides\[1\].input"):
        QuantScheme(weight=W4, overrides=(Override(names=("a",), weight=None), Override(names=("b",), input=bad)))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (TensorSpec, {"bits": 1.58}),
        (KVSpec, {"bits": 4, "past_only": True}),
        (KVSpec, {"bits": 1.58}),
        (QuantScheme, {"weight": W4, "output": A8}),
        (QuantScheme, {"weight": W4, "attention": A8}),
        (QuantScheme, {"weight": W4, "salient": W4}),
    ],
    ids=lambda v: list(v.items())[-1][0] if isinstance(v, dict) else v.__name__,
)
def test_what_is_not_built_yet_is_refused_by_name(kind: type, fields: dict) -> None:
    name = list(fields)[-1]
    with pytest.raises(ValueError, match=rf"{kind.__name__}.{name}: .*(not implemented yet|no quantizer yet)"):
        kind(**fields)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"wieght": {"bits": 4}}, r"scheme: unknown key 'wieght'.*did you mean 'weight'\?"),
        ({"weight": {"bit": 4}}, r"weight: unknown key 'bit'.*did you mean 'bits'\?"),
        ({"input": {"bits": 8, "granularty": "token"}}, r"input: unknown key 'granularty'.*did you mean 'granularity'\?"),
        ({"kv": {"bits": 4, "positon": "pre_rope"}}, r"kv: unknown key 'positon'.*did you mean 'position'\?"),
        ({"weight": {"bits": 4}, "overrides": [{"nams": ["a"]}]}, r"overrides\[0\]: unknown key 'nams'.*did you mean 'names'\?"),
        ({"weight": {"bits": 4}, "overrides": [{"names": ["a"], "kv": {"bts": 4}}]}, r"overrides\[0\].kv: unknown key 'bts'"),
        ({"weight": {"bits": 4}, "include": "layers"}, r"QuantScheme.include: got 'layers', expected a list"),
        ({"weight": {"bits": 4}, "exclude": "lm_head"}, r"QuantScheme.exclude: got 'lm_head', expected a list"),
        ({"weight": {"bits": 4}, "overrides": [{"names": "a"}]}, r"Override.names: got 'a', expected a non-empty list"),
        ({"weight": {"bits": 4}, "overrides": [{"names": []}]}, r"Override.names: got \[\]"),
        ({"weight": "int4", "input": {"bits": 8, "granularity": "token"}}, r"weight.*'int4'"),
        ({"weight": "inherit", "input": {"bits": 8, "granularity": "token"}}, r"weight.*'inherit'"),
        ({"weight": {"bits": 4}, "overrides": [{"names": ["a"], "weight": "inhert"}]}, r"weight.*'inhert'"),
        ({"weight": 4}, r"weight.*4"),
    ],
    ids=["scheme", "weight", "input", "kv", "override", "override-kv", "include", "exclude", "names", "no-names", "weight-string",
         "weight-inherit", "override-string", "weight-number"],
)  # fmt: skip
def test_dictionaries_are_refused_by_key(data: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantScheme.parse(data)


def test_off_parts_are_no_parts() -> None:
    off = TensorSpec(bits=16)
    assert QuantScheme(weight=W4, input=off, kv=KVSpec(bits=None), output=off) == QuantScheme(weight=W4)
    assert Override(names=("a",), weight=off).weight is None
    assert QuantScheme.parse({"weight": {"bits": 4}, "input": {"bits": 16}}) == QuantScheme.parse("w4")
    assert off.is_off
    assert TensorSpec(bits=None).is_off
    assert not W4.is_off
    with pytest.raises(ValueError, match="this spec is off"):
        _ = off.code_bits


def test_overrides_alone_make_a_scheme() -> None:
    override = Override(names=["mlp.*"], weight=W4)
    assert override.names == ("mlp.*",)
    assert (override.input, override.kv) == ("inherit", "inherit")
    assert not QuantScheme(overrides=[override]).is_off
    with pytest.raises(ValueError, match="nothing is quantized"):
        QuantScheme(overrides=[Override(names=("a",), weight=None)])


def test_overrides_from_a_dictionary() -> None:
    scheme = QuantScheme.parse(
        {"weight": {"bits": 4}, "overrides": [{"names": ["first"], "weight": {"bits": 8}}, {"names": ["last"], "weight": None}]}
    )
    assert scheme.overrides == (Override(names=("first",), weight=TensorSpec(bits=8)), Override(names=("last",), weight=None))


options = st.none() | st.fixed_dictionaries({"ste": st.sampled_from(["identity", "clip"])}, optional={"clip_value": st.floats(0.5, 4)})
shared = {
    "symmetric": st.booleans(),
    "code_range": st.sampled_from(["narrow", "full", "unsigned"]),
    "divisor": st.sampled_from(["qmax", "half_range"]),
    "scale_dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
    "round_via": st.sampled_from(["divide", "reciprocal"]),
}


@st.composite
def tensor_specs(draw: st.DrawFn, granularities: tuple[str, ...], least: int = 1) -> TensorSpec:
    granularity = draw(st.sampled_from(granularities))
    fields = draw(st.fixed_dictionaries(shared))
    return TensorSpec(
        bits=draw(st.integers(least, 8)),
        granularity=granularity,
        group_size=draw(st.integers(1, 256)) if granularity == "group" else None,
        axis=draw(st.sampled_from([None, 0, -1, 2])) if granularity == "channel" else None,
        zero_point="integer" if fields["symmetric"] else draw(st.sampled_from(["integer", "float"])),
        dynamic=granularity != "tensor" or draw(st.booleans()),
        range_finder=draw(st.sampled_from(["absmax", "percentile", "mse", "lp"])),
        options=draw(options),
        **fields,
    )


weights = tensor_specs(("tensor", "channel", "group"))
inputs = tensor_specs(("tensor", "token", "group"), least=2)
caches = st.builds(
    KVSpec,
    bits=st.integers(2, 8),
    position=st.sampled_from(["pre_rope", "post_rope"]),
    granularity=st.sampled_from(["token", "token_head"]),
    **shared,
)
patterns = st.lists(st.text("abc.*", min_size=1, max_size=6), min_size=1, max_size=3)
inherit = st.sampled_from(["inherit", None])
overrides = st.builds(Override, names=patterns, weight=inherit | weights, input=inherit | inputs, kv=inherit | caches)
schemes = st.builds(
    QuantScheme,
    weight=weights,
    input=st.none() | inputs,
    kv=st.none() | caches,
    include=patterns,
    exclude=st.just(()) | patterns,
    overrides=st.lists(overrides, max_size=2),
)


@settings(deadline=None, max_examples=100)
@given(schemes)
def test_plain_data_round_trips(scheme: QuantScheme) -> None:
    data = scheme.to_dict()
    assert QuantScheme.parse(data) == scheme
    again = QuantScheme.parse(json.loads(json.dumps(data)))  # a manifest is JSON
    assert again == scheme
    assert hash(again) == hash(scheme)
    assert QuantScheme.parse(scheme) is scheme


@settings(deadline=None, max_examples=50)
@given(schemes)
def test_schemes_copy_and_pickle(scheme: QuantScheme) -> None:
    assert copy.deepcopy(scheme) == scheme
    assert pickle.loads(pickle.dumps(scheme)) == scheme


def test_equal_schemes_are_one_key() -> None:
    clip = {"ste": "clip", "clip_value": 2.0}
    one = QuantScheme(weight=TensorSpec(bits=4, options=clip))
    other = QuantScheme(weight=TensorSpec(bits=4.0, options=dict(reversed(clip.items()))))
    assert len({one, other, QuantScheme.parse("w4")}) == 2
    assert TensorSpec(bits=4, options={}) == W4


def test_the_preset_of_the_paper() -> None:
    scheme = QuantScheme.parse("llm-qat")
    assert (scheme.weight, scheme.input) == (W4, A8)
    assert scheme.kv == KVSpec(bits=4, position="pre_rope", granularity="token")
    for name in PRESETS.names():
        assert QuantScheme.parse(QuantScheme.parse(name).to_dict()) == PRESETS.get(name)
