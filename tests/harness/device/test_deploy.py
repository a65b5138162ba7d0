from __future__ import annotations

import hashlib
import io
import os
import sqlite3
import threading
import time
import zipfile
from contextlib import closing

import pytest

from harness.device.deploy import ENGINE_SOURCE, EngineBundle, HashCache, UploadTurns, engine_bundle, safe_name
from harness.errors import UsageError


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_a_hash_is_remembered_until_the_file_changes(tmp_path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"one")
    os.utime(file, ns=(10**18, 10**18))
    cache = HashCache(tmp_path / "cache", now_ns=lambda: time.time_ns() + 10**11)
    assert cache.sha256(file) == sha256(b"one")
    with closing(sqlite3.connect(tmp_path / "cache" / "sha256.sqlite")) as database, database:
        database.execute("UPDATE v1 SET sha256 = ?", ("0" * 64,))
    assert HashCache(tmp_path / "cache").sha256(file) == "0" * 64  # remembered, and not hashed again
    with file.open("r+b") as handle:  # same size, inode and, by force, time of change of the content
        handle.write(b"two")
    os.utime(file, ns=(10**18, 10**18))
    assert HashCache(tmp_path / "cache").sha256(file) == sha256(b"two")
    os.utime(file, ns=(10**18, 10**18 + 1))
    assert cache.sha256(file) == sha256(b"two")


def test_a_file_that_was_written_just_now_is_not_remembered(tmp_path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"one")
    os.utime(file, ns=(10**18, 10**18))
    cache = HashCache(tmp_path / "cache", now_ns=lambda: 10**18 + 10**9)
    assert cache.sha256(file) == sha256(b"one")
    file.write_bytes(b"two")
    os.utime(file, ns=(10**18, 10**18))
    assert cache.sha256(file) == sha256(b"two")


def test_a_file_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"none\.bin cannot be read: No such file"):
        HashCache(tmp_path / "cache").sha256(tmp_path / "none.bin")


def test_the_bundle_holds_what_a_device_needs_and_its_hash_is_of_the_content() -> None:
    bundle = EngineBundle.of(ENGINE_SOURCE)
    names = zipfile.ZipFile(io.BytesIO(bundle.content)).namelist()
    assert "engine/__main__.py" in names
    assert not [n for n in names if "offline" in n or "__pycache__" in n or "tests" in n]


def test_the_same_engine_is_the_same_bundle_whenever_it_is_packed(monkeypatch) -> None:
    now = EngineBundle.of(ENGINE_SOURCE)
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.0)
    assert EngineBundle.of(ENGINE_SOURCE) == now


def test_any_change_changes_the_hash_of_the_bundle(tmp_path) -> None:
    source = tmp_path / "engine"
    source.mkdir()
    (source / "__main__.py").write_text("a")
    hashes = {EngineBundle.of(source).sha256}
    (source / "__main__.py").write_text("b")
    hashes.add(EngineBundle.of(source).sha256)
    (source / "more.py").write_text("")
    hashes.add(EngineBundle.of(source).sha256)
    (source / "more.py").rename(source / "other.py")
    hashes.add(EngineBundle.of(source).sha256)
    assert len(hashes) == 4


def test_a_folder_that_is_no_engine(tmp_path) -> None:
    with pytest.raises(UsageError, match="is not an engine"):
        EngineBundle.of(tmp_path)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("model-1.moe", "model-1.moe"),
        ("a b;c'd.moe", "a_b_c_d.moe"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("-rf", "rf"),
        ("...", "unnamed"),
        ("é" * 300, "_" * 100),
    ],
)
def test_safe_names(name, safe) -> None:
    assert safe_name(name) == safe


def test_the_engine_is_packed_once_for_all_devices() -> None:
    assert engine_bundle(ENGINE_SOURCE) is engine_bundle(ENGINE_SOURCE)
    assert engine_bundle(ENGINE_SOURCE) == EngineBundle.of(ENGINE_SOURCE)


def test_uploads_take_turns() -> None:
    turns, busy, most = UploadTurns(2), [], []
    together = threading.Barrier(2)

    def upload() -> None:
        with turns.taken(None):
            busy.append(1)
            most.append(len(busy))
            together.wait(30)  # two at once, or this never ends
            busy.pop()

    threads = [threading.Thread(target=upload) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert max(most) == 2
    assert not busy


def test_who_waits_for_a_turn_may_give_up() -> None:
    class Stopped(Exception):
        pass

    def stop(present: int) -> None:
        raise Stopped

    turns = UploadTurns(1)
    with turns.taken(None), pytest.raises(Stopped), turns.taken(stop):
        pytest.fail("the turn was taken twice")
    with turns.taken(stop):
        pass


@pytest.mark.parametrize("how", ["not a database", "cut off", "another table", "a folder", "a false hash"])
def test_a_damaged_cache_of_hashes_costs_nothing_but_time(tmp_path, how, caplog) -> None:
    file, folder = tmp_path / "model.emoe", tmp_path / "cache"
    file.write_bytes(b"weights" * 999)
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    later = {"now_ns": lambda: file.stat().st_mtime_ns + 10**10}
    assert HashCache(folder, **later).sha256(file) == right
    database = folder / "sha256.sqlite"
    if how == "not a database":
        database.write_bytes(b"\xff" * 9000)
    elif how == "cut off":
        database.write_bytes(database.read_bytes()[:5000])
    elif how == "a folder":
        database.unlink()
        database.mkdir()
    else:
        with closing(sqlite3.connect(database)) as connection, connection:
            change = "UPDATE v1 SET sha256 = 'x'" if how == "a false hash" else "ALTER TABLE v1 RENAME TO v0"
            connection.execute(change)
    assert HashCache(folder, **later).sha256(file) == right
    assert HashCache(folder, **later).sha256(file) == right
    assert ("put aside" in caplog.text) is (how in ("not a database", "cut off"))
