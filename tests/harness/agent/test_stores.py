"""What was sent to a device: it appears whole or not at all, and what is not what was sent is found."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import agent
from harness.agent import files, place, stores

FILES = {"engine/__init__.py": "", "engine/__main__.py": "print(1)", "engine/device/watch.py": "pass"}
CONTENT = b"a container" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Path(place.prepare(str(tmp_path / "farm")))


def packed(contents: dict[str, str]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return packed.getvalue()


@pytest.fixture
def engine(root: Path) -> Path:
    folder = root / "engines" / ("a" * 16)
    stores.install(str(folder), packed(FILES))
    return folder


def wanted() -> dict[str, str]:
    return {name: hashlib.sha256(content.encode()).hexdigest() for name, content in FILES.items()}


def difference(engine: Path) -> str | None:
    return stores.difference(str(engine), wanted())


def test_an_installed_engine_is_what_was_sent(engine: Path) -> None:
    assert difference(engine) is None
    assert [path.name for path in engine.parent.iterdir()] == [engine.name]


def _link(engine: Path) -> None:
    (engine / "engine/__main__.py").rename(engine.parent / "moved")
    (engine / "engine/__main__.py").symlink_to(engine.parent / "moved")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: (e / "engine/__main__.py").write_text("print(2)"), "engine/__main__.py has changed"),
        (lambda e: (e / "engine/__main__.py").write_text(""), "engine/__main__.py has changed"),
        (lambda e: (e / "engine/device/watch.py").unlink(), "engine/device/watch.py is missing"),
        (lambda e: (e / "numpy.py").write_text(""), "numpy.py was not sent"),
        (lambda e: e.rename(e.with_name("b" * 16)), "it is missing"),
        (_link, "engine/__main__.py is no plain file"),
    ],
)
def test_an_engine_that_was_changed_is_found_and_installed_again(
    engine: Path, change: Callable[[Path], object], said: str
) -> None:
    change(engine)
    assert difference(engine) == said
    stores.install(str(engine), packed(FILES))
    assert difference(engine) is None


def test_an_engine_behind_a_link_is_none_and_its_target_stays(engine: Path, tmp_path: Path) -> None:
    engine.rename(tmp_path / "elsewhere")
    engine.symlink_to(tmp_path / "elsewhere")
    assert difference(engine) == "it is not the farm's own folder"
    stores.install(str(engine), packed(FILES))
    assert difference(engine) is None
    assert (tmp_path / "elsewhere" / "engine/__main__.py").exists()


def test_what_python_compiled_of_an_engine_is_not_believed(engine: Path) -> None:
    (engine / "engine/__pycache__").mkdir()
    (engine / "engine/__pycache__/__main__.cpython-311.pyc").write_bytes(b"half")
    assert difference(engine) is None
    assert not (engine / "engine/__pycache__").exists()


def test_what_is_installed_is_this_users_alone(root: Path) -> None:
    site = root / "sites" / ("b" * 16)
    command = [sys.executable, "-I", "-c", agent._BOOT, str(len(agent.AGENT)), "install", str(site)]
    subprocess.run(command, input=agent.AGENT + packed(FILES), check=True)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (site, *site.rglob("*")))


def test_a_launcher_may_lie_in_a_site(root: Path) -> None:
    site = root / "sites" / ("a" * 16)
    stores.install(str(site), packed(FILES))
    (site / "python3").write_text("#!/bin/sh")
    assert difference(site) is None
    (site / "engine/__main__.py").write_text("")
    assert difference(site) == "engine/__main__.py has changed"


def test_what_is_installed_is_synced_before_it_has_its_name(root: Path, monkeypatch) -> None:
    """Every file and every folder, and then the name."""
    engine, synced, was_there = root / "engines" / ("a" * 16), set[str](), []
    fsync = os.fsync

    def noted(handle: int) -> None:
        path = str(Path(f"/proc/self/fd/{handle}").readlink())
        synced.add(path.replace(f".{os.getpid()}.part", ""))
        was_there.append(engine.exists())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    stores.install(str(engine), packed(FILES))
    folders = {"", "/engine", "/engine/device"}
    assert synced == {f"{engine}{each}" for each in folders} | {f"{engine}/{name}" for name in FILES} | {
        str(engine.parent)
    }
    assert was_there == [False] * (len(synced) - 1) + [True], "only the name is synced after the rename"


def test_a_small_file_and_its_name_survive_a_power_cut(tmp_path: Path, monkeypatch) -> None:
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda h: (synced.append(Path(f"/proc/self/fd/{h}").readlink().name), fsync(h)))
    files.write(str(tmp_path), "lease.json", {})
    assert synced == ["lease.json.part", tmp_path.name]


def test_a_small_file_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    for name in ("lease.json.part", "lease.json"):
        (tmp_path / name).symlink_to("letter")
    assert files.read(str(tmp_path), "lease.json") is None
    files.write(str(tmp_path), "lease.json", {"a": 1})
    assert (tmp_path / "letter").read_text() == "dear"
    assert files.read(str(tmp_path), "lease.json") == {"a": 1}
    os.mkfifo(tmp_path / "alive.json")
    assert files.read(str(tmp_path), "alive.json") is None


# --- blobs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def blob(root: Path) -> Path:
    folder = root / "blobs" / SHA256
    folder.mkdir()
    (folder / "model.emoe").write_bytes(CONTENT)
    return folder / "model.emoe"


def look(blob: Path, how: str = "known", size: int = len(CONTENT)) -> str:
    return stores.look_at_blob(str(blob), SHA256, size, how)


def test_a_blob_is_hashed_once_and_proven_by_its_record_from_then_on(blob: Path, monkeypatch) -> None:
    assert look(blob) == "ok"
    monkeypatch.setattr(stores, "sha256_of", lambda file: pytest.fail("it was hashed a second time"))
    assert look(blob) == "ok"
    assert stores.unproven({str(blob): SHA256}) is None


def test_a_fresh_blob_is_not_read_a_second_time(blob: Path, monkeypatch) -> None:
    monkeypatch.setattr(stores, "sha256_of", lambda file: pytest.fail("the transport has just hashed it"))
    assert look(blob, "fresh") == "ok"
    assert look(blob) == "ok"


def _flip(blob: Path) -> None:
    """Changes a bit and sets all times back, as far as that can be done."""
    found = blob.stat()
    with blob.open("r+b") as file:
        file.write(b"b")
    os.utime(blob, ns=(found.st_atime_ns, found.st_mtime_ns))


def _other(blob: Path) -> None:
    found = blob.stat()
    blob.rename(blob.with_name("mine"))
    blob.write_bytes(bytes(len(CONTENT)))
    os.utime(blob, ns=(found.st_atime_ns, found.st_mtime_ns))


def _link_to_one_that_is_right(blob: Path) -> None:
    blob.rename(blob.parents[3] / "mine")
    blob.symlink_to(blob.parents[3] / "mine")


@pytest.mark.parametrize("change", [_flip, _other, _link_to_one_that_is_right, lambda blob: blob.write_bytes(b"")])
def test_a_blob_that_is_not_what_its_name_says_is_found_and_removed(
    blob: Path, change: Callable[[Path], object]
) -> None:
    assert look(blob) == "ok"
    change(blob)
    assert stores.unproven({str(blob): SHA256}) == str(blob)
    assert look(blob) == "damaged"
    assert not blob.parent.exists()
    assert look(blob) == "absent"
    assert list((blob.parents[1]).iterdir()) == []


def test_a_medium_that_returns_other_bytes_is_found_by_a_full_look(blob: Path, monkeypatch) -> None:
    assert look(blob) == "ok"
    monkeypatch.setattr(stores, "sha256_of", lambda file: "0" * 64)  # no time of change tells
    assert look(blob) == "ok"
    assert look(blob, "full", -1) == "damaged"


def test_a_medium_that_cannot_be_read_is_damage(blob: Path, monkeypatch) -> None:
    def fail(file: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(stores, "sha256_of", fail)
    assert look(blob) == "damaged"


def test_a_folder_of_blobs_that_is_a_link_is_not_emptied(blob: Path, tmp_path: Path) -> None:
    blob.parent.rename(tmp_path / "disk")
    blob.parent.symlink_to(tmp_path / "disk")
    assert look(blob) == "damaged"
    assert (tmp_path / "disk" / "model.emoe").read_bytes() == CONTENT
    assert not os.path.lexists(blob.parent)
