"""Whole files or none, also after a power cut."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from reports.errors import ReportError
from reports.files import replacing


def test_content_is_synced_before_the_name_and_the_name_after_it(tmp_path: Path, monkeypatch) -> None:
    target, synced = tmp_path / "report.html", []
    fsync = os.fsync

    def noted(handle: int) -> None:
        synced.append((Path(f"/proc/self/fd/{handle}").readlink().is_dir(), target.exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with replacing(target) as file:
        file.write(b"whole")
    assert set(synced[:-1]) == {(False, False)}
    assert synced[-1] == (True, True)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_syncs_no_folders_is_written_to(tmp_path: Path, monkeypatch, number: int) -> None:
    fsync = os.fsync

    def fail(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().is_dir():
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with replacing(tmp_path / "report.html") as file:
        file.write(b"whole")
    assert (tmp_path / "report.html").read_bytes() == b"whole"


def test_a_disk_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "report.html"
    target.write_bytes(b"before")

    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(ReportError, match=r"cannot write .*report\.html: Input/output error"),
        replacing(target) as file,
    ):
        file.write(b"after")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]
