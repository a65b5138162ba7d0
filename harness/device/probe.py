"""Finds the Python that will run the engine on a device, and reads the facts that the engine reports."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.codec import from_json, loads
from engine.errors import ProtocolError
from engine.protocol import ArithmeticTimes, DeviceFacts, StorageRates
from harness.errors import PythonMissingError, RemoteCommandError
from harness.transport import Transport

OLDEST_PYTHON = (3, 8)
CANDIDATES = ("python3", *(f"python3.{minor}" for minor in range(14, 7, -1)))
PROBE_DEADLINE_S = 120.0  # importing numpy takes seconds from a slow SD card, and a minute where much else goes on
SELFTEST_DEADLINE_S = 600.0  # 200 small decodings: ten seconds here, minutes on a Pi 3
ARITHMETIC_DEADLINE_S = 300.0  # the non-experts come from that card, too

T = TypeVar("T")

_KERNELS = """\
import json
import re
import signal
from engine.kernels import make_kernels
kernels, notes = make_kernels("auto")
print(json.dumps({"backend": kernels.backend, "notes": list(notes)}))
"""
IN_FOLDER = 'cd -- "$1" && shift && exec "$@"'  # $1: the engine's folder; the rest: the command

_ENDED = re.compile(r"ended ([0-9]{1,3}) (.+)")  # as SEARCH says it

# Runs on any Python: what is too old must be able to say so. It answers before it imports numpy, too, whose compiled
# parts may kill it: those of another processor do, with SIGILL.
_ASK = """\
import json, sys
answer = {"path": sys.executable, "version": list(sys.version_info[:3]), "numpy": None, "reason": ""}
print(json.dumps(answer))
sys.stdout.flush()
try:
    import numpy
    answer["numpy"] = str(numpy.__version__)
except Exception as error:
    answer["reason"] = "%s: %s" % (type(error).__name__, error)
print(json.dumps(answer))
sys.exit(not (tuple(sys.version_info[:2]) >= (3, 8) and answer["numpy"]))
"""
# $1: _ASK; the rest: candidates. Prints what system it is, then for each Python, up to the first good one, its JSON
# lines and how it ended.
SEARCH = (
    'echo "prefix ${PREFIX:-}"; grep -E "^ID(_LIKE)?=" /etc/os-release 2>/dev/null; ask=$1; shift; '
    '[ "$#" -gt 1 ] && [ -n "${PREFIX:-}" ] && set -- "$@" "$PREFIX/bin/python3"; '
    'for p in "$@"; do command -v "$p" >/dev/null 2>&1 || continue; '
    '"$p" -c "$ask" 2>/dev/null; s=$?; echo "ended $s $p"; [ "$s" = 0 ] && exit 0; done; exit 0'
)


@dataclass(frozen=True)
class Python:
    """Names an interpreter on a device that can run the engine."""

    path: str
    version: str
    numpy: str


@dataclass(frozen=True)
class KernelReport:
    """Tells which kernels do the arithmetic there, and why no better ones."""

    backend: str
    notes: tuple[str, ...]


def find_python(transport: Transport, declared: str | None = None) -> Python:
    """Returns the declared Python, or the first usual one that will do. Raises PythonMissingError, which says why."""
    candidates: Sequence[str] = (declared,) if declared else CANDIDATES
    done = transport.run(["sh", "-c", SEARCH, "sh", _ASK, *candidates], deadline_s=PROBE_DEADLINE_S)
    system, found, silent = _answers(transport.name, done.stdout.decode("utf-8", "replace"))
    for answer in found:
        if tuple(answer["version"]) >= OLDEST_PYTHON and answer["numpy"]:
            return Python(answer["path"], ".".join(map(str, answer["version"])), answer["numpy"])
    wanted = "python3 >= 3.8 with numpy"
    install = _install_command(" ".join(system))
    if not found:
        what = f"{declared} was not found" if declared else f"no {wanted} was found"
        if silent:  # it is there, and no answer came from it
            what = "; ".join(silent)
            install = "set `python` in the inventory to one that works"
        raise PythonMissingError(f"{transport.name}: {what}: {install}")
    new_enough = [a for a in found if tuple(a["version"]) >= OLDEST_PYTHON]
    if not new_enough:
        versions = ", ".join(f"{a['path']} is {'.'.join(map(str, a['version']))}" for a in found)
        raise PythonMissingError(
            f"{transport.name}: the engine needs {wanted}, {versions}: install a newer one and set `python` in the "
            "inventory"
        )
    first = new_enough[0]
    why = f" ({first['reason']})" if first["reason"] and "No module named" not in first["reason"] else ""
    if "is killed" in first["reason"]:
        install = "install there a numpy that was built for this processor, or leave `bootstrap` on"
    message = f"{transport.name}: {first['path']} has no usable numpy{why}: {install}"
    raise PythonMissingError(message, bare=first["path"])


def read_facts(transport: Transport, python: Python, engine_folder: str) -> DeviceFacts:
    """Asks the deployed engine; RemoteCommandError where it cannot say."""
    return _ask(DeviceFacts, transport, python, engine_folder, ["-m", "engine", "probe"], PROBE_DEADLINE_S)


def read_arithmetic(
    transport: Transport, python: Python, engine_folder: str, container: str, *, backend: str = "auto", threads: int = 0
) -> ArithmeticTimes:
    """Lets the deployed engine time a token of `container`, a path there; RemoteCommandError where it cannot."""
    arguments = ["-m", "engine", "arithmetic", container, "--backend", backend, "--threads", str(threads)]
    return _ask(ArithmeticTimes, transport, python, engine_folder, arguments, ARITHMETIC_DEADLINE_S)


def read_kernels(transport: Transport, python: Python, engine_folder: str) -> KernelReport:
    """Lets the deployed engine choose its kernels; RemoteCommandError where it cannot."""
    return _ask(KernelReport, transport, python, engine_folder, ["-c", _KERNELS], PROBE_DEADLINE_S)


def run_selftest(transport: Transport, python: Python, engine_folder: str, scratch: str) -> None:
    """Lets the deployed engine prove itself, in the folder `scratch`; RemoteCommandError says what did not hold."""
    done = transport.run(
        ["sh", "-c", IN_FOLDER, "sh", engine_folder, python.path, "-m", "engine", "selftest", "--folder", scratch],
        deadline_s=SELFTEST_DEADLINE_S,
        check=False,
    )
    if done.exit_status == 0:
        return
    for line in done.stdout.splitlines():
        with suppress(ProtocolError, TypeError, AttributeError):
            check = loads(line)
            if not check.get("ok"):
                raise RemoteCommandError(
                    f"{transport.name}: the engine's self-test fails there: {_printable(check.get('check'))}: "
                    f"{_printable(check.get('detail'))}"
                )
    last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"exit status {done.exit_status}"]
    raise RemoteCommandError(f"{transport.name}: the engine's self-test does not run there: {_printable(last[0])}")


def read_storage(transport: Transport, python: Python, engine_folder: str, container: str) -> StorageRates:
    """Lets the deployed engine measure how `container`, a path there, is read; RemoteCommandError where it cannot."""
    return _ask(
        StorageRates, transport, python, engine_folder, ["-m", "engine", "storage", container], PROBE_DEADLINE_S
    )


def _ask(
    cls: type[T], transport: Transport, python: Python, engine_folder: str, arguments: list[str], deadline_s: float
) -> T:
    """Returns what Python answers there in the last line of its output."""
    command = ["sh", "-c", IN_FOLDER, "sh", engine_folder, python.path, *arguments]
    done = transport.run(command, deadline_s=deadline_s)
    lines = done.stdout.strip().splitlines() or [b""]
    try:
        return from_json(cls, loads(lines[-1]))
    except ProtocolError as error:
        raise RemoteCommandError(f"{transport.name}: the engine gave no valid answer: {error}") from None


def _answers(name: str, output: str) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    """Returns from the output of SEARCH what system it is, what each Python said, and what is to say of the others."""
    system: list[str] = []
    found: list[dict[str, Any]] = []
    silent: list[str] = []
    answered: dict[str, Any] | None = None  # by the Python at hand
    for line in output.splitlines():
        if line.startswith("{"):
            answer = _answer(name, line)
            if answered is not None:
                found.pop()
            found.append(answer)
            answered = answer
        elif (ended := _ENDED.fullmatch(line)) is not None:
            status, how = int(ended[1]), _ending(int(ended[1]))
            if answered is None:
                silent.append(f"{_printable(ended[2])} gives no answer, it ends with {how}")
            elif status not in (0, 1) and answered["numpy"] is None:
                answered["reason"] = f"it is killed while it imports numpy, {how}" if status > 128 else how
            answered = None
        else:
            system.append(line.lower())
    return system, found, silent


def _ending(status: int) -> str:
    """Returns what a shell's exit status says, with the name of the signal that killed a program."""
    try:
        return f"signal {status - 128} ({signal.Signals(status - 128).name})" if status > 128 else f"status {status}"
    except ValueError:
        return f"status {status}"


def _answer(name: str, line: str) -> dict[str, Any]:
    """Reads one JSON line of _ASK and checks it: a device may answer anything."""
    try:
        answer = json.loads(line)
        version = [int(part) for part in answer["version"]][:3]
        path, reason = _printable(answer["path"]), _printable(answer["reason"])
        numpy = None if answer["numpy"] is None else _printable(answer["numpy"])
    except (ArithmeticError, ValueError, TypeError, KeyError, RecursionError):
        raise PythonMissingError(f"{name}: python3 gave no sensible answer: set `python` in the inventory") from None
    return {"path": path, "version": version, "numpy": numpy, "reason": reason}


def _printable(value: object) -> str:
    return "".join(c for c in str(value) if c.isprintable())[:300]


def _install_command(system: str) -> str:
    for mark, command in _INSTALL:
        if mark in system:
            return f"run `{command}` there"
    return "install python3 and numpy there, or set `python` in the inventory"


_INSTALL = (
    ("com.termux", "pkg install python python-numpy"),
    ("debian", "sudo apt install python3-numpy"),
    ("ubuntu", "sudo apt install python3-numpy"),
    ("raspbian", "sudo apt install python3-numpy"),
    ("fedora", "sudo dnf install python3-numpy"),
    ("alpine", "apk add python3 py3-numpy"),
    ("arch", "sudo pacman -S python-numpy"),
    ("suse", "sudo zypper install python3-numpy"),
)
