"""`import lightning_qat` is free, and none of its names needs a GPU or an optional package."""

import subprocess
import sys

import pytest

import lightning_qat


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("torch", "transformers", "lightning", "bitsandbytes", "numpy")
    done = python(f"import sys, lightning_qat; print([name for name in {heavy} if name in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_every_public_name_works_without_optional_packages():
    done = python(
        "import sys\n"
        "for name in ('bitsandbytes', 'triton', 'torchao', 'peft'):\n"
        "    sys.modules[name] = None\n"
        "import lightning_qat, lightning_qat.formats, lightning_qat.numerics.fake_quantize, lightning_qat.cli.commands\n"
        "import torch\n"
        "hidden = [name for name in lightning_qat.__all__ if not callable(getattr(lightning_qat, name))]  # behind a room's name\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
        "lightning_qat.insert_quantizers(model, 'w4a8')\n"
        "print(hidden, tuple(model(torch.ones(1, 8)).shape))"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[] (1, 8)"), done.stderr


@pytest.mark.parametrize("name", lightning_qat.__all__)
def test_public_names_resolve_to_documented_things(name):
    value = getattr(lightning_qat, name)
    assert value.__name__ == name
    assert value.__module__.startswith("lightning_qat.")
    assert value.__doc__
    assert name in dir(lightning_qat)
    assert getattr(lightning_qat, name) is value


def test_a_star_import_gives_the_public_names():
    names = {}
    exec("from lightning_qat import *", names)
    assert set(lightning_qat.__all__) <= names.keys()
    assert lightning_qat.__all__ == sorted(lightning_qat.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        lightning_qat.quantise  # noqa: B018
