"""What a runtime executes, and how a scheme is fitted to it."""

from dataclasses import replace

import pytest

from lightning_qat import KVSpec, QuantScheme, TensorSpec
from lightning_qat.formats import formats
from lightning_qat.runtime import CONVENTIONS, PARTS, Misfit, Rule, Runtime, changes, rule, runtimes
from lightning_qat.scheme import PRESETS, Override

TOKEN = rule(bits=(4, 8), granularity=("token",), divisor=("half_range",), code_range=("full",))
GROUP = rule(bits=(8,), granularity=("group",), group_size=(32,), divisor=("qmax",))
RUNTIME = Runtime(weight=(rule(bits=(4, 8), scale_dtype=("bfloat16", "float16")),), input=(TOKEN, GROUP))


@pytest.fixture
def registered(monkeypatch):
    runtimes.names()
    monkeypatch.setitem(runtimes._entries, "mine", RUNTIME)


def test_a_rule_names_every_field_that_does_not_fit():
    found = TOKEN.misfits(TensorSpec(bits=5, granularity="token"))
    assert {misfit.field for misfit in found} == {"bits", "divisor", "code_range"}
    assert str(found[0]) == "bits: got 5, executed is 4 or 8"
    assert Rule({}).misfits(TensorSpec(bits=5)) == []


def test_fitting_takes_the_first_value_and_keeps_what_fits():
    spec = TensorSpec(bits=8, granularity="token", round_via="reciprocal")
    assert TOKEN.fit(spec) == replace(spec, divisor="half_range", code_range="full")
    assert TOKEN.fit(TOKEN.fit(spec)) == TOKEN.fit(spec)
    kept = TensorSpec(bits=4, scale_dtype="float16")
    assert RUNTIME.weight[0].fit(kept) == kept


def test_the_nearest_rule_is_the_one_that_changes_the_least():
    token, group = TensorSpec(bits=8, granularity="token"), TensorSpec(bits=8, granularity="group", group_size=64)
    assert RUNTIME.nearest("input", token) == TOKEN
    assert RUNTIME.nearest("input", group) == GROUP
    assert RUNTIME.misfits("input", group) == [Misfit("group_size", 64, (32,))]
    assert RUNTIME.nearest("kv", KVSpec(bits=4)) is None
    assert RUNTIME.misfits("kv", KVSpec(bits=4)) == [Misfit("bits", 4, (None,))]


def test_parse_fits_conventions_everywhere(registered):
    written = QuantScheme(
        weight=TensorSpec(bits=4),
        input=TensorSpec(bits=8, granularity="token"),
        overrides=(Override(names=("down_proj",), weight=TensorSpec(bits=8), input=None),),
    )
    scheme = QuantScheme.parse(written, target="mine")
    assert scheme.weight.scale_dtype == scheme.overrides[0].weight.scale_dtype == "bfloat16"
    assert (scheme.input.divisor, scheme.input.code_range) == ("half_range", "full")
    assert scheme.overrides[0].input is None
    assert QuantScheme.parse(scheme, target="mine") == scheme
    assert QuantScheme.parse("w4a8", target="mine") == replace(scheme, overrides=())


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("w3", r"QuantScheme.weight.bits: got 3, executed is 4 or 8 by 'mine'; the nearest that fits: bits=4, scale_dtype='bfloat16'"),
        ("w4a8kv4", "QuantScheme.kv: 'mine' executes no quantized kv; leave kv out"),
        ("w4a6", "QuantScheme.input.bits: got 6"),
        (
            QuantScheme(weight=TensorSpec(bits=4), overrides=(Override(names=("x",), weight=TensorSpec(bits=2)),)),
            r"overrides\[0\].weight.bits",
        ),
    ],
)
def test_what_is_no_convention_is_refused_with_the_nearest_that_fits(registered, scheme, message):
    with pytest.raises(ValueError, match=message):
        QuantScheme.parse(scheme, target="mine")


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="target: got 'tensor-rt', expected one of"):
        QuantScheme.parse("w4", target="tensor-rt")


def test_changes_are_written_as_one_would():
    assert changes(TensorSpec(bits=4), TensorSpec(bits=4, divisor="half_range")) == "divisor='half_range'"


def test_every_runtime_is_a_format_with_rules_that_name_fields():
    assert set(runtimes.names()) <= set(formats.names())
    for name in runtimes.names():
        for part in PARTS:
            fields = (KVSpec if part == "kv" else TensorSpec).__dataclass_fields__
            for candidate in runtimes.get(name).rules(part):
                assert candidate.allowed.keys() <= fields.keys(), (name, part)
                assert all(isinstance(allowed, tuple) and allowed for allowed in candidate.allowed.values()), (name, part)
    assert set(CONVENTIONS) <= TensorSpec.__dataclass_fields__.keys()


@pytest.mark.parametrize("name", PRESETS.names())
def test_a_preset_is_plain_data(name):
    assert QuantScheme.parse(QuantScheme.parse(name).to_dict()) == PRESETS.get(name)


@pytest.mark.parametrize("name", runtimes.names())
def test_the_nearest_spec_can_be_built_whatever_was_trained(name):
    """Every preset, and every form of inputs: a rule that leaves a field out may name a spec that does not exist."""
    runtime = runtimes.get(name)
    schemes = [PRESETS.get(preset) for preset in PRESETS.names()]
    inputs = [scheme.input for scheme in schemes if scheme.input is not None]
    inputs += [replace(TensorSpec(bits=8, granularity="token"), symmetric=False, zero_point=zero) for zero in ("integer", "float")]
    inputs += [TensorSpec(bits=8, granularity="tensor", dynamic=False), TensorSpec(bits=8, granularity="token", code_range="unsigned")]
    weights = [scheme.weight for scheme in schemes if scheme.weight is not None] + [TensorSpec(bits=4, symmetric=False)]
    kv = [scheme.kv for scheme in schemes if scheme.kv is not None] + [KVSpec(bits=4, symmetric=False), KVSpec(bits=8)]
    for part, specs in (("weight", weights), ("input", inputs), ("kv", kv)):
        for spec in specs:
            nearest = runtime.nearest(part, spec)
            assert nearest is None or nearest.misfits(nearest.fit(spec)) == [], (part, spec)
