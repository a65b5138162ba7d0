"""Gives numpy to a device whose Python has none, without root and without a network there.

The controller fetches the wheel that suits the device's Python, C library and processor, keeps it, sends it by content
hash like a container, and has it unpacked into the farm's own folder: a wheel is a zip. Nothing of the device's own is
changed. A launcher in it, ROOT/sites/<sha256[:16]>/python3, starts the device's Python with that folder on its path.

Only wheels whose hashes stand in numpy.sha256 are used. A wheel is compared with its hash when it is fetched, when it
is taken from the cache, and on the device before it is unpacked. What is unpacked there is compared file by file
whenever a session begins.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from engine.codec import from_json, loads
from engine.errors import ProtocolError
from harness.device.deploy import FarmFolder, HashCache, difference, hashes_in_zip, put_blob
from harness.device.probe import PROBE_DEADLINE_S, Python, find_python
from harness.errors import PythonMissingError
from harness.transport import Transport
from reports.files import moved
from reports.text import harmless

LOCKED = Path(__file__).with_name("numpy.sha256")
FETCH_DEADLINE_S = 300.0
OLDEST_GLIBC_MINOR = 5  # manylinux1
_OLD_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
_ONE_AT_A_TIME = threading.Lock()  # many devices of a kind come at once: the first fetches for all

# Runs on the device's Python >= 3.8.
_TAGS = """\
import glob, json, os, platform, struct, sys
try:
    glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").rpartition(" ")[2]
except (ValueError, OSError, AttributeError):
    glibc = ""
machine = platform.machine().lower()
if struct.calcsize("P") == 4:
    machine = {"aarch64": "armv7l", "armv8l": "armv7l", "x86_64": "i686"}.get(machine, machine)
print(json.dumps({
    "implementation": sys.implementation.name, "version": list(sys.version_info[:2]), "abi_flags": sys.abiflags,
    "machine": machine, "glibc": glibc, "musl": not glibc and bool(glob.glob("/lib/ld-musl-*")),
    "android": hasattr(sys, "getandroidapilevel") or "ANDROID_ROOT" in os.environ,
}))
"""
_WRITE_LAUNCHER = (
    'umask 077; rm -f -- "$1.$$.part"; cat >"$1.$$.part" && chmod 700 "$1.$$.part" && '
    '{ sync "$1.$$.part" 2>/dev/null || sync; } && '
    'mv -f -- "$1.$$.part" "$1" && { sync "${1%/*}" 2>/dev/null || sync; }'
)


class WheelError(Exception):
    """Says why there is no wheel, in words that fit into brackets."""


@dataclass(frozen=True)
class Interpreter:
    """Describes what decides which wheels a Python can use (PEP 425, 600 and 656)."""

    implementation: str
    version: tuple[int, int]
    abi_flags: str
    machine: str
    glibc: str  # its version; empty where it is another library
    musl: bool
    android: bool

    def __post_init__(self) -> None:
        """Refuses odd answers: a device may answer anything, and this becomes the name of a folder here."""
        for part in (self.implementation, self.abi_flags, self.machine, self.glibc):
            if not re.fullmatch(r"[a-z0-9_.]{0,30}", part) or ".." in part:
                raise ProtocolError(f"{part!r:.40} is no part of a platform's name")

    @property
    def abi(self) -> str:
        return "cp{}{}{}".format(*self.version, self.abi_flags)

    @property
    def platforms(self) -> tuple[str, ...]:
        """Returns the platforms' names, best first; none where nobody builds wheels."""
        plain = f"linux_{self.machine}"  # what piwheels.org calls its own
        if self.implementation != "cpython" or self.android:
            return ()
        if self.musl:
            return (f"musllinux_1_2_{self.machine}", f"musllinux_1_1_{self.machine}", plain)
        major, _, minor = self.glibc.partition(".")
        if major != "2" or not minor.isdigit():
            return ()
        names = []
        for older in range(min(int(minor), 99), OLDEST_GLIBC_MINOR - 1, -1):
            names.append(f"manylinux_2_{older}_{self.machine}")
            names += [f"{_OLD_NAMES[older]}_{self.machine}"] if older in _OLD_NAMES else []
        return (*names, plain)


def locked_wheels(path: Path = LOCKED) -> dict[str, str]:
    """Returns the SHA-256 of each numpy wheel that a device may get, by its file name."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines if line[:1] != "#")}


@dataclass(frozen=True)
class Wheel:
    """Names a wheel on the controller that was compared with its hash."""

    path: Path
    sha256: str


class WheelCache:
    """Keeps numpy wheels on the controller, one for each kind of device; safe to share between threads."""

    def __init__(self, folder: Path, *, offline: bool = False, locked: Mapping[str, str] | None = None) -> None:
        """Takes the hashes of the wheels that may be used, by file name; by default those of numpy.sha256."""
        self._folder = folder
        self._offline = offline
        self._locked = locked_wheels() if locked is None else locked

    def numpy(self, interpreter: Interpreter) -> Wheel:
        """Returns the wheel for such a Python; fetches it with pip where none is whole. Raises WheelError."""
        if not interpreter.platforms:
            raise WheelError("no wheels are made for such a Python")
        name = self._best(interpreter)
        kept, digest = self._folder / name, self._locked[name]
        with _ONE_AT_A_TIME:
            try:
                if kept.is_file() and _sha256(kept) == digest:
                    return Wheel(kept, digest)
                if self._offline:
                    state = f"{kept} is damaged" if kept.exists() else f"none is in {self._folder}"
                    raise WheelError(f"{state}, and --offline forbids to fetch one")
                self._fetch(interpreter, kept, digest)
            except OSError as error:
                raise WheelError(f"none can be kept in {self._folder}: {error.strerror or error}") from None
        return Wheel(kept, digest)

    def _best(self, interpreter: Interpreter) -> str:
        """Returns the name of the newest locked wheel that such a Python can use."""
        usable = []
        for name in self._locked:
            _, version, _, abi, platforms = name.removesuffix(".whl").split("-")
            if abi == interpreter.abi and set(platforms.split(".")) & set(interpreter.platforms):
                usable.append((tuple(int(part) for part in version.split(".")), name))
        if not usable:
            raise WheelError(f"no wheel is locked for {interpreter.abi} on {interpreter.platforms[0]}")
        return max(usable)[1]

    def _fetch(self, interpreter: Interpreter, kept: Path, digest: str) -> None:
        command = [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet",
            "--no-deps", "--only-binary=:all:", "--require-hashes", "--implementation", "cp",
            "--python-version", "{}.{}".format(*interpreter.version),
            "--abi", interpreter.abi,
        ]  # fmt: skip
        for platform in interpreter.platforms:
            command += ["--platform", platform]
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".fetching-") as scratch:
            wanted = Path(scratch) / "wanted.txt"
            wanted.write_text(f"numpy=={kept.name.split('-')[1]} --hash=sha256:{digest}\n", encoding="utf-8")
            try:
                done = subprocess.run(
                    [*command, "--dest", scratch, "--requirement", str(wanted)],
                    capture_output=True, text=True, timeout=FETCH_DEADLINE_S,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as error:
                raise WheelError(f"pip here could not fetch one: {error}") from None
            if "DO NOT MATCH THE HASHES" in done.stderr:
                raise WheelError(f"the index's {kept.name} is not the one that is locked: it was changed")
            fetched = sorted(Path(scratch).glob("numpy-*.whl"))
            if done.returncode != 0 or not fetched:
                raise WheelError(f"pip here could not fetch {kept.name}: {_last_error(done.stderr)}")
            if _sha256(fetched[0]) != digest:
                raise WheelError(f"the index's {kept.name} is not the one that is locked: it was changed")
            moved(fetched[0], kept)


def bootstrap(
    transport: Transport,
    place: FarmFolder,
    missing: PythonMissingError,
    wheels: WheelCache,
    hashes: HashCache,
    unpack: Callable[[str, str], object],
) -> Python:
    """Gives numpy to the Python that `missing` found without it.

    `unpack(folder, archive)` unpacks an archive that is on the device. Raises DeviceError: `missing` itself, with the
    reason why nothing could be done about it.
    """
    what, _, remedy = str(missing).rpartition(": ")
    if missing.bare is None:
        raise missing
    try:
        wheel = wheels.numpy(_interpreter(transport, missing.bare))
    except WheelError as error:
        raise PythonMissingError(f"{what} ({error}): {remedy}") from None
    site = place.site(wheel.sha256)
    launcher = f"{site}/python3"
    script = f'#!/bin/sh\nPYTHONPATH={shlex.quote(site)} exec {shlex.quote(missing.bare)} "$@"\n'
    fresh = False
    while True:
        if fresh or difference(transport, missing.bare, site, _files_in(wheel)) is not None:
            archive = put_blob(transport, missing.bare, place, wheel.path, hashes, planned=wheel.sha256)
            unpack(site, archive)
            transport.run(["rm", "-rf", "--", os.path.dirname(archive)], deadline_s=PROBE_DEADLINE_S)  # noqa: PTH120 - its path there
            fresh = True
        command = ["sh", "-c", _WRITE_LAUNCHER, "sh", launcher]
        transport.run(command, deadline_s=PROBE_DEADLINE_S, stdin=script.encode("utf-8", "surrogateescape"))
        try:
            return replace(find_python(transport, launcher), path=launcher)
        except PythonMissingError as error:
            if not fresh:  # every file is whole, but what Python has compiled of it may not be
                transport.run(["rm", "-rf", "--", site], deadline_s=PROBE_DEADLINE_S)
                fresh = True
                continue
            why = str(error).rpartition(": ")[0].removeprefix(f"{transport.name}: ")
            raise PythonMissingError(
                f"{what} ({wheel.path.name} was put there, and does not work: {why}): {remedy}"
            ) from None


@lru_cache(8)
def _files_in(wheel: Wheel) -> dict[str, str]:
    """Returns the hashes of the files in a wheel."""
    return hashes_in_zip(wheel.path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _interpreter(transport: Transport, python: str) -> Interpreter:
    done = transport.run([python, "-I", "-c", _TAGS], deadline_s=PROBE_DEADLINE_S)
    try:
        return from_json(Interpreter, loads(done.stdout.strip().rpartition(b"\n")[2]))
    except ProtocolError as error:
        raise PythonMissingError(
            f"{transport.name}: {python} gave no sensible answer ({error}): set `python` in the inventory"
        ) from None


def _last_error(stderr: str) -> str:
    lines = [line.removeprefix("ERROR: ") for line in stderr.strip().splitlines() if line.strip()]
    return harmless(lines[-1], limit=200) if lines else "it gave no reason"
