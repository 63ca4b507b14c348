"""The model card: what the hub reads is YAML whatever is in it, and every figure is that of the export."""

import json
from types import SimpleNamespace

import manifests
import pytest
import torch
from huggingface_hub import metadata_load
from hypothesis import given, settings
from hypothesis import strategies as st
from models import llama, mlp, vit

from lightning_qat import QuantScheme, TensorSpec, export, insert_quantizers, load_quantized
from lightning_qat.formats import base
from lightning_qat.formats.folder import card
from lightning_qat.formats.native import NativeFormat
from lightning_qat.generation import load_causal_lm
from lightning_qat.scheme import Override


def quantized(build=llama, scheme="w4a8kv4"):
    model = build()
    insert_quantizers(model, scheme)
    return model


def parts_of(folder):
    """The front matter, as the hub reads it, and the text."""
    text = (folder / "README.md").read_text("utf-8")
    return metadata_load(folder / "README.md"), text[text.index("\n---\n\n") + 5 :]


def based_on(model, folder, head):
    folder.mkdir()
    (folder / "README.md").write_text(head, encoding="utf-8")
    model.config._name_or_path = str(folder)
    return model


# ---------------------------------------------------------------- what it says


def test_the_card_of_the_bundled_teacher(tmp_path):
    model = load_causal_lm("tiny-teacher")
    insert_quantizers(model, "w4a8kv4")
    folder = export(model, tmp_path / "out", results={"perplexity": 12.21})
    head, text = parts_of(folder)
    assert head["license"] == "apache-2.0"  # the teacher's README says so
    assert head["library_name"] == "lightning_qat"
    assert head["pipeline_tag"] == "text-generation"
    assert {"lightning_qat", "native", "4-bit"} <= set(head["tags"])
    assert head["quantization"]["target"] == "native"
    assert head["quantization"]["effective_bits"] == manifests.read(folder)["effective_bits"] == 4.140625
    assert set(head["quantization"]["scheme"]) == {"weight", "input", "kv"}
    assert "base_model" not in head  # it has no place on the hub
    for words in ("4 bits, one scale per channel", "8 bits, one scale per token", "post-RoPE", "**4.140625 bits per weight**"):
        assert words in text
    assert "| perplexity | 12.21 |" in text
    assert f"{manifests.read(folder)['size_on_disk']:,} bytes on disk" in text
    assert "Nothing: all that was trained is there" in text
    assert r"| codes\_different | 0 |" in text
    assert f"| torch | {torch.__version__} |" in text
    assert str(tmp_path) not in (folder / "README.md").read_text()


def test_every_spec_of_mixed_bits_has_a_row(tmp_path):
    scheme = QuantScheme(weight=TensorSpec(bits=4), overrides=(Override(names=("down_proj",), weight=TensorSpec(bits=8)),))
    head, text = parts_of(export(quantized(scheme=scheme), tmp_path / "out"))
    assert "| weight | 12 places, the first is" in text
    assert "| weight | 2 places, the first is" in text
    assert {"4-bit", "8-bit"} <= set(head["tags"])


def test_inputs_alone(tmp_path):
    head, text = parts_of(export(quantized(scheme="w16a8"), tmp_path / "out"))
    assert "No weights are quantized." in text
    assert head["quantization"]["effective_bits"] is None


def test_what_was_left_out_is_told_with_its_measure():
    notes = ("dropped: kv", "input: executed with divisor='half_range'")
    job = SimpleNamespace(fit=SimpleNamespace(notes=notes, is_exact=False))
    lines = "\n".join(card._differences(job, {"max_abs": 0.125, "kl": 1.5e-7, "top1_agreement": 1.0}))
    for words in ("- dropped: kv", "divisor='half\\_range'", "| max\\_abs | 0.125 |", "| kl | 1.5e-07 |"):
        assert words in lines
    assert "not measured" in "\n".join(card._differences(job, None))


@pytest.mark.parametrize(("build", "task"), [(llama, "text-generation"), (vit, "image-classification"), (mlp, None)])
def test_the_task_is_told_by_the_class(build, task, tmp_path):
    head, _ = parts_of(export(quantized(build, "w4a8"), tmp_path / "out"))
    assert head.get("pipeline_tag") == task


@pytest.mark.parametrize(("build", "line"), [(llama, 'load_quantized("folder")'), (mlp, 'load_quantized("folder", model=MyModel())')])
def test_how_to_load_it(build, line, tmp_path):
    assert line in parts_of(export(quantized(build, "w4"), tmp_path / "out"))[1]


def test_a_target_brings_its_own_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(NativeFormat, "usage", lambda self, job: "import mine")
    monkeypatch.setattr(NativeFormat, "library", "mine")
    head, text = parts_of(export(quantized(), tmp_path / "out"))
    assert "```python\nimport mine\n```" in text
    assert head["library_name"] == "mine"
    assert "usage" in vars(base.Format)


# ---------------------------------------------------------------- license and base


def test_nothing_known_about_the_base(tmp_path):
    head, text = parts_of(export(quantized(), tmp_path / "out"))
    assert head["license"] == "other"
    assert "base_model" not in head
    assert "Unknown: that of the base model applies." in text


def test_a_license_that_the_hub_does_not_know(tmp_path):
    lines = "license: other\nlicense_name: mine\nlicense_link: https://example.org\nbase_model: a/b\npipeline_tag: text2text-generation"
    model = based_on(quantized(), tmp_path / "base", f"---\n{lines}\n---\n# Base\n")
    head, text = parts_of(export(model, tmp_path / "out"))
    assert (head["license"], head["license_name"], head["license_link"]) == ("other", "mine", "https://example.org")
    assert head["pipeline_tag"] == "text2text-generation"
    assert "base_model" not in head  # that of a fine-tune is not the base of this
    assert "Of the base model: other, mine, https" in text


@pytest.mark.parametrize(
    "front",
    [
        "",
        "# no front matter\n",
        "---\n",
        "---\nlicense: [\n---\n",
        "---\n- a\n---\n",
        "---\nlicense: {a: 1}\n---\n",
        "---\n" + "[" * 1500 + "\n---\n",
    ],
)
def test_a_base_whose_card_cannot_be_read(front, tmp_path):
    head, _ = parts_of(export(based_on(quantized(), tmp_path / "base", front), tmp_path / "out"))
    assert head["license"] == "other"


def test_yaml_of_the_base_runs_no_code(tmp_path):
    front = f"---\nlicense: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n---\n"
    export(based_on(quantized(), tmp_path / "base", front), tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_a_base_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    files = {"config.json": "{}", "README.md": "---\nlicense: mit\n---\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    found = lambda repository, name: str(tmp_path / name) if repository == "owner/base" else None  # noqa: E731
    monkeypatch.setattr("lightning_qat.formats.folder.origin.try_to_load_from_cache", found)
    model = quantized(vit, "w4a8")
    for source, base_model, license in (("owner/base", "owner/base", "mit"), ("runs/gone", None, "other")):
        model.config._name_or_path = source
        head, _ = parts_of(export(model, tmp_path / source.replace("/", "-")))
        assert (head.get("base_model"), head["license"]) == (base_model, license)


def test_the_license_survives_an_export_of_an_export(tmp_path):
    model = based_on(quantized(vit, "w4a8"), tmp_path / "base", "---\nlicense: mit\n---\n")
    first = export(model, tmp_path / "first")
    second = export(load_quantized(first), tmp_path / "second")
    assert parts_of(second)[0]["license"] == "mit"


# ---------------------------------------------------------------- what people pass

HOSTILE = ["a: b", "---\nlicense: mit", "|\n# title", "- [ ]", "`x` <script>", "'\"\\", "\u2028\x85", "é漢🙂", "null", ""]


@settings(deadline=None, max_examples=60)
@given(name=st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30)), value=st.floats())
def test_names_break_neither_yaml_nor_tables(name, value, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    model = quantized(mlp, "w4")
    job = base.Job(
        model=model,
        scheme=QuantScheme.parse("w4"),
        fit=SimpleNamespace(is_exact=True, notes=()),
        results={name: value},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "origin_of", lambda model: card.Origin(name=name, license=name, task=name))
        card.write_card(job, NativeFormat(), folder, {"verification": {name: value}})
    head, text = parts_of(folder)
    assert head["license"] == (" ".join(name.split()) or ("" if name else "other"))
    assert head.get("base_model") == " ".join(name.split())
    assert json.loads(json.dumps(head["tags"])) == ["lightning_qat", "quantization-aware-training", "native", "4-bit"]
    titles = [line.split()[1] for line in text.split("\n") if line.startswith("#")]
    assert titles == ["Sequential,", "How", "What", "Size", "What", "What", "Results", "License", "Versions"]
    rows = text.split("## Results\n\n")[1].split("\n\n")[0].split("\n")
    assert len(rows) == 3
    assert rows[2].replace("\\\\", "").replace("\\|", "").count("|") == 3


@pytest.mark.parametrize(
    "results", ["perplexity", [1.0], {"a": "12"}, {1: 2.0}, {"a": None}, {"a": True}, {"a": torch.tensor([1.0, 2.0])}], ids=str
)
def test_results_that_are_no_figures_are_refused_before_any_work(results, tmp_path):
    with pytest.raises(ValueError, match="results: got"):
        export(quantized(mlp, "w4"), tmp_path / "out", results=results)
    assert list(tmp_path.iterdir()) == []
