"""torch.compile of the student, of a part, and of the whole module: it trains the same, and every quantized layer is still found."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import VOCABULARY, llama, token_ids
from regression import INPUTS, Regression, loader, quantized_layers, trainer
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_qat import DistillationModule, QuantizationCallback, export, load_quantized
from lightning_qat.data.collate import Collate


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wrapped(module):
    module.net = torch.compile(module.net, backend="eager")
    return module


def in_place(module):
    module.net.compile(backend="eager")
    return module


def whole(module):
    return torch.compile(module, backend="eager")


def not_at_all(module):
    return module


def fitted(compiled, epochs=2, **kwargs):
    module = Regression()
    run = trainer(QuantizationCallback("w4a8"), epochs=epochs)
    run.fit(compiled(module), loader(), loader(), **kwargs)
    return run, module


def plain_names(module):
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in module.state_dict().items()}


def close(one, other):
    one, other = plain_names(one), plain_names(other)
    return one.keys() == other.keys() and all(torch.allclose(tensor, other[name], rtol=1e-5, atol=1e-6) for name, tensor in one.items())


SLOW = pytest.mark.slow


@pytest.mark.parametrize("compiled", [in_place, pytest.param(wrapped, marks=SLOW), pytest.param(whole, marks=SLOW)])
def test_a_compiled_run_trains_resumes_and_exports_like_a_plain_one(compiled, tmp_path):
    run, module = fitted(compiled)
    _, plain = fitted(not_at_all)
    assert close(module, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert len(quantized_layers(module)) == 2

    run.save_checkpoint(tmp_path / "last.ckpt")
    renamed = [key for key in torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"] if "_orig_mod" in key]
    assert bool(renamed) == (compiled is wrapped)  # torch's own names for a wrapped part; compile in place to keep the plain ones
    _, resumed = fitted(compiled, epochs=3, ckpt_path=tmp_path / "last.ckpt")
    _, longer = fitted(not_at_all, epochs=3)
    assert close(resumed, longer)

    fresh = Regression() if compiled is whole else compiled(Regression())
    loaded = load_quantized(export(module, tmp_path / "out"), model=fresh)
    with torch.no_grad():
        assert torch.allclose(loaded(INPUTS), module(INPUTS), atol=1e-6)


class Bypass(Regression):
    def forward(self, x, gain=1.0):
        hidden = functional.linear(x, self.net[0].weight, self.net[0].bias).relu()
        return self.net[2](hidden) * gain


@SLOW
def test_a_graph_of_another_module_hides_no_layer_and_excuses_none():
    fitted(whole)
    _, second = fitted(whole)  # the graphs of the first are used again, without our hooks
    assert len(quantized_layers(second)) == 2
    with pytest.raises(MisconfigurationException, match=r"1 quantized layers were not called.*\['net\.0'\]"):
        trainer(QuantizationCallback("w4a8")).fit(torch.compile(Bypass(), backend="eager"), loader())
    assert torch._dynamo.eval_frame._stance.stance == "default"


def batches():
    samples = [{"input_ids": token_ids(1, 8, seed=seed)[0], "source": "generated"} for seed in range(8)]
    return DataLoader(samples, batch_size=4, collate_fn=Collate(VOCABULARY))


@SLOW
def test_a_compiled_student_is_distilled_saved_loaded_and_exported(tmp_path):
    def distilled(compiled):
        module = DistillationModule(llama(num_hidden_layers=1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        if compiled:
            module.student.compile(backend="aot_eager")
        run = trainer(QuantizationCallback("w4a8kv4"), epochs=1)
        run.fit(module, batches(), batches())
        run.save_checkpoint(tmp_path / "last.ckpt")
        return module

    plain, module = distilled(False), distilled(True)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt", teacher=llama(num_hidden_layers=1), weights_only=True)
    reloaded = load_quantized(export(module.student, tmp_path / "out"))
    with torch.no_grad():
        expected = loaded.eval()(token_ids())
        torch.testing.assert_close(reloaded(input_ids=token_ids()).logits, expected, rtol=0, atol=1e-5)


def test_a_wrapped_student_is_shown_the_other_way():
    module = DistillationModule(llama())
    module.student = torch.compile(module.student, backend="eager")
    with pytest.raises(MisconfigurationException, match=r"student: is wrapped by torch\.compile.*module\.student\.compile\(\)"):
        trainer(QuantizationCallback("w4a8")).fit(module, batches())
