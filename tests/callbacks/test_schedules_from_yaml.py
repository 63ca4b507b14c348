"""The YAML of docs/schedules.md builds the callbacks that it names."""

import re
from pathlib import Path

import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser

from lightning_qat import QuantScheme
from lightning_qat.callbacks import BitStages, DelayedStart

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "schedules.md"


def built(value):
    parser = LightningArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    return parser.instantiate_classes(parser.parse_object({"callbacks": value})).callbacks


def test_the_documented_yaml():
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    stages, delay = built(yaml.safe_load(block)["trainer"]["callbacks"])
    assert isinstance(stages, BitStages)
    assert stages.stages == {0: QuantScheme.parse("w8a8kv8"), 500: QuantScheme.parse("w4a8kv4")}
    assert isinstance(delay, DelayedStart)
    assert delay.settings == {"weight": 0, "input": 100, "kv": 1000}


def test_stages_as_mappings():
    first = {"weight": {"bits": 8}, "input": {"bits": 8, "granularity": "token"}}
    (stages,) = built([{"class_path": "BitStages", "init_args": {"stages": {0: first, 5: "w4a8"}}}])
    assert stages.settings == BitStages({0: "w8a8", 5: "w4a8"}).settings
