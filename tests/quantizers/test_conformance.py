"""What every registered quantizer keeps, unasked: a new file in `lightning_qat/quantizers` is tested here without a new line."""

import copy
import dataclasses
import io
import itertools
import pickle
import re

import pytest
import torch
from torch import Tensor

from lightning_qat import TensorSpec
from lightning_qat.quantizers import Quantizer, build_quantizer, quantizers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = ({"granularity": "channel"}, {"granularity": "tensor"}, {"granularity": "group", "group_size": 4}, {"axis": 0})
ZEROS = ({}, {"symmetric": False}, {"symmetric": False, "zero_point": "float"}, {"code_range": "unsigned"})


def sort_out(name: str) -> tuple[list[TensorSpec], list[str]]:
    """The specs a quantizer takes, and what it says about the others."""
    taken, refusals = [], []
    for bits, zero, blocks in itertools.product(range(1, 9), ZEROS, BLOCKS):
        spec = TensorSpec(bits=bits, quantizer=name, **zero, **blocks)
        try:
            build_quantizer(spec)
            taken.append(spec)
        except ValueError as error:
            refusals.append(str(error))
    return taken, refusals


SORTED = {name: sort_out(name) for name in quantizers.names()}
SPECS = {name: taken for name, (taken, _) in SORTED.items()}
every_quantizer = pytest.mark.parametrize("name", SPECS)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [0.3], [1.0], [4.0], [50.0], [0.0]])
    return x.to(dtype)


def blocks_of(x: Tensor, spec: TensorSpec) -> Tensor:
    return {"tensor": x.reshape(1, -1), "group": x.reshape(-1, spec.group_size or 1)}.get(spec.granularity, x)


def test_the_registry_finds_what_the_package_holds() -> None:
    assert {"minmax", "mean_abs"} <= set(SPECS)
    assert all(SPECS.values())
    assert all(issubclass(quantizers.get(name), Quantizer) for name in SPECS)


@every_quantizer
def test_what_is_refused_is_refused_by_the_name_of_the_field(name: str) -> None:
    for message in SORTED[name][1]:
        assert re.match(r"TensorSpec\.(bits|symmetric|code_range|zero_point): got", message)


@every_quantizer
def test_a_scale_expresses_no_more_values_than_its_bits(name: str) -> None:
    for spec in SPECS[name]:
        quantizer = build_quantizer(spec)
        assert 2 <= quantizer.grid.levels <= 2**spec.bits, spec
        for block in blocks_of(quantizer(rows()), spec):
            assert block.unique().numel() <= 2**spec.bits, spec
        codes = quantizer.codes(rows()).codes
        assert quantizer.grid.qmin <= int(codes.min()) <= int(codes.max()) <= quantizer.grid.qmax, spec


@every_quantizer
def test_forward_is_the_values_of_the_codes(name: str) -> None:
    for spec, dtype in itertools.product(SPECS[name], DTYPES):
        quantizer, x = build_quantizer(spec), rows(dtype)
        y, quantized = quantizer(x), quantizer.codes(x)
        assert torch.equal(quantized.dequantize(), y), (spec, dtype)
        assert (y.dtype, y.shape) == (dtype, x.shape), (spec, dtype)
        assert quantized.codes.dtype in (torch.int8, torch.uint8)
        assert quantized.scale.dtype == torch.float32
        assert not quantized.scale.requires_grad
        assert (quantized.zero_point is None) == spec.symmetric


@every_quantizer
def test_the_gradient_is_straight_through(name: str) -> None:
    for spec in SPECS[name]:
        quantizer, x = build_quantizer(spec), rows().requires_grad_()
        upstream = torch.randn(6, 300)
        quantizer(x).backward(upstream)
        assert quantizer.how.ste == "identity", spec
        assert torch.equal(x.grad, upstream), spec


@every_quantizer
def test_zeros_give_zeros_and_a_bad_row_stays_alone(name: str) -> None:
    for spec in SPECS[name]:
        if spec.granularity == "tensor":
            continue
        quantizer, x = build_quantizer(spec), rows()
        x[5] = 0
        expected = quantizer(x)
        assert expected[5].count_nonzero() == 0, spec
        x[3, 7] = float("nan")
        y = quantizer(x)
        assert y[3].isnan().sum() == (spec.group_size or 300), spec
        assert torch.equal(y[[0, 1, 2, 4, 5]], expected[[0, 1, 2, 4, 5]]), spec
        with pytest.raises(ValueError, match="NaN or inf"):
            quantizer.codes(x)


@every_quantizer
def test_a_disabled_quantizer_and_an_empty_tensor_pass_through(name: str) -> None:
    quantizer, x = build_quantizer(SPECS[name][0]), rows()
    empty = torch.empty(0, 4)
    assert quantizer(empty).shape == (0, 4)
    quantizer.enabled = False
    assert quantizer(x) is x


@every_quantizer
def test_state_round_trips_and_has_no_zero_dimensional_parameter(name: str) -> None:
    for spec in SPECS[name]:
        quantizer, x = build_quantizer(spec), rows()
        expected = quantizer(x)
        assert all(p.ndim >= 1 and p.dtype == torch.float32 for p in quantizer.parameters()), spec
        assert all(t.ndim >= 1 for t in quantizer.state_dict().values()), spec
        file = io.BytesIO()
        torch.save(quantizer.state_dict(), file)
        file.seek(0)
        fresh = build_quantizer(spec)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(fresh(x), expected), spec


def with_options(name: str) -> TensorSpec:
    """Every option given, at its default."""
    cls = quantizers.get(name).Options
    options = {} if cls is None else dataclasses.asdict(cls())
    return dataclasses.replace(SPECS[name][0], options=options)


@every_quantizer
def test_copies_and_pickles(name: str) -> None:
    x = rows()
    for spec in (SPECS[name][0], with_options(name)):
        quantizer = build_quantizer(spec)
        for copied in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
            assert copied.spec == spec
            assert torch.equal(copied(x), quantizer(x))


@every_quantizer
def test_unknown_options_are_refused_by_name(name: str) -> None:
    known = [] if quantizers.get(name).Options is None else [f.name for f in dataclasses.fields(quantizers.get(name).Options)]
    for key in known or ["nothing"]:
        spec = dataclasses.replace(SPECS[name][0], options={key + "x": 1})
        with pytest.raises(ValueError, match=f"quantizer {name!r}: unknown key {key + 'x'!r}") as caught:
            build_quantizer(spec)
        assert (f"did you mean {key!r}?" in str(caught.value)) == bool(known)


@every_quantizer
def test_the_representation_names_what_is_not_default(name: str) -> None:
    spec = dataclasses.replace(SPECS[name][0], scale_dtype="float16")
    text = repr(build_quantizer(spec))
    assert f"{spec.bits} bits, channel" in text
    assert "scale_dtype=float16" in text


def test_an_unknown_quantizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"TensorSpec.quantizer: got 'minmx'.*did you mean 'minmax'\?"):
        build_quantizer(TensorSpec(bits=4, quantizer="minmx"))


def test_an_unknown_value_of_an_option_is_refused() -> None:
    with pytest.raises(ValueError, match=r"options.ste: got 'clipp'.*did you mean 'clip'\?"):
        build_quantizer(TensorSpec(bits=4, options={"ste": "clipp"}))


@pytest.mark.parametrize("bits", [3, 8])
def test_mean_abs_has_one_and_two_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"TensorSpec.bits: got {bits} with quantizer 'mean_abs'.*'minmax'"):
        build_quantizer(TensorSpec(bits=bits, quantizer="mean_abs"))


@pytest.mark.parametrize("base", [{"quantizer": "mean_abs", "bits": 2}, {"symmetric": False, "bits": 4}], ids=["mean_abs", "asymmetric"])
def test_a_divisor_is_used_or_refused(base: dict) -> None:
    """What a field asks for changes what comes out, or is refused by name; it is never ignored."""
    try:
        y = build_quantizer(TensorSpec(**base, divisor="half_range"))(rows())
    except ValueError as error:
        message = str(error)
    else:
        message = "ignored" if torch.equal(y, build_quantizer(TensorSpec(**base))(rows())) else "divisor changes the values"
    assert "divisor" in message
