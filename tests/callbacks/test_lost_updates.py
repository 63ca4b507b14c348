"""The warning about half precision weights: its number is exact, its share is counted, and it is silent where nothing is lost."""

import warnings

import pytest
import torch
from gloo import run_ranks
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import mlp
from scheduled import Recording, loader, trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_qat import QuantizationCallback, insert_quantizers
from lightning_qat.callbacks.precision import largest_lr, lost_exponent, warn_lost_updates


class Trainer:
    """All that is asked of one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers


def model(dtype=torch.bfloat16):
    net = mlp()
    insert_quantizers(net, "w4a8")
    return net.to(dtype)


def every_positive(dtype, low, high):
    """All floats of a dtype in [low, high)."""
    values = torch.arange(2**15, dtype=torch.int16).view(dtype)
    return values[(values >= low) & (values < high)]


@pytest.mark.parametrize(
    ("dtype", "lr", "exponent"),
    [
        (torch.bfloat16, 2e-5, -7),
        (torch.bfloat16, 1e-4, -5),
        (torch.float16, 2e-5, -4),
        (torch.bfloat16, 2.0**-16, -7),
        (torch.bfloat16, 1.0, 9),
    ],
)
def test_the_number_is_exact(dtype, lr, exponent):
    assert lost_exponent(lr, dtype) == exponent
    bound = 2.0**exponent
    high = min(bound * 2**12, torch.finfo(dtype).max)
    lost = every_positive(dtype, bound, high)
    assert len(lost) > 1000
    assert torch.equal((lost.double() + lr).to(dtype), lost)
    shrunk = (lost.double() - lr).to(dtype)
    assert torch.equal(shrunk[1:], lost[1:])  # the power itself has closer neighbours below
    kept = every_positive(dtype, bound / 2, bound)
    grown = (kept.double() + lr).to(dtype)
    assert (grown != kept).sum() >= len(kept) // 2  # all of them, but for ties where lr is a power of two
    assert bool((grown != kept).all()) == (lr != 2.0**-16 and lr != 1.0)


def test_an_optimizer_step_loses_what_the_warning_says():
    """AdamW's first update is lr, up to eps."""
    values = every_positive(torch.bfloat16, 2.0**-9, 2.0**-5)
    weight = nn.Parameter(values.clone())
    optimizer = torch.optim.AdamW([weight], lr=2e-5, weight_decay=0.0)
    weight.grad = -torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight.detach() == values, values >= 2.0**-7)


def test_the_warning_names_dtype_rate_bound_and_share():
    net = model()
    with torch.no_grad():
        for layer, value in ((net[0], 2.0**-7), (net[2], 2.0**-8)):  # 512 and 256 weights
            layer.weight.fill_(value)
    with pytest.warns(UserWarning, match=r"bfloat16 at lr 2e-05: every \|w\| >= 2\^-7\): 67% .*'bf16-mixed'.*bf16_stochastic_round=True"):
        warn_lost_updates(Trainer(torch.optim.AdamW(net.parameters(), lr=2e-5)), net)
    groups = [{"params": net[0].parameters(), "lr": 2e-5}, {"params": net[2].parameters(), "lr": 1e-5}]
    with pytest.warns(UserWarning, match=r"lr 1e-05: every \|w\| >= 2\^-8; bfloat16 at lr 2e-05: every \|w\| >= 2\^-7\): 100%"):
        warn_lost_updates(Trainer(torch.optim.Adam(groups)), net)


def test_a_warm_up_is_seen_through():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
    assert optimizer.param_groups[0]["lr"] == 0
    assert largest_lr(optimizer.param_groups[0]) == 2e-5
    torch.optim.lr_scheduler.OneCycleLR(other := torch.optim.AdamW(net.parameters(), lr=1.0), max_lr=2e-5, total_steps=10)
    assert largest_lr(other.param_groups[0]) == 2e-5
    with pytest.warns(UserWarning, match=r"lr 2e-05"):
        warn_lost_updates(Trainer(optimizer), net)


class Stochastic(torch.optim.AdamW):
    """With the flag as torchao keeps it."""

    bf16_stochastic_round = True


def silent(*optimizers, net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_lost_updates(Trainer(*optimizers), net)


def test_nothing_is_said_where_nothing_is_lost():
    half, full = model(), model(torch.float32)
    silent(torch.optim.AdamW(full.parameters(), lr=2e-5), net=full)
    silent(Stochastic(half.parameters(), lr=2e-5), net=half)
    silent(torch.optim.SGD(half.parameters(), lr=2e-5), net=half)  # how large its updates are nobody knows
    silent(torch.optim.AdamW(half.parameters(), lr=0.0), net=half)
    silent(torch.optim.AdamW([half[0].bias], lr=2e-5), net=half)
    silent(torch.optim.AdamW(half.parameters(), lr=0.1), net=half)  # every weight is small enough for such steps


def test_float16_where_eps_is_zero_is_refused():
    net = model(torch.float16)
    with pytest.raises(MisconfigurationException, match=r"AdamW\.eps: got 1e-08, which is 0 in the float16.*'16-mixed'.*eps=1e-4"):
        warn_lost_updates(Trainer(torch.optim.AdamW(net.parameters(), lr=2e-5)), net)
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    weight.grad = torch.zeros(2, dtype=torch.float16)
    torch.optim.AdamW([weight], lr=2e-5).step()
    assert weight.isnan().all()
    for settings in ({"eps": 1e-4}, {"fused": True}):
        with pytest.warns(UserWarning, match=r"float16 at lr 2e-05: every \|w\| >= 2\^-4"):
            warn_lost_updates(Trainer(torch.optim.AdamW(net.parameters(), lr=2e-5, **settings)), net)


def share_of_a_shard():
    torch.distributed.init_process_group("gloo")
    net, mesh = model(), init_device_mesh("cpu", (2,))
    for layer in (net[0], net[2]):
        with torch.no_grad():
            rows = layer.weight.shape[0]
            layer.weight.copy_(torch.where(torch.arange(rows)[:, None] < rows // 2, 1.0, 0.0))
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_lost_updates(Trainer(torch.optim.AdamW(net.parameters(), lr=2e-5)), net)
    return [str(warning.message).split("): ")[1][:4] for warning in caught]


def test_sharded_weights_are_counted_where_they_are():
    assert run_ranks(share_of_a_shard)[0] == ["100%"]


@pytest.mark.slow
def test_torchao_rounds_stochastically():
    optim = pytest.importorskip("torchao.optim")
    net = model()
    silent(optim.AdamW8bit(net.parameters(), lr=2e-5, bf16_stochastic_round=True), net=net)
    with pytest.warns(UserWarning, match=r"bfloat16 at lr 2e-05"):
        warn_lost_updates(Trainer(optim.AdamW8bit(net.parameters(), lr=2e-5)), net)


def test_training_in_bf16_true_warns_once():
    with pytest.warns(UserWarning, match="stored in half precision") as caught:
        trainer(QuantizationCallback("w4a8"), steps=2, precision="bf16-true").fit(Recording(lr=2e-5), loader())
    assert sum("every |w| >= 2^-7" in str(warning.message) for warning in caught) == 1
