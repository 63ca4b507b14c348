"""`pytorch_lightning` beside `lightning.pytorch`: whatever is mixed, there is a message that names the import to change."""

import warnings

import pytest
import torch
from gloo import run_ranks
from models import llama, mlp
from regression import QUIET, Regression, loader, trainer

from lightning_qat import DistillationModule, QuantizationCallback, SyntheticDataModule

FIX = "replace `import pytorch_lightning as pl` by `import lightning.pytorch as pl`"


def twin():
    import pytorch_lightning

    return pytorch_lightning


def twin_module():
    class TwinModule(twin().LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return TwinModule()


def twin_data():
    class TwinData(twin().LightningDataModule):
        def train_dataloader(self):
            return loader()

    return TwinData()


def twin_trainer(*callbacks):
    return twin().Trainer(**QUIET, max_epochs=1, callbacks=list(callbacks))


MIXES = {
    "their Trainer and module, our callback": lambda: twin_trainer(QuantizationCallback("w4")).fit(twin_module(), loader()),
    "their Trainer, our callback, a module of lightning": lambda: twin_trainer(QuantizationCallback("w4")).fit(Regression(), loader()),
    "their Trainer, our module": lambda: twin_trainer().fit(DistillationModule(llama()), loader()),
    "their Trainer and module, our data": lambda: twin_trainer().fit(
        twin_module(), datamodule=SyntheticDataModule(llama(), num_samples=8, max_length=4)
    ),
    "their module, our callback": lambda: trainer(QuantizationCallback("w4")).fit(twin_module(), loader()),
    "their data, our callback": lambda: trainer(QuantizationCallback("w4")).fit(Regression(), datamodule=twin_data()),
    "their callback beside ours": lambda: trainer(twin().callbacks.EarlyStopping("loss"), QuantizationCallback("w4")).fit(
        Regression(), loader()
    ),
}


def messages():
    """Of every mix, the type of the error and everything the user is told."""
    twin()  # as at the top of a user's file
    return {name: messages_of(mix) for name, mix in MIXES.items()}


def messages_of(mix):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mix()
        except Exception as error:
            return type(error).__name__, [str(error), *(str(one.message) for one in caught if issubclass(one.category, UserWarning))]
    return "accepted", []


@pytest.fixture(scope="module")
def told():
    """One process for all, because importing the twin changes what every later test would see."""
    (result,) = run_ranks(messages, world=1)
    return result


@pytest.mark.parametrize("name", MIXES)
def test_every_mix_names_the_import_to_change(name, told):
    kind, texts = told[name]
    assert kind != "accepted"
    assert any(FIX in text for text in texts), texts


@pytest.mark.parametrize("name", ["their Trainer and module, our callback", "their data, our callback", "their callback beside ours"])
def test_what_a_hook_can_see_is_an_error_of_our_own(name, told):
    kind, texts = told[name]
    assert kind == "MisconfigurationException"
    assert FIX in texts[0]


def test_without_the_twin_nobody_is_warned():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        QuantizationCallback("w4")
        DistillationModule(llama())
