"""What an export says of itself: its size to the bit, and that whatever happens to it is noticed when it is loaded."""

import copy
import json
import os
import random
import re
from pathlib import Path

import manifests
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import character_tokenizer, cnn, llama, logits_of, tied_llama
from safetensors.torch import load_file, save_file

from lightning_qat import QuantScheme, TensorSpec, export, formats, insert_quantizers, load_quantized
from lightning_qat.formats.folder.manifest import sizes


def quantized(build=llama, scheme="w4a8kv4"):
    model = build()
    insert_quantizers(model, scheme)
    return model


@pytest.fixture
def folder(tmp_path):
    return export(quantized(), tmp_path / "out", tokenizer=character_tokenizer())


# ---------------------------------------------------------------- sizes


def test_sizes_counted_by_hand(folder):
    manifest = manifests.read(folder)
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # q, o; k, v; gate, up, down
    rows = 2 * (32 + 32 + 16 + 16 + 48 + 48 + 32)
    rest = 2 * 97 * 32 + 5 * 32  # embedding and head; norms
    assert manifest["quantized_weights"] == weights
    assert manifest["quantized_bits"] == 4 * weights + 32 * rows
    assert manifest["effective_bits"] == (4 * weights + 32 * rows) / weights
    assert manifest["nominal_bits"] == 4 * weights + 32 * rows + 32 * rest
    files = {file.name: file.stat().st_size for file in folder.iterdir() if file.name not in ("README.md", "manifest.json")}
    assert manifest["size_on_disk"] == sum(files.values())
    assert files.keys() == manifest["sha256"].keys()


def test_a_shared_weight_counts_once():
    everything = QuantScheme(weight=TensorSpec(bits=4), exclude=())
    apart, tied = sizes(quantized(llama, everything)), sizes(quantized(tied_llama, everything))
    assert apart["quantized_weights"] - tied["quantized_weights"] == 97 * 32
    assert apart["quantized_bits"] - tied["quantized_bits"] == 97 * (32 * 4 + 32)
    plain = [sizes(quantized(build, "w4"))["nominal_bits"] for build in (llama, tied_llama)]
    assert plain[0] - plain[1] == 97 * 32 * 32


@pytest.mark.parametrize("build", [llama, cnn])
def test_sizes_do_not_depend_on_whether_weights_are_packed(build, tmp_path):
    model = quantized(build, "w3")
    loaded = load_quantized(export(model, tmp_path / "out"), model=None if build is llama else build())
    assert sizes(loaded) == sizes(model)


def test_scales_along_the_inputs_are_counted_by_inputs(tmp_path):
    model = quantized(cnn, QuantScheme(weight=TensorSpec(bits=4, axis=1)))
    columns = 3 * 9 + 9 + 8  # stem, depthwise, classifier
    weights = 8 * 27 + 8 * 9 + 4 * 8
    assert sizes(model)["quantized_bits"] == 4 * weights + 32 * columns
    assert torch.equal(logits_of(load_quantized(export(model, tmp_path / "out"), model=cnn())), logits_of(model))


def test_without_quantized_weights_there_are_no_effective_bits():
    assert sizes(quantized(scheme="w16a8"))["effective_bits"] is None


# ---------------------------------------------------------------- damage


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors", "manifest.json"])
def test_one_flipped_bit_anywhere_is_noticed(name, folder):
    file, draw = folder / name, random.Random(name)
    size = file.stat().st_size
    for bit in draw.sample(range(8 * size), 40):
        flip(file, bit)
        with pytest.raises(ValueError, match=r"path: .*(out|version|manifest)"):
            load_quantized(folder)
        flip(file, bit)
    load_quantized(folder)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file_with_a_fitting_checksum(keep, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    manifests.accept(folder, file.name)
    with pytest.raises(ValueError, match=r"path: cannot read .*model\.safetensors"):
        load_quantized(folder)


def test_the_card_may_be_edited_and_files_may_be_added(folder):
    wanted = logits_of(load_quantized(folder))
    (folder / "README.md").write_text("# Mine\n")
    for name in ("LICENSE", ".gitattributes", "modeling_evil.py", "pytorch_model.bin", "adapter_config.json"):
        (folder / name).write_bytes(b"\x80\x04not what it seems")
    assert torch.equal(logits_of(load_quantized(folder)), wanted)
    (folder / "README.md").unlink()
    load_quantized(folder)


# ---------------------------------------------------------------- manifests that somebody else wrote


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b'"text"', b"{", b"\xff\xfe{\x00}\x00", b"[" * 100_000, b"1" * 5000, b'{"format": "\xff"}', b"\x00" * 10],
    ids=["empty", "null", "list", "text", "open", "utf-16", "deep", "long-number", "not-utf-8", "zeros"],
)
def test_a_manifest_that_is_none(content, folder):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"path: .*manifest\.json.* is damaged"):
        load_quantized(folder)


def test_a_huge_manifest_is_not_read(folder):
    os.truncate(folder / "manifest.json", 2**33)  # takes no space
    with pytest.raises(ValueError, match=r"8589934592 bytes, more than any that export writes"):
        load_quantized(folder)


@pytest.mark.parametrize("name", ["/etc/passwd", "../out/config.json", "a/../../x", "..", "", ".", "//x", "a\nb", "\x00", "out/\x00"])
def test_files_outside_the_folder_are_not_looked_at(name, folder):
    manifests.edit(folder, sha256={name: "0" * 64})
    with pytest.raises(ValueError, match=r"path: the manifest names a file outside its folder"):
        load_quantized(folder)


def test_links_are_followed_but_their_content_must_fit(folder, tmp_path):
    file = folder / "config.json"
    moved = file.rename(tmp_path / "blob")
    file.symlink_to(moved)
    load_quantized(folder)
    (tmp_path / "other").write_text("{}")
    for target in (tmp_path / "other", "/dev/zero", "/proc/self/mem", tmp_path, tmp_path / "nothing", file):
        file.unlink()
        file.symlink_to(target)
        with pytest.raises(ValueError, match=r"path: .*config\.json"):
            load_quantized(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format_version": 7, "versions": {"lightning_qat": "9.1"}},
            r"version 7; this library reads .*pip install -U lightning-qat.*written by 9\.1",
        ),
        (
            {"format_version": 0, "versions": {"lightning_qat": "0.0.1"}},
            r"version 0; .*load it with lightning-qat 0\.0\.1, or export again",
        ),
        ({"format_version": "1"}, r"version '1'; this library reads"),
        ({"format_version": 2, "versions": None}, r"written by a newer one"),
        (
            {"target": "tpu-v9", "versions": {"lightning_qat": "9.1"}},
            r"path: .*target 'tpu-v9' by lightning-qat 9\.1.*native.*pip install -U",
        ),
        ({"target": None}, r"'target' is missing or wrong"),
        ({"model": {"library": "transformers", "class": "LlamaConfig"}}, r"names the class 'LlamaConfig'"),
        (
            {"model": {"library": "transformers", "class": "GPT2LMHeadModel"}},
            r"class 'GPT2LMHeadModel', its configuration is a LlamaConfig",
        ),
        ({"scheme": {"weight": {"bits": 99}}}, r"damaged: .*TensorSpec\.bits"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_told_with_the_way_out(changes, message, folder):
    manifests.edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_quantized(folder)


def test_the_first_manifests_had_neither_target_nor_checksum(folder):
    old = {key: value for key, value in manifests.read(folder).items() if key not in ("target", "checksum")}
    (folder / "manifest.json").write_text(json.dumps(old))
    load_quantized(folder)


JUNK = st.sampled_from([None, True, -1, 0, 2**70, 1.5, "", "x", "..", [], [1], ["x"], {}, {"x": 1}, [[]], {"": {}}, float("nan")])
LOADED = ("model", "scheme", "root", "layers", "input_only", "tied", "computed_buffers", "sha256", "versions", "target", "format")


def places_in(value, path=()):
    """Every place in nested data."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places_in(value[key], (*path, key))


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    folder = export(quantized(cnn, "w4a8"), tmp_path_factory.mktemp("victim") / "out")
    manifest = manifests.read(folder)
    return folder, manifest, [path for path in places_in({key: manifest[key] for key in LOADED}) if path]


@example(number=177, junk=2**70, gone=False)
@example(number=177, junk=-1, gone=False)
@settings(deadline=None, max_examples=250)
@given(number=st.integers(0, 10**6), junk=JUNK, gone=st.booleans())
def test_any_entry_may_be_wrong(number, junk, gone, victim):
    """Refused by name, or harmless; nothing else is ever raised."""
    folder, original, places = victim
    manifest, path = copy.deepcopy(original), places[number % len(places)]
    owner = manifest
    for key in path[:-1]:
        owner = owner[key]
    if gone:
        del owner[path[-1]]
    else:
        owner[path[-1]] = junk
    manifests.write(folder, manifest)
    try:
        loaded = load_quantized(folder, model=cnn())
    except ValueError:
        return
    logits_of(loaded)


def test_tensors_of_another_shape_than_the_manifest_says(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj"
    for part, wrong in (
        ("packed", torch.zeros(3, dtype=torch.uint8)),
        ("packed", tensors[f"{name}.packed"].float()),
        ("scale", torch.ones(2)),
    ):
        save_file(tensors | {f"{name}.{part}": wrong}, file, metadata={"format": "pt"})
        manifests.accept(folder, file.name)
        with pytest.raises(ValueError, match=rf"damaged: {name}\.{part}: got"):
            load_quantized(folder)


# ---------------------------------------------------------------- code in a folder

EVIL = "import os\nos.mkdir({ran!r})\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M, LlamaTokenizer as T\n"


@pytest.mark.parametrize("model_type", ["llama", "never-seen"])
def test_code_that_a_folder_brings_is_never_run(model_type, folder, tmp_path):
    ran = str(tmp_path / "ran")
    (folder / "evil.py").write_text(EVIL.format(ran=ran))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": names}))
    manifests.accept(folder, "config.json")
    if model_type == "llama":
        load_quantized(folder)
    else:
        with pytest.raises(ValueError, match="path: cannot read a configuration"):
            load_quantized(folder)
    assert not os.path.exists(ran)


def test_no_format_unpickles_or_trusts_code():
    for file in Path(formats.__path__[0]).rglob("*.py"):
        source = file.read_text("utf-8")
        for words in ("trust_remote_code=True", "pickle.load", "torch.load(", "weights_only=False", "exec(", "eval("):
            assert words not in re.sub(r"\.eval\(|def eval\(", "", source), f"{words} in {file}"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nothing", "nothing is there, seen from"),
        ("last.ckpt", "load_trained reads checkpoints"),
        ("transformers", "read by from_pretrained"),
        ("empty", "makes one from a checkpoint"),
    ],
)
def test_what_is_no_export_is_told_with_what_reads_it(name, hint, tmp_path):
    (tmp_path / "last.ckpt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"no manifest.json in .*{hint}"):
        load_quantized(tmp_path / name)
