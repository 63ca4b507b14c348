"""Registries find what their package holds and refuse by name."""

from pathlib import Path

import pytest

from lightning_qat.registry import Registry, did_you_mean


def test_a_name_is_registered_once() -> None:
    things: Registry[int] = Registry("thing")
    assert things.add("one", 1) == 1
    things.register("two")(2)
    assert (things.names(), things.get("two"), "one" in things, "three" in things) == (["one", "two"], 2, True, False)
    with pytest.raises(ValueError, match="thing: the name 'one' is taken by 1"):
        things.add("one", 3)
    with pytest.raises(ValueError, match=r"thing: got 'tow', expected one of \['one', 'two'\]; did you mean 'two'\?"):
        things.get("tow")
    assert things.get("one") == 1


def test_a_registry_finds_the_modules_of_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shapes_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("from lightning_qat.registry import Registry\nshapes = Registry('shape', __name__)\n")
    (package / "square.py").write_text("from shapes_of_a_test import shapes\nshapes.add('square', 4)\n")
    (package / "circle.py").write_text("from shapes_of_a_test import shapes\nshapes.add('circle', 0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from shapes_of_a_test import shapes

    assert "circle" in shapes
    assert (shapes.names(), shapes.get("square")) == (["circle", "square"], 4)


def test_did_you_mean() -> None:
    assert did_you_mean("minmx", ["minmax", "lsq"]) == "expected one of ['lsq', 'minmax']; did you mean 'minmax'?"
    assert did_you_mean("zzz", ["minmax"]) == "expected one of ['minmax']"
