"""Files are whole or not there, and a stranger's file takes no more memory than it may."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import engine.files
from engine.files import read_bounded, replacing


@pytest.fixture(params=["unnamed", "no-unnamed", "no-links"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the system can do: files without a name, none, or none that a link could name."""
    if request.param == "no-unnamed":
        monkeypatch.setattr(engine.files, "_unnamed", lambda folder: None)
    if request.param == "no-links":

        def refuse(*arguments: object, **options: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "link", refuse)
    return str(request.param)


@pytest.mark.usefixtures("system")
def test_a_file_takes_its_place_whole(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"before")
    with replacing(str(tmp_path / "f")) as file:
        file.write(b"after")
        assert (tmp_path / "f").read_bytes() == b"before"
    assert (tmp_path / "f").read_bytes() == b"after"
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


@pytest.mark.usefixtures("system")
def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"before")
    with pytest.raises(KeyError), replacing(str(tmp_path / "f")) as file:
        file.write(b"half")
        raise KeyError
    assert (tmp_path / "f").read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from engine.files import replacing\n"
        "with replacing(sys.argv[1]) as file:\n"
        "    file.write(bytes(1 << 20)); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")])
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(str(tmp_path / "none" / "f")):
        pass


def test_a_plain_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    assert read_bounded(str(tmp_path / "link"), 5) == b"12345"
    with pytest.raises(OSError, match="larger than"):
        read_bounded(str(tmp_path / "f"), 4)


def test_devices_and_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path)):
        with pytest.raises(OSError, match="not a plain file"):
            read_bounded(path, 1 << 20)
