"""A device's folder is not believed: what is there is proven in each session, and what is not what was sent is sent
again, without being asked and without a word of it in a result."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.protocol import RunRequest
from harness.agent import place
from harness.device.remote import RemoteSession
from harness.errors import RemoteCommandError, UnfitError
from harness.transport.local import LocalTransport
from reports.records import Fault, RunStatus
from tests.integration.test_session import request

OLD = 1_000_000_000
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
Open = Callable[..., RemoteSession]


@pytest.fixture
def open_session(tmp_path: Path, stub_engine: Path) -> Iterator[Open]:
    sessions = []

    def make(root: str = "root", **changes: object) -> RemoteSession:
        options = {"cache_dir": tmp_path / "cache", "engine_source": stub_engine, "python": sys.executable, **changes}
        session = RemoteSession(lambda: LocalTransport("pi", tmp_path / "pi"), root=root, **options)  # type: ignore[arg-type]
        sessions.append(session)
        return session

    yield make
    for session in sessions:
        session.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "pi" / "root"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.emoe"
    path.write_bytes(os.urandom(300_000))
    return path


def with_container(path: str, run_id: str) -> RunRequest:
    return replace(request(run_id=run_id), container=path)


def test_a_folder_of_the_users_is_refused_and_keeps_all_that_is_in_it(open_session: Open, root: Path) -> None:
    old = root / "runs" / "2019-thesis"
    old.mkdir(parents=True)
    (old / "weights").write_text("years of work")
    for path in (old / "weights", old):
        os.utime(path, (OLD, OLD))
    with pytest.raises(UnfitError, match=r"pi: .*/root is not empty, and the farm did not make it: set `root`"):
        open_session()
    assert (old / "weights").read_text() == "years of work"
    assert [path.name for path in root.iterdir()] == ["runs"]


def test_the_farms_folder_is_closed_to_others(open_session: Open, root: Path, model: Path) -> None:
    root.parent.mkdir()
    before = os.umask(0)
    try:
        session = open_session()
        session.put(model)
        assert session.execute(request(), keep=True).status is RunStatus.OK
    finally:
        os.umask(before)
    everything = [path for path in (root, *root.rglob("*")) if "__pycache__" not in path.parts]
    assert [path for path in everything if path.stat().st_mode & 0o077] == []


@pytest.mark.parametrize("change", ["edited", "emptied", "removed", "shadowed", "linked"])
def test_an_engine_that_is_not_what_was_sent_is_sent_again(
    open_session: Open, root: Path, tmp_path: Path, change: str
) -> None:
    first = open_session()
    (engine,) = (root / "engines").iterdir()
    main = engine / "engine" / "__main__.py"
    content = main.read_text()
    if change == "edited":
        main.write_text(content + "\n# faster")
    elif change == "emptied":  # as after a power cut
        for path in engine.rglob("*.py"):
            path.write_text("")
    elif change == "removed":
        shutil.rmtree(engine)
    elif change == "shadowed":
        (engine / "json.py").write_text("raise SystemExit(1)")
    else:
        engine.rename(tmp_path / "theirs")
        engine.symlink_to(tmp_path / "theirs")
    again = open_session()
    assert again.bytes_sent == first.bytes_sent
    assert main.read_text() == content
    assert not (engine / "json.py").exists()
    assert not engine.is_symlink()
    assert again.execute(request()).status is RunStatus.OK


def test_another_container_of_the_same_length_under_the_hash_is_replaced(open_session: Open, model: Path) -> None:
    path = Path(open_session().put(model))
    path.write_bytes(os.urandom(300_000))
    again = open_session()
    assert Path(again.put(model)).read_bytes() == model.read_bytes()
    assert again.bytes_sent == 300_000


def test_a_container_that_is_not_the_planned_one_is_not_measured(open_session: Open, model: Path, root: Path) -> None:
    session = open_session()
    planned = session._cache.sha256(model)
    model.write_bytes(os.urandom(300_000))  # while others were uploading
    with pytest.raises(RemoteCommandError, match=r"pi: .*model\.emoe is not the file that was planned.*plan anew"):
        session.put(model, sha256=planned)
    assert list((root / "blobs").iterdir()) == []


def test_a_planned_container_that_a_device_has_is_proven_there(open_session: Open, model: Path) -> None:
    session = open_session()
    planned = session._cache.sha256(model)
    path = session.put(model, sha256=planned)
    Path(path).write_bytes(os.urandom(300_000))
    outcome = session.execute(with_container(path, "run-1"))
    assert (outcome.status, outcome.fault) == (RunStatus.FAILED, Fault.STORAGE), outcome.reasons
    assert f"{path} on the device is not what was sent" in outcome.reasons[0]
    assert session.damage(thorough=False) == f"{path} was missing or damaged"
    assert Path(session.put(model, sha256=planned)).read_bytes() == model.read_bytes()
    assert session.execute(with_container(path, "run-2")).status is RunStatus.OK


@pytest.mark.parametrize("lost", ["engines", "blobs", "runs", "lease", "", ".edgemoe-farm"])
def test_what_is_lost_between_two_runs_is_a_fault_of_storage_and_comes_back(
    open_session: Open, root: Path, model: Path, lost: str
) -> None:
    session = open_session()
    path = session.put(model)
    assert session.execute(with_container(path, "run-1")).status is RunStatus.OK
    gone = root / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    if lost == ".edgemoe-farm":  # a folder without it is anybody's
        assert session.execute(with_container(path, "run-2")).fault is Fault.STORAGE
        with pytest.raises(UnfitError, match="is not empty"):
            session.damage(thorough=True)
        return
    outcome = session.execute(with_container(path, "run-2"))
    assert outcome.fault is not None
    session.damage(thorough=True)
    assert session.execute(with_container(session.put(model), "run-3")).status is RunStatus.OK
    place.verify(str(root))


@needs_root
def test_a_folder_that_another_disk_hides_is_a_fault_of_storage(open_session: Open, root: Path, model: Path) -> None:
    session = open_session()
    path = session.put(model)
    assert session.execute(with_container(path, "run-1")).status is RunStatus.OK
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m,mode=755", "tmpfs", str(root)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        outcome = session.execute(with_container(path, "run-2"))
        assert (outcome.status, outcome.fault) == (RunStatus.FAILED, Fault.STORAGE), outcome.reasons
        assert "is not the farm's folder any more" in outcome.reasons[0]
        assert list(root.iterdir()) == [], "nothing is made in a folder that may be another's"
        assert "the engine in" in str(session.damage(thorough=True))
        assert session.execute(with_container(session.put(model), "run-3")).status is RunStatus.OK
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


def test_an_upload_follows_no_link(tmp_path: Path, model: Path) -> None:
    transport = LocalTransport("pi", tmp_path / "pi")
    letter, digest = tmp_path / "letter", hashlib.sha256(model.read_bytes()).hexdigest()
    letter.write_text("dear")
    transport.upload(model, "there/model", sha256=digest)
    target = tmp_path / "pi" / "there" / "model"
    assert target.stat().st_mode & 0o077 == 0
    part = target.with_name(f"model.{digest[:16]}.part")
    for link in (part, target):
        link.unlink(missing_ok=True)
        link.symlink_to(letter)
    transport.upload(model, "there/model")
    assert target.read_bytes() == model.read_bytes()
    assert not target.is_symlink()
    (tmp_path / "pi" / "linked").symlink_to(tmp_path)
    with pytest.raises(RemoteCommandError, match="linked is a link, which is not followed"):
        transport.upload(model, "linked/model2")
    assert letter.read_text() == "dear"
    assert not (tmp_path / "model2").exists()
