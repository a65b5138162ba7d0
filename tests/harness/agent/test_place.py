"""The farm's folder on a device: what is not proven to be its own is neither used, followed nor removed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from harness.agent import place, runs
from harness.agent.files import boot_id, since_boot_s
from harness.doctor import on_device

OLD = 1_000_000_000
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="files of another user need root")


def test_a_folder_of_its_own_is_made_for_this_user_alone(tmp_path: Path) -> None:
    os.umask(os.umask(0o022))
    root = Path(place.prepare(str(tmp_path / "a" / "farm")))
    assert root == tmp_path / "a" / "farm"
    assert root.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in root.iterdir()} == {place.MARKER, *place.KINDS}
    assert (root / place.MARKER).stat().st_mode & 0o777 == 0o600
    assert place.prepare(str(root)) == str(root)


def test_an_empty_folder_is_taken_and_a_marker_that_was_cut_off_made_again(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / f"{place.MARKER}.77.part").touch()
    place.prepare(str(tmp_path))
    place.verify(str(tmp_path))


@pytest.mark.parametrize("name", ["runs", "blobs", "engines", "thesis.odt", "lease"])
def test_a_folder_with_anything_in_it_but_no_marker_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(place.NotOursError, match=f"{tmp_path} is not empty, and the farm did not make it: set `root`"):
        place.prepare(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("mode", [0o777, 0o757])
def test_a_folder_or_a_parent_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    with pytest.raises(place.NotOursError, match=r"others may write to .*shared"):
        place.prepare(str(shared))
    with pytest.raises(place.NotOursError, match=r"others may write to .*shared, and so replace .*shared/farm: run"):
        place.prepare(str(shared / "farm"))
    with pytest.raises(place.NotOursError, match=r"others may write to .*shared"):
        place.prepare(str(shared / "below" / "farm"))
    assert list(shared.iterdir()) == []


def test_a_farm_that_others_were_let_into_is_refused(tmp_path: Path) -> None:
    root = Path(place.prepare(str(tmp_path / "farm")))
    root.chmod(0o777)
    with pytest.raises(place.NotOursError, match="others may write to"):
        place.prepare(str(root))
    with pytest.raises(place.NotOursError, match="others may write to"):
        place.verify(str(root))


@needs_root
def test_what_another_user_made_is_refused(tmp_path: Path) -> None:
    shared, theirs = tmp_path / "shared", tmp_path / "theirs"
    shared.mkdir()
    shared.chmod(0o1777)
    assert place.prepare(str(shared / "ours"))  # nobody else may rename or remove it
    (shared / "farm").mkdir()
    (shared / place.MARKER).touch()
    os.chown(shared / "farm", 4242, 4242)
    with pytest.raises(place.NotOursError, match=r"shared/farm belongs to another user \(number 4242\)"):
        place.prepare(str(shared / "farm"))
    (shared / "link").symlink_to(tmp_path)
    os.lchown(shared / "link", 4242, 4242)
    with pytest.raises(place.NotOursError, match=r"shared/link belongs to another user"):
        place.prepare(str(shared / "link" / "farm"))
    theirs.mkdir()
    os.chown(theirs, 4242, 4242)
    assert place.prepare(str(theirs / "farm")), "root may use a user's folder"


@needs_root
def test_a_user_refuses_what_another_user_could_replace(tmp_path: Path, monkeypatch) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 4242, 4242)
    monkeypatch.setattr(os, "geteuid", lambda: 4343)  # a user, who cannot see the folders of this test
    with pytest.raises(place.NotOursError, match=r"theirs belongs to another user .*, who may replace .*theirs/farm"):
        place.prepare(str(theirs / "farm"))


@needs_root
def test_a_group_of_others_may_not_write(tmp_path: Path) -> None:
    root = tmp_path / "farm"
    root.mkdir()
    os.chown(root, 0, 4242)
    root.chmod(0o770)
    with pytest.raises(place.NotOursError, match="others may write to"):
        place.prepare(str(root))
    os.chown(root, 0, 0)
    assert place.prepare(str(root)), "the group of this user alone"


@pytest.mark.parametrize("kind", place.KINDS)
def test_no_link_at_a_name_of_the_farm_is_followed(tmp_path: Path, kind: str) -> None:
    documents, root = tmp_path / "documents", Path(place.prepare(str(tmp_path / "farm")))
    documents.mkdir()
    (root / kind).rmdir()
    (root / kind).symlink_to(documents)
    for check in (place.prepare, place.verify):
        with pytest.raises(place.NotOursError, match=f"{root}/{kind} is a link or a file"):
            check(str(root))
    assert list(documents.iterdir()) == []


def test_a_marker_that_is_a_link_is_none(tmp_path: Path) -> None:
    (tmp_path / "else").touch()
    root = tmp_path / "farm"
    root.mkdir()
    (root / place.MARKER).symlink_to(tmp_path / "else")
    with pytest.raises(place.NotOursError, match="is not a file: remove it"):
        place.prepare(str(root))


def test_a_root_that_the_user_made_a_link_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "farm").symlink_to("disk")
    assert place.prepare(str(tmp_path / "farm")) == str(tmp_path / "disk")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(place.NotOursError, match="too many links"):
        place.prepare(str(tmp_path / "circle"))


def test_a_folder_whose_marker_went_is_not_the_farms_any_more(tmp_path: Path) -> None:
    root = Path(place.prepare(str(tmp_path / "farm")))
    (root / place.MARKER).unlink()
    with pytest.raises(place.NotOursError, match="is not the farm's folder any more"):
        place.verify(str(root))


# --- prune ------------------------------------------------------------------------------------------------------------


def old(path: Path, *, file: str = "") -> Path:
    path.mkdir(parents=True)
    if file:
        (path / file).write_text("x")
        os.utime(path / file, (OLD, OLD))
    os.utime(path, (OLD, OLD))
    return path


def prune(root: Path) -> list[str]:
    found = on_device.prune(str(root), "7", ",".join(on_device.FORMS), "0")
    return [each["name"] for each in found["removed"]]


def test_only_what_the_farm_made_is_pruned(tmp_path: Path) -> None:
    root = Path(place.prepare(str(tmp_path / "farm")))
    ours = [
        old(root / "engines" / ("a" * 16)), old(root / "sites" / ("b" * 16)), old(root / "blobs" / ("c" * 64)),
        old(root / "blobs" / ("d" * 64 + ".12.part")), old(root / "runs" / "run-1", file="holder.json"),
        old(root / "runs" / "run-2.7.part"),
    ]  # fmt: skip
    theirs = [
        old(root / "engines" / "v8"), old(root / "blobs" / "photos"), old(root / "runs" / "mlflow", file="meta.yaml"),
        old(root / "thesis"),
    ]  # fmt: skip
    disk = old(tmp_path / "disk" / ("e" * 64), file="letter")
    (root / "blobs" / ("e" * 64)).symlink_to(disk)
    assert sorted(prune(root)) == sorted(path.name for path in ours)
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in (*theirs, disk / "letter"))


def test_what_was_dated_before_the_clock_was_set_is_no_older_than_this_start(tmp_path: Path) -> None:
    """A board without a clock is in 1970 until a server of time answers; its run waits to be collected."""
    root = Path(place.prepare(str(tmp_path / "farm")))
    run = old(root / "runs" / "run-1", file="holder.json")
    blob = old(root / "blobs" / ("c" * 64))
    for path in (run / "holder.json", run, blob):
        os.utime(path, (400, 400))
    up_days = since_boot_s() / 86400
    assert on_device.unused(str(root), "runs", up_days + 1) == on_device.unused(str(root), "blobs", up_days + 1) == []
    assert on_device.unused(str(root), "runs", 0) == ["run-1"]


def test_a_run_that_began_since_the_start_is_no_older_whatever_its_date(tmp_path: Path) -> None:
    root = Path(place.prepare(str(tmp_path / "farm")))
    up_days = since_boot_s() / 86400
    for name, boot in (("this", boot_id()), ("former", "0")):
        run = old(root / "runs" / name, file="holder.json")
        (run / "engine.json").write_text(json.dumps({"boot_id": boot}))
        for path in (*run.iterdir(), run):
            os.utime(path, (OLD, OLD))
    (root / "runs" / "odd").mkdir()
    for content in ("[]", "{}", "nonsense"):
        odd = root / "runs" / "odd"
        (odd / "holder.json").write_text("{}")
        (odd / "engine.json").write_text(content)
        for path in (*odd.iterdir(), odd):
            os.utime(path, (OLD, OLD))
        assert sorted(on_device.unused(str(root), "runs", up_days + 1)) == ["former", "odd"]


def test_nothing_is_pruned_behind_a_link_or_without_the_marker(tmp_path: Path) -> None:
    root = Path(place.prepare(str(tmp_path / "farm")))
    disk = tmp_path / "disk"
    kept = old(disk / ("c" * 64), file="letter")
    (root / "blobs").rmdir()
    (root / "blobs").symlink_to(disk)
    assert prune(root) == []
    (root / "blobs").unlink()
    run = old(root / "runs" / "run-1", file="holder.json")
    (root / place.MARKER).unlink()
    assert prune(root) == []
    assert kept.exists()
    assert run.exists()


@needs_root
def test_what_another_user_put_there_is_not_pruned(tmp_path: Path) -> None:
    root = Path(place.prepare(str(tmp_path / "farm")))
    theirs = old(root / "blobs" / ("c" * 64), file="letter")
    os.chown(theirs, 4242, 4242)
    assert prune(root) == []
    assert theirs.exists()


def test_a_run_that_is_a_link_is_not_touched(tmp_path: Path) -> None:
    root = Path(place.prepare(str(tmp_path / "farm")))
    theirs = old(tmp_path / "theirs", file="alive")
    (theirs / "holder.json").write_text('{"holder": "ann"}')
    (root / "runs" / "run-1").symlink_to(theirs)
    assert runs.all_runs(str(root)) == []
    runs.discard(str(root / "runs" / "run-1"), "ann")
    assert sorted(path.name for path in theirs.iterdir()) == ["alive", "holder.json"]


def test_the_forms_of_names_are_the_same_on_both_sides() -> None:
    assert on_device.FORMS == place.FORMS
