"""N steps are k steps, a new process and N - k steps, to the last bit: everything a later step depends on, on every rank."""

from pathlib import Path

import pytest
import torch
from gloo import run_ranks
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from resuming import ForeignData, Student, differences, distillation, end_of, learned_and_static, synthetic, train, world

from lightning_qat.callbacks import AtomicModelCheckpoint

DATA = {
    "store": synthetic,
    "stream": lambda store: synthetic(store / "not-there", mode="stream"),
    "workers": lambda store: synthetic(store, num_workers=1),
    "foreign": lambda store: ForeignData(),
    "shuffled": lambda store: ForeignData(shuffle=True),
}


def steps(path):
    return int(path.stem.split("=")[1])


def compare(kind, folder, store, data, estimate, every, limits):
    """What differs after resuming from each checkpoint of a run, by the checkpoint's name."""
    keep = {"save_top_k": -1, "filename": "{step}"}
    callbacks = [
        AtomicModelCheckpoint(folder / "step", every_n_train_steps=every, **keep),
        AtomicModelCheckpoint(folder / "epoch", **keep),
        AtomicModelCheckpoint(folder / "validation", monitor="val", save_on_train_epoch_end=False, **keep),
    ]
    with learned_and_static() as scheme:
        last = train(kind, DATA[data](store), scheme, callbacks=callbacks, module=Student(estimate), **limits)
        whole, found = end_of(last), {}
        for path in folder.glob("*/*.ckpt"):
            if steps(path) < last.global_step:
                module, options = Student(estimate), {"ckpt_path": str(path), "seed": 9, **limits}
                resumed = train(kind, DATA[data](store), scheme, module=module, **options)
                different = differences(whole, end_of(resumed))
                if path.parent.name != "epoch" and steps(path) in last.early_stopping_callback.looked:
                    # Lightning does not make up for what callbacks do after the checkpoint and before the next step (docs/resume.md)
                    different = [item for item in different if not item.startswith(".callback")]
                found[f"{path.parent.name} {steps(path)}"] = different
    return found


def check(kind, folder, store, data, estimate=False, every=5, **limits):
    ranks = run_ranks(compare, kind, folder, store, data, estimate, every, limits, world=world(kind))
    assert all(ranks)
    for rank, found in enumerate(ranks):
        for name, different in found.items():
            assert different == [], (rank, name)
    return ranks[0]


def test_one_process_from_every_step(store, tmp_path):
    found = check("single", tmp_path, store, "foreign", every=1, max_epochs=2)
    assert {f"step {step}" for step in range(1, 12)} | {"epoch 6", "validation 6"} == set(found)


@pytest.mark.parametrize("data", [*(pytest.param(data, marks=pytest.mark.slow) for data in ("store", "workers")), "stream"])
def test_generated_data(data, store, tmp_path):
    """The estimate makes Lightning drop the state of loaders (its issue 20550)."""
    assert set(check("single", tmp_path, store, data, estimate=True, every=11, max_epochs=2)) >= {"step 11", "epoch 8"}


@pytest.mark.slow
def test_accumulated_batches_up_to_a_number_of_steps(store, tmp_path):
    found = check("single", tmp_path, store, "store", every=2, max_steps=7, accumulate_grad_batches=2)
    assert {"step 2", "step 4", "epoch 4", "step 6"} <= set(found)


@pytest.mark.slow
def test_validation_within_an_epoch(store, tmp_path):
    found = check("single", tmp_path, store, "foreign", estimate=True, every=4, max_epochs=2, val_check_interval=3)
    assert {"validation 3", "validation 9", "step 4", "step 8"} <= set(found)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        pytest.param("ddp", "store", marks=pytest.mark.slow),
        ("fsdp2", "store"),
        pytest.param("fsdp2-file", "foreign", marks=pytest.mark.slow),
    ],
)
def test_two_processes(kind, data, store, tmp_path):
    found = check(kind, tmp_path, store, data, estimate=True, every=3, max_epochs=2, accumulate_grad_batches=2)
    assert {"step 3", "epoch 2" if data == "store" else "epoch 3"} <= set(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "ddp", "fsdp2", "fsdp2-file"])
@pytest.mark.parametrize("data", ["store", "stream", "foreign"])
@pytest.mark.parametrize("estimate", [False, True])
@pytest.mark.parametrize(
    "limits", [{"max_epochs": 3}, {"max_steps": 7, "accumulate_grad_batches": 2}, {"max_epochs": 2, "val_check_interval": 3}]
)
def test_everything(kind, data, estimate, limits, store, tmp_path):
    check(kind, tmp_path, store, data, estimate, every=1, **limits)


def finished(folder):
    """The random numbers after a run, and after it was started again with nothing left to do."""
    keep = [AtomicModelCheckpoint(folder, save_last=True)]
    with learned_and_static() as scheme:
        whole = end_of(train("single", ForeignData(), scheme, callbacks=keep, max_epochs=1))
        again = train("single", ForeignData(), scheme, ckpt_path=str(folder / "last.ckpt"), max_epochs=1, seed=9)
    return differences(whole, end_of(again))


def test_a_finished_run_started_again(tmp_path):
    (different,) = run_ranks(finished, tmp_path, world=1)
    assert [item for item in different if item.startswith((".random", ".weights", ".buffers", ".place"))] == []


def test_torch_shuffles_as_the_whole_run_would_have_only_from_the_end_of_an_epoch(store, tmp_path):
    (found,) = run_ranks(compare, "single", tmp_path, store, "shuffled", False, 3, {"max_epochs": 2}, world=1)
    assert found["epoch 6"] == []
    assert "seen" in found["step 3"]


# ---------------------------------------------------------------- distillation


def distil(kind, folder, store):
    def run(**options):
        data = synthetic(store, batch_size=4 if kind == "single" else 2)
        return train(kind, data, "w4a8kv4", module=distillation(), max_epochs=2, limit_val_batches=0, **options)

    whole = end_of(run(callbacks=[AtomicModelCheckpoint(folder / "kept", every_n_train_steps=3, filename="{step}", save_top_k=-1)]))
    resumed = end_of(run(ckpt_path=str(folder / "kept" / "step=3.ckpt"), seed=9))
    return differences(whole, resumed)


@pytest.mark.parametrize("kind", [pytest.param("single", marks=pytest.mark.slow), "ddp", "fsdp2"])
def test_distillation_with_dropout(kind, store, tmp_path):
    assert run_ranks(distil, kind, tmp_path, store, world=world(kind)) == [[]] * world(kind)


# ---------------------------------------------------------------- other checkpoints, other worlds


def without_states(folder, change):
    keep = AtomicModelCheckpoint(folder, every_n_train_steps=3, filename="{step}", save_top_k=-1)
    with learned_and_static() as scheme:
        train("single", ForeignData(), scheme, callbacks=[keep], max_epochs=1)
        path = folder / "step=3.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)
        with pytest.warns() as caught:
            trainer = train("single", ForeignData(), scheme, ckpt_path=str(path), max_epochs=1, quiet=False)
        assert trainer.global_step == 6
        return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda checkpoint: checkpoint.pop("random_states"), "The checkpoint holds no states of random number generators"),
        (lambda checkpoint: checkpoint["random_states"].update(format_version=0), "The checkpoint holds no states of random number"),
        (lambda checkpoint: checkpoint["random_states"]["ranks"].append({}), "was written by 2 processes and this run has 1"),
    ],
    ids=["older", "newer", "other-world"],
)
def test_a_checkpoint_whose_states_do_not_fit_is_resumed_with_a_warning(change, message, tmp_path):
    assert any(message in warning for warning in without_states(Path(tmp_path), change))
    assert rank_zero_only.rank == 0
