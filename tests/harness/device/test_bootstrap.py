"""Which wheels a Python can use."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.tags import platform_tags

from engine.codec import from_json
from engine.errors import ProtocolError
from harness.device.bootstrap import _TAGS, Interpreter, WheelCache, WheelError, locked_wheels


def interpreter(**changes) -> Interpreter:
    usual = {"implementation": "cpython", "version": (3, 11), "abi_flags": "", "machine": "aarch64", "glibc": "2.36",
             "musl": False, "android": False}  # fmt: skip
    return Interpreter(**{**usual, **changes})


def test_a_raspberry_pi_takes_every_wheel_of_an_older_c_library() -> None:
    platforms = interpreter().platforms
    assert platforms[0] == "manylinux_2_36_aarch64"
    assert "manylinux_2_37_aarch64" not in platforms
    assert {"manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"} < set(platforms)
    assert interpreter().abi == "cp311"


@pytest.mark.parametrize(
    ("changes", "platform"),
    [
        ({"glibc": "", "musl": True}, "musllinux_1_2_aarch64"),
        ({"machine": "armv7l"}, "linux_armv7l"),
        ({"version": (3, 13), "abi_flags": "t"}, "manylinux2014_aarch64"),
    ],
)
def test_other_systems(changes, platform) -> None:
    assert platform in interpreter(**changes).platforms


def test_a_free_threaded_python_has_an_abi_of_its_own() -> None:
    assert interpreter(version=(3, 13), abi_flags="t").abi == "cp313t"


@pytest.mark.parametrize("changes", [{"android": True}, {"implementation": "pypy"}, {"glibc": ""}, {"glibc": "3.0"}])
def test_for_some_nobody_makes_wheels(changes, tmp_path) -> None:
    assert interpreter(**changes).platforms == ()
    with pytest.raises(WheelError, match="no wheels are made"):
        WheelCache(tmp_path).numpy(interpreter(**changes))


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_wheel_that_was_left_half_written_is_fetched_again(tmp_path, monkeypatch, damage) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("numpy/__init__.py", "x" * 1000)
    whole = content.getvalue()
    kept = tmp_path / "numpy-2.0.0-cp311-cp311-manylinux_2_17_aarch64.whl"
    locked = {kept.name: hashlib.sha256(whole).hexdigest()}
    kept.write_bytes({"empty": b"", "cut": whole[:500], "flipped": whole.replace(b"xx", b"xy", 1)}[damage])
    fetched = []

    def pip(command, **options):
        fetched.append(command)
        (Path(command[command.index("--dest") + 1]) / kept.name).write_bytes(whole)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("harness.device.bootstrap.subprocess.run", pip)
    with pytest.raises(WheelError, match="offline"):
        WheelCache(tmp_path, offline=True, locked=locked).numpy(interpreter())
    cache = WheelCache(tmp_path, locked=locked)
    assert cache.numpy(interpreter()).path.read_bytes() == whole
    assert cache.numpy(interpreter()).path == kept
    assert len(fetched) == 1


@pytest.mark.parametrize(
    "changes", [{"machine": "../../etc"}, {"abi_flags": "/"}, {"glibc": "2.3\n"}, {"machine": "X" * 99}]
)
def test_a_device_cannot_name_a_folder_outside_the_cache(changes) -> None:
    with pytest.raises(ProtocolError, match="is no part of"):
        interpreter(**changes)


def test_this_python_is_described_as_packaging_describes_it() -> None:
    done = subprocess.run([sys.executable, "-I", "-c", _TAGS], capture_output=True, check=True)
    mine = from_json(Interpreter, json.loads(done.stdout))
    assert set(platform_tags()) <= set(mine.platforms)


def test_wheels_are_locked_by_hash() -> None:
    wheels = locked_wheels()
    assert len(wheels) > 30
    for name, digest in wheels.items():
        assert re.fullmatch(r"numpy-[0-9.]+-cp3\d+-cp3\d+t?-[a-z0-9_.]+\.whl", name), name
        assert re.fullmatch(r"[0-9a-f]{64}", digest), name


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("minor", range(8, 15))
def test_every_python_has_a_locked_wheel(minor: int, machine: str, tmp_path) -> None:
    cache = WheelCache(tmp_path)
    name = cache._best(interpreter(version=(3, minor), machine=machine))
    assert f"-cp3{minor}-cp3{minor}-" in name
    assert name.endswith(f"{machine}.whl")


def test_an_older_c_library_gets_an_older_wheel(tmp_path) -> None:
    cache = WheelCache(tmp_path)
    newest, older = cache._best(interpreter()), cache._best(interpreter(glibc="2.17"))
    assert newest != older
    assert "manylinux_2_17" in older


def test_what_has_no_locked_wheel_gets_none(tmp_path) -> None:
    with pytest.raises(WheelError, match="no wheel is locked for cp311 on manylinux_2_36_armv7l"):
        WheelCache(tmp_path).numpy(interpreter(machine="armv7l"))
    with pytest.raises(WheelError, match="no wheel is locked for cp399 on"):
        WheelCache(tmp_path).numpy(interpreter(version=(3, 99)))
