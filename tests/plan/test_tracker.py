"""Bytes counted by hand: what lives, what was there before, what a view adds, and what a gradient leaves."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_qat.plan.tracker import GRADIENTS, MemoryTracker


def test_storages_count_while_they_live():
    with FakeTensorMode():
        x, tracker = torch.empty(1000), MemoryTracker()
        tracker.ignore(iter([x]))
        with tracker:
            tracker.enter("first", "a")
            y = x * 2
            y.view(10, 100).add_(1)  # neither a view nor a write in place is new
            tracker.category = "b"
            z = y.double()
            del y
            tracker.enter("second")
            x.half()
            del z
            tracker.enter("third")
    assert dict(tracker.peaks["first"]) == {"a": 4000, "b": 8000}
    assert +tracker.peaks["second"] == {"b": 10_000}
    assert "third" not in tracker.peaks or tracker.peaks["third"].total() == 0


def test_of_a_gradient_the_share_stays():
    with FakeTensorMode():
        weight, tracker = torch.empty(100, 10, requires_grad=True), MemoryTracker(gradient_share=0.25)
        tracker.ignore(iter([weight]))
        weight.register_post_accumulate_grad_hook(lambda p: tracker.keep_gradient(p.grad))
        with tracker:
            tracker.enter("step", "a")
            loss = (weight * 2).sum()
            tracker.enter("backward")
            loss.backward()
            del loss
            tracker.enter("after")
    assert tracker.peaks["after"][GRADIENTS] == 1000
