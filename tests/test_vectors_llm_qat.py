"""Numeric vectors of LLM-QAT's reference code: the oracle gives the printed numbers, ours gives the grid without epsilons.

Where the two differ the test says by how much and why. Printed numbers carry about seven digits, hence the relative tolerance.
"""

import pytest
import reference
import torch
from torch import Tensor, nn

from lightning_qat import QuantScheme, TensorSpec, fake_quantize, insert_quantizers, quantize_tensor

X = [0.9, -0.35, 0.1, -1.4]
CLIP = {"ste": "clip"}


def close(actual: Tensor, expected: object, rtol: float = 2e-6, atol: float = 2e-7) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol, equal_nan=True)


def spec(bits: float, symmetric: bool = True, **kwargs: object) -> TensorSpec:
    return TensorSpec(bits=bits, symmetric=symmetric, **kwargs)


def codes(x: object, s: TensorSpec) -> list:
    return quantize_tensor(torch.as_tensor(x), s).codes.tolist()


def gradient(x: object, s: TensorSpec) -> list:
    leaf = torch.tensor(x, requires_grad=True)
    fake_quantize(leaf, s).sum().backward()
    return leaf.grad.tolist()


def test_v1_symmetric() -> None:
    x = torch.tensor(X)
    ref_codes, ref = reference.sym(x, 4)
    close(ref, [0.80000037, -0.40000018, 0, -1.4000007])
    assert ref_codes.tolist() == codes(x, spec(4)) == [4, -2, 0, -7]
    ours = fake_quantize(x, spec(4))
    close(ours, [0.8, -0.4, 0.0, -1.4], rtol=1e-7)
    assert gradient(X, spec(4)) == [1, 1, 1, 1]
    # The reference drifts when it is applied again, because of its epsilons; ours stays.
    close(reference.sym(ref, 4)[1], [0.80000079, -0.40000039, 0, -1.4000013], rtol=1e-7)
    assert not torch.equal(reference.sym(ref, 4)[1], ref)
    assert torch.equal(fake_quantize(ours, spec(4)), ours)


def test_v2_asymmetric_differs_by_the_rounded_zero_point() -> None:
    x = torch.tensor(X)
    ref_codes, ref = reference.asym(x, 4)
    close(ref, [0.9, -0.32666671, 0.13333333, -1.4])
    assert ref_codes.tolist() == codes(x, spec(4, False)) == [15, 7, 10, 0]
    # Our zero point is an integer: 9 steps of 2.3 / 15 are 1.38 and not 1.4, so the whole grid sits 0.02 higher.
    close(fake_quantize(x, spec(4, False)) - ref, [0.02] * 4, atol=1e-6)
    assert gradient(X, spec(4, False)) == [1, 1, 1, 1]


def test_v3_gradient_mask() -> None:
    values = [2.5, -2.0, 0.5, 1.99, -3.0]
    x, ones = torch.tensor(values), torch.ones(5)
    ref_codes, ref = reference.sym(x, 8)
    close(ref, [2.5039377, -2.0078747, 0.49606314, 1.9842526, -3.000001])
    assert ref_codes.tolist() == codes(x, spec(8)) == [106, -85, 21, 84, -127]
    close(fake_quantize(x, spec(8)), ref, rtol=1e-6)  # the epsilons are worth 3.3e-7 of the largest value
    asym_codes, asym = reference.asym(x, 8)
    close(asym, [2.5, -2.007843, 0.49411774, 1.9823532, -3.0])
    assert asym_codes.tolist() == codes(x, spec(8, False)) == [255, 46, 162, 231, 0]
    # 3.0 is 139.09 steps of 5.5 / 255: the integer zero point 139 moves the grid up by 0.09 steps.
    close(fake_quantize(x, spec(8, False)) - asym, [3.0 - 139 * 5.5 / 255] * 5, atol=1e-6)
    assert reference.clipped_gradient(x, ones).tolist() == [0, 0, 1, 1, 0]
    for symmetric in (True, False):
        assert gradient(values, spec(8, symmetric, options=CLIP)) == [0, 0, 1, 1, 0]
        assert gradient(values, spec(8, symmetric)) == [1, 1, 1, 1, 1]  # the paper's quantizer clips nothing


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_v4_zeros(symmetric: bool) -> None:
    oracle = reference.sym if symmetric else reference.asym
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.zeros(3, dtype=dtype)
        assert fake_quantize(x, spec(4, symmetric)).tolist() == [0, 0, 0]
        # In half precision the reference's epsilons vanish or blow its scale up.
        assert bool(oracle(x, 4)[1].isnan().all()) == (dtype == torch.float16)
    assert gradient([0.0, 0.0, 0.0], spec(4, symmetric)) == [1, 1, 1]


def test_v5_constant() -> None:
    x = torch.full((3,), 5.0)
    close(reference.sym(x, 4)[1], [4.9999976] * 3)
    close(reference.asym(x, 4)[1], [5.0] * 3)
    assert reference.asym(x.half(), 4)[1].isnan().all()
    assert reference.clipped_gradient(x, torch.ones(3)).tolist() == [0, 0, 0]
    assert codes(x, spec(4)) == [7, 7, 7]
    assert codes(x, spec(4, False)) == [15, 15, 15]  # the reference's code is 0: it puts the offset at 5, ours keeps 0 in the range
    for s in (spec(4), spec(4, False)):
        close(fake_quantize(x, s), [5.0] * 3, rtol=1.2e-7)  # one ulp
        assert fake_quantize(x.half(), s).tolist() == [5, 5, 5]
        assert gradient([5.0] * 3, s) == [1, 1, 1]


def test_v6_single_element() -> None:
    for value, bits, code, printed in ((0.3, 4, 7, 0.300001), (-0.3, 8, -127, -0.300001)):
        ref_codes, ref = reference.sym(torch.tensor([value]), bits)
        close(ref, [printed])
        assert ref_codes.tolist() == codes([value], spec(bits)) == [code]
        close(fake_quantize(torch.tensor([value]), spec(bits)), [value], rtol=1.2e-7)
    ref_codes, ref = reference.asym(torch.tensor([0.3]), 4)
    close(ref, [0.3])
    assert ref_codes.tolist() == [0]
    assert codes([0.3], spec(4, False)) == [15]  # 0 belongs to our range, so 0.3 is its upper end
    close(fake_quantize(torch.tensor([0.3]), spec(4, False)), [0.3], rtol=1.2e-7)


def test_v7_negative_only() -> None:
    x = torch.tensor([-0.1, -0.2, -0.4])
    ref_codes, ref = reference.sym(x, 4)
    close(ref, [-0.114286, -0.17142901, -0.40000099])
    assert ref_codes.tolist() == [-2, -3, -7]
    assert codes(x, spec(4)) == [-2, -4, -7]  # -3.5 steps exactly: half to even; the reference's epsilon breaks the tie inwards
    ref_codes, ref = reference.asym(x, 4)
    close(ref, [-0.1, -0.2, -0.4])
    assert ref_codes.tolist() == [15, 10, 0]
    # The reference's range is [-0.4, -0.1]; ours holds 0, so a step is 0.4 / 15 and not 0.3 / 15, and 0 is code 15.
    ours = quantize_tensor(x, spec(4, False))
    assert (ours.zero_point.item(), ours.codes.tolist()) == (15, [11, 7, 0])
    close(ours.dequantize(), [-4 * 0.4 / 15, -8 * 0.4 / 15, -0.4])


def test_v8_ties() -> None:
    values = [7, 0.5, 1.5, 2.5, -0.5, -1.5, 3.5]
    x = torch.tensor(values)
    assert reference.sym(x, 4)[0].tolist() == [7, 0, 1, 2, 0, -1, 3]  # its scale is 0.9999999, so no tie is one
    assert codes(x, spec(4)) == fake_quantize(x, spec(4)).tolist() == [7, 0, 2, 2, 0, -2, 4]
    assert reference.clipped_gradient(x, torch.ones(7)).tolist() == gradient(values, spec(4, options=CLIP)) == [0, 1, 1, 0, 1, 1, 0]
    positive = torch.tensor([0, 0.5, 1.5, 2.5, 3])
    assert reference.asym(positive, 2)[0].tolist() == codes(positive, spec(2, False)) == [0, 0, 2, 2, 3]
    close(reference.asym(positive, 2)[1], [0.0, 0, 2, 2, 3])
    assert fake_quantize(positive, spec(2, False)).tolist() == [0, 0, 2, 2, 3]


LOW = torch.tensor([1, -0.4, 0.6, 0.1])


@pytest.mark.parametrize(("bits", "expected"), [(2, [1, 0, 1, 0]), (3, [1.0000006, -0.33333355, 0.6666671, 0])], ids=["2", "3"])
def test_v9_few_bits_symmetric(bits: int, expected: list) -> None:
    ref_codes, ref = reference.sym(LOW, bits)
    close(ref, expected)
    assert ref_codes.tolist() == codes(LOW, spec(bits))
    close(fake_quantize(LOW, spec(bits)), ref, rtol=2e-6)


@pytest.mark.parametrize(
    ("bits", "expected", "ours"),
    [
        (1, [1, -0.4, 1, -0.4], [1.4, 0, 0, 0]),  # two levels a whole range apart, and one of ours must be 0
        (2, [1, -0.4, 0.5333333, 0.0666667], [0.9333333, -0.4666667, 0.4666667, 0]),  # the same codes, 1/7 of a step lower
        (3, [1, -0.4, 0.6, 0], [1, -0.4, 0.6, 0]),  # -0.4 is two whole steps: no difference
    ],
    ids=["1", "2", "3"],
)
def test_v9_few_bits_asymmetric(bits: int, expected: list, ours: list) -> None:
    close(reference.asym(LOW, bits)[1], expected)
    close(fake_quantize(LOW, spec(bits, False)), ours)


def test_v9_one_symmetric_bit_destroys_the_signal_and_is_refused() -> None:
    assert reference.sym(LOW, 1)[1].abs().tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="mean_abs"):
        fake_quantize(LOW, spec(1))


def test_v10_sixteen_bits() -> None:
    ref_codes, ref = reference.sym(LOW, 16)
    close(ref, [1.000001, -0.40000647, 0.59999448, 0.10000925])
    assert ref_codes.tolist() == [32767, -13107, 19660, 3277]
    close(reference.asym(LOW, 16)[1], [1, -0.4, 0.6000061, 0.09999237])
    close(reference.sym(LOW, 31)[1], LOW, rtol=2e-6)
    assert fake_quantize(LOW, spec(16)) is LOW  # 16 is the paper's word for off; the reference quantizes
    with pytest.raises(ValueError, match=r"bits: got 31, allowed are 1 to 8"):
        spec(31)


def test_v10_bfloat16() -> None:
    x = LOW.bfloat16()
    assert reference.sym(x, 4)[1].tolist() == [1, -0.427734375, 0.5703125, 0.142578125]  # the scale itself has 8 bits
    ours = fake_quantize(x, spec(4))
    assert ours.tolist() == torch.tensor([1, -3 / 7, 4 / 7, 1 / 7]).bfloat16().tolist()  # ours rounds once, at the end
    wide = torch.tensor([1.34375, -1.34375], dtype=torch.bfloat16)
    assert reference.sym(wide, 8)[0].tolist() == [128, -128]  # s = 95, 127.65 rounds to 127.5: no int8
    assert codes(wide, spec(8)) == [127, -127]
    many = (torch.rand(4000, 1) * 4).bfloat16()
    for bits, share in ((8, 0.24), (16, 0.88)):
        assert (reference.sym(many, bits)[0].float() > 2 ** (bits - 1) - 1).float().mean().item() == pytest.approx(share, abs=0.04)
    assert set(quantize_tensor(many, spec(8)).codes.flatten().tolist()) == {127}


@pytest.mark.parametrize(("bits", "limit"), [(4, 1.07e-4), (8, 1.94e-3)], ids=["4", "8"])
def test_v10_float16_overflow_of_the_scale(bits: int, limit: float) -> None:
    small, large = (torch.tensor([limit * factor], dtype=torch.float16) for factor in (0.95, 1.05))
    assert reference.sym(small, bits)[1].isnan().all()
    assert reference.sym(large, bits)[1].isfinite().all()
    assert torch.equal(fake_quantize(small, spec(bits)), small)


def test_v11_bias_of_the_epsilons_and_non_finite_values() -> None:
    m = torch.tensor([[1e-3], [1e-4], [1e-6], [1e-7]])
    close(reference.sym(m, 8)[1] / m, [[1.0010], [1.0020], [1.0079], [1.039]], rtol=1e-3)
    close(fake_quantize(m, spec(8)), m, rtol=1.2e-7)
    nan, inf = float("nan"), float("inf")
    bad = torch.tensor([[1, nan, 2], [1, inf, 2], [0.6, -0.9, 2]])
    ref = reference.sym(bad, 4)[1]
    close(ref[:2], [[nan, nan, nan], [0, nan, 0]])  # the 1 and the 2 beside inf became a wrong finite number
    ours = fake_quantize(bad, spec(4))
    assert ours[:2].isnan().all()
    close(ours[2], [2 * 2 / 7, 2 * -3 / 7, 2])  # the row beside them knows nothing of it


def test_v12_zero_is_a_level() -> None:
    x = torch.tensor([-0.3, 0.0, 1.0])
    close(reference.asym(x, 4)[1], [-0.3, -0.04000002, 1.0])
    # A step is 1.3 / 15; -0.3 is 3.46 steps and 1.0 is 11.54, so the integer zero point 3 moves both ends.
    close(fake_quantize(x, spec(4, False)), [-3 * 1.3 / 15, 0.0, 12 * 1.3 / 15])


def rope(k: Tensor, position: int) -> Tensor:
    """Rotary embedding of one head, half-split rotation, base 10000."""
    half = k.shape[-1] // 2
    angle = position * 10000.0 ** (-torch.arange(half) / half)
    a, b = k[..., :half], k[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def test_v13_quantizing_does_not_commute_with_rope() -> None:
    k = torch.tensor(X)
    close(rope(k, 1), [0.402125, -0.335983, 0.811354, -1.40343], atol=1e-6)
    before, after = [0.432242, -0.38598, 0.673177, -1.403931], [0.40098, -0.40098, 0.80196, -1.403431]
    close(rope(reference.sym(k, 4)[1], 1), before, atol=1e-6)
    close(reference.sym(rope(k, 1), 4)[1], after, atol=1e-6)
    for granularity in ("token", "token_head"):
        s = spec(4, granularity=granularity)
        close(rope(fake_quantize(k, s), 1), before, atol=1.2e-6)  # the two epsilons are worth 7e-7 here
        close(fake_quantize(rope(k, 1), s), after, atol=1.2e-6)


def test_v14_small_updates_need_float32_weights() -> None:
    values = [0.1, 0.05, 0.02, 0.01, 0.0079, 0.0077, 0.005, 0.001]
    w = torch.tensor(values, dtype=torch.bfloat16)
    assert (w - 2e-5 == w).tolist() == [True] * 5 + [False] * 3
    close((w - 2e-5)[5:].float(), [0.0076599, 0.0049744, 0.0009766], rtol=1e-4)
    # Ours: the trained weight stays the float32 parameter it was, also under autocast, so no update of this size is lost.
    layer = nn.Linear(len(values), 1, bias=False)
    layer.weight.data = torch.tensor([values])
    model = nn.Sequential(layer)
    insert_quantizers(model, "w4a8")
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(1, len(values))).sum().backward()
    optimizer.step()
    close(torch.tensor(values) - layer.weight.data[0], [2e-5] * len(values), rtol=1e-3)


W = [[0.5, -0.1, 0.3, -0.7], [2.5, -0.2, 0, 0.1]]


def test_v15_one_bit() -> None:
    w = torch.tensor(W)
    ref = reference.binary(w)
    close(ref, [[0.4, -0.4, 0.4, -0.4], [0.7, -0.7, 0, 0.7]])
    ours = fake_quantize(w, spec(1, quantizer="mean_abs"))
    close(ours[w != 0], ref[w != 0], rtol=5e-7)
    close(ours[1, 2], 0.7)  # a weight of exactly 0 takes +m: a third level would not fit into one bit
    assert gradient(W, spec(1, quantizer="mean_abs")) == torch.ones(2, 4).tolist()


def test_v15_two_bits() -> None:
    w = torch.tensor(W)
    close(reference.few_levels(w), [[0.6, -0.2, 0.2, -0.6], [1.05, -0.35, 0.35, 0.35]])
    many = torch.cat([w.tile(1, 6), torch.randn(500, 24)])
    # Levels are the same; the mean may differ in its last bit, by the order of its sum.
    close(fake_quantize(many, spec(2, quantizer="mean_abs")), reference.few_levels(many), rtol=5e-7)
    nonzero = many != 0
    close(fake_quantize(many, spec(1, quantizer="mean_abs"))[nonzero], reference.binary(many)[nonzero], rtol=5e-7)
    assert gradient(W, spec(2, quantizer="mean_abs")) == torch.ones(2, 4).tolist()


def test_v15_four_bits_and_bits_that_are_none() -> None:
    w = torch.tensor(W)
    close(reference.sym(w, 4)[1], [[0.50000066, -0.10000014, 0.3000004, -0.70000094], [2.5, -0.35714287, 0, 0]])
    close(fake_quantize(w, spec(4)), [[0.5, -0.1, 0.3, -0.7], [2.5, -2.5 / 7, 0, 0]])
    assert gradient(W, spec(4, options=CLIP)) == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert gradient(W, spec(4)) == torch.ones(2, 4).tolist()
    close(reference.few_levels(w, 0), [[0.8, -0.8, 0.8, -0.8], [1.4, -1.4, 1.4, 1.4]])  # unvalidated there
    for bits in (0, -1):
        with pytest.raises(ValueError, match=rf"TensorSpec.bits: got {bits}"):
            spec(bits)


@pytest.mark.parametrize("bits", [1, 2])
def test_v15_zero_row(bits: int) -> None:
    zeros = torch.zeros(1, 3)
    ref = reference.binary(zeros) if bits == 1 else reference.few_levels(zeros)
    assert bool(ref.isnan().all()) == (bits == 2)
    assert torch.equal(fake_quantize(zeros, spec(bits, quantizer="mean_abs")), zeros)


def test_v15_few_activation_bits_are_not_silently_off() -> None:
    values = [[3.0, -0.3]]
    close(reference.sym(torch.tensor(values), 4)[1], [[3.0, -0.4285714]])
    close(fake_quantize(torch.tensor(values), spec(4, granularity="token")), [[3.0, -3 / 7]])
    assert gradient(values, spec(4, granularity="token", options=CLIP)) == [[0, 1]]
    assert fake_quantize(torch.tensor(values), spec(2, granularity="token")).tolist() == [[3, 0]]  # the reference skips 1 and 2
    with pytest.raises(ValueError, match="2 to 8 bits"):
        QuantScheme.parse("w4a1")


def test_v16_linear_end_to_end() -> None:
    w, x = torch.tensor([[0.7, -0.2, 0.05], [-2.1, 0.3, 1.0]]), torch.tensor([[1, -0.5, 0.25], [4, 0.1, -2]])
    y, dx, dw = reference.linear_sum_loss(x, w, 4, 8)
    close(y, [[0.7992144, -2.0220494], [2.7811067, -10.157485]])
    close(dw, [[5.000002, -0.4015753, -1.7322836], [0, -0.4015753, -1.7322836]])
    close(dx, [[-1.3999994, 0.0999998, 0.9000002], [0, 0.0999998, 0]])
    # -0.5 beside 1 and -2 beside 4 are exactly -63.5 steps: half to even takes -64, the reference's epsilon -63. All else is equal.
    x_ours = torch.tensor([[127, -64, 32], [4 * 127, 4 * 3, 4 * -64]]) / 127
    assert torch.equal(reference.sym(x, 8)[0] - quantize_tensor(x, spec(8)).codes, torch.tensor([[0.0, 1, 0], [0, 0, 1]]))
    w_ours = torch.tensor([[0.7, -0.2, 0], [-2.1, 0.3, 0.9]])
    for options in (CLIP, None):
        layer = nn.Linear(3, 2, bias=False)
        layer.weight.data = w.clone()
        model = nn.Sequential(layer)
        insert_quantizers(model, QuantScheme(weight=spec(4, options=options), input=spec(8, granularity="token", options=options)))
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        out.sum().backward()
        close(out, x_ours @ w_ours.T)
        grad_x, grad_w = w_ours.sum(0).expand(2, 3), x_ours.sum(0).expand(2, 3)
        if options == CLIP:
            grad_x, grad_w = reference.clipped_gradient(x, grad_x), reference.clipped_gradient(w, grad_w)
            close(dx, grad_x, rtol=1e-5)
        close(leaf.grad, grad_x, atol=5e-7)
        close(layer.weight.grad, grad_w, atol=5e-7)


def test_v18_granularity() -> None:
    x = torch.tensor([[1, 0.5], [0.1, -0.05]])
    close(reference.sym(x, 4)[1], [[1.0000008, 0.4285718], [0.100001, -0.0428576]])
    close(reference.sym(x, 4, whole=True)[1], [[1.0000008, 0.4285718], [0.1428573, 0]])
    # -0.05 is 3.5 steps of 0.1 / 7 exactly: half to even takes 4, where the reference's epsilon breaks the tie towards 3.
    close(fake_quantize(x, spec(4)), [[1.0, 3 / 7], [0.1, -0.4 / 7]])
    close(fake_quantize(x, spec(4, granularity="tensor")), [[1.0, 3 / 7], [1 / 7, 0]])


@pytest.mark.parametrize("bits", range(2, 9))
def test_ours_is_the_reference_but_for_ties_and_two_epsilons(bits: int) -> None:
    x = torch.randn(400, 16) * 10 ** torch.empty(400, 1).uniform_(-1, 2)
    quantized = quantize_tensor(x, spec(bits))
    ref_codes, ref = reference.sym(x, bits)
    steps = x / quantized.scale.unsqueeze(-1)
    clear = (steps - steps.floor() - 0.5).abs() > 2e-3  # not near a tie
    assert clear.float().mean() > 0.98
    assert torch.equal(quantized.codes.float()[clear], ref_codes[clear])
    # With e = 1e-6 the reference's step is (r + e) / qmax / (1 + e (r + e) / qmax) instead of r / qmax.
    r, qmax = x.abs().amax(-1, keepdim=True), 2 ** (bits - 1) - 1
    bound = 1e-6 * (1 / r + r / qmax) + 1e-6
    ours = quantized.dequantize()
    assert bool(((ours - ref).abs() <= bound * ours.abs())[clear].all())
