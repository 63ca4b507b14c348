"""Uploads to the hub, against a hub of our own: nothing here asks the network."""

import shlex
from types import SimpleNamespace

import pytest
from models import mlp

from lightning_qat import export, insert_quantizers, load_quantized
from lightning_qat.formats.folder import hub
from lightning_qat.formats.folder.hub import UploadError


class FakeHub:
    """Repositories with their files, and what goes wrong."""

    def __init__(self):
        self.private, self.files, self.fails_in, self.error = {}, {}, None, OSError("no route to host")

    def create_repo(self, repository, *, private, exist_ok):
        assert exist_ok
        self._fail("create_repo")
        name = repository if "/" in repository else f"me/{repository}"
        self.private.setdefault(name, private)
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, folder_path, repo_id, commit_message):
        self._fail("upload_folder")
        files = {file.relative_to(folder_path).as_posix(): file.read_bytes() for file in folder_path.rglob("*") if file.is_file()}
        self.files.setdefault(repo_id, {}).update(files)
        assert commit_message

    def _fail(self, place):
        if self.fails_in == place:
            raise self.error


@pytest.fixture
def there(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    return fake


def quantized():
    model = mlp()
    insert_quantizers(model, "w4a8")
    return model


@pytest.mark.parametrize(("given", "full"), [("owner/name", "owner/name"), ("name", "me/name")])
def test_the_whole_folder_is_uploaded_to_a_private_repository(given, full, there, tmp_path):
    folder = export(quantized(), tmp_path / "out", push_to_hub=given)
    assert there.files == {full: {file.name: file.read_bytes() for file in folder.iterdir()}}
    assert {"README.md", "manifest.json", "model.safetensors"} <= there.files[full].keys()
    assert there.private == {full: True}


def test_a_repository_that_exists_stays_public_and_keeps_its_other_files(there, tmp_path):
    there.private["owner/name"], there.files["owner/name"] = False, {"mine.txt": b"mine"}
    export(quantized(), tmp_path / "out", push_to_hub="owner/name")
    assert there.private == {"owner/name": False}
    assert there.files["owner/name"]["mine.txt"] == b"mine"


def test_what_was_uploaded_is_read_as_an_export(there, tmp_path):
    export(quantized(), tmp_path / "out", push_to_hub="name")
    (tmp_path / "snapshot").mkdir()
    for name, content in (there.files["me/name"] | {".gitattributes": b"*.safetensors filter=lfs"}).items():
        (tmp_path / "blob").mkdir(exist_ok=True)
        (tmp_path / "blob" / name).write_bytes(content)
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blob" / name)  # as in the hub's cache
    load_quantized(tmp_path / "snapshot", model=mlp())


@pytest.mark.parametrize("place", ["create_repo", "upload_folder"])
@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("503"), ValueError("not yours")], ids=repr)
def test_a_failed_upload_leaves_the_export_and_tells_the_way(place, error, there, tmp_path):
    there.fails_in, there.error = place, error
    folder = tmp_path / "my export"
    with pytest.raises(UploadError, match=r"push_to_hub: the export in .*my export.* is complete and verified, but its upload") as raised:
        export(quantized(), folder, push_to_hub="owner/name")
    assert str(error) in str(raised.value)
    assert raised.value.__cause__ is error
    words = shlex.split(str(raised.value).rpartition("with: ")[2])
    assert words == ["hf", "upload", "--private", "owner/name", str(folder), "."]
    load_quantized(folder, model=mlp())


@pytest.mark.parametrize("name", ["a/b/c", "", " ", "../x", "a--b", "-a", "name.git", "x" * 100, "a b", "https://huggingface.co/a/b"])
def test_a_name_that_no_repository_has_is_refused_before_any_work(name, there, tmp_path):
    with pytest.raises(ValueError, match="push_to_hub: got"):
        export(quantized(), tmp_path / "out", push_to_hub=name)
    assert list(tmp_path.iterdir()) == []


def test_nobody_logged_in_is_told_before_any_work(there, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"push_to_hub: .*not logged in.*hf auth login"):
        export(quantized(), tmp_path / "out", push_to_hub="owner/name")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_uploaded_unless_asked(there, tmp_path):
    export(quantized(), tmp_path / "out")
    assert there.files == {}
