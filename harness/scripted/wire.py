"""Answers what the farm asks of a scripted device over a transport, and breaks as the script says."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from device_inventory import Device
from engine.codec import to_json
from harness.device.deploy import REMOVE
from harness.device.probe import IN_FOLDER, SEARCH
from harness.doctor.survey import Survey
from harness.errors import DiskFullError, RemoteCommandError, RemoteTimeoutError, UnreachableError
from harness.scripted.course import SLOW_DISK
from harness.scripted.device import OFFLINE_S, ScriptedDevice
from harness.scripted.faults import FaultKind
from harness.scripted.system import run_python
from harness.transport import Completed, Keyring, Reach, TransportKind

_PYTHON = "/usr/bin/python3"
_UPLOAD_STEPS = 8  # an upload is told of so often
_NOT_FOUND = 127
SHELL_S = 60.0


class ScriptedTransport:
    """Is one connection. Commands that it does not know exit with 127, as on a device that lacks them."""

    def __init__(self, device: ScriptedDevice) -> None:
        self.name = device.name
        self.bytes_sent = 0
        self._device = device

    def close(self) -> None: ...

    def run(
        self,
        arguments: Sequence[str],
        *,
        deadline_s: float,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        check: bool = True,
        on_stdout: Callable[[bytes], None] | None = None,
        silence_s: float | None = None,
    ) -> Completed:
        self._connect()
        out, err = bytearray(), bytearray()
        what = f"{self.name}: `{shlex.join(arguments)[:80]}`"
        sleep = self._sleeper(what, deadline_s)
        status = self._execute(list(arguments), stdin, on_stdout or out.extend, err.extend, sleep)
        if check and status != 0:
            raise RemoteCommandError(f"{what} failed (exit status {status}): {bytes(err).decode('utf-8', 'replace')}")
        return Completed(status, bytes(out), bytes(err))

    def upload(
        self,
        source: Path,
        target: str,
        *,
        sha256: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        self._connect()
        total, path, sent = source.stat().st_size, self._path(target), 0
        fault = self._device.next_upload()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.part")
        present = partial.stat().st_size if partial.exists() else 0
        full = fault is not None and fault.kind is FaultKind.DISK_FULL
        if full or total - present > self._device.setting.disk_bytes:
            raise DiskFullError(
                f"{self.name}: {source.name} needs {(total - present) / 1e6:.1f} MB on the device, 0.0 MB are free: "
                "free some space or set `root` to a larger disk"
            )
        rate = self._device.setting.upload_bytes_per_s
        if fault is not None and fault.kind is FaultKind.SLOW_DISK:
            rate /= SLOW_DISK
        while present < total:
            if fault is not None and fault.kind is FaultKind.DROP and present >= fault.at * total:
                raise UnreachableError(f"{self.name}: the connection was lost")
            piece = min(-(-total // _UPLOAD_STEPS), total - present)
            self._device.sleep(piece / rate)
            present, sent, self.bytes_sent = present + piece, sent + piece, self.bytes_sent + piece
            with partial.open("ab") as file:
                file.truncate(present)  # as long as it should be, and empty: a scripted device reads nothing
            if progress is not None:
                progress(present)
        partial.touch()
        partial.replace(path)
        return sent

    def _execute(
        self,
        arguments: list[str],
        stdin: bytes,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        sleep: Callable[[float], None],
    ) -> int:
        match arguments:
            case [python, "-I", "-c", _, "survey", _] if python == _PYTHON:
                on_stdout(json.dumps(to_json(self._survey())).encode())
                return 0
            case [python, "-I", "-S", "-c", code, *rest] if python == _PYTHON:
                if rest[1:2] == ["prepare"]:
                    rest = [*rest[:2], str(self._path(rest[2]))]
                if rest[1:2] == ["check"]:  # of an engine nothing is kept but its folder
                    there = self._path(rest[2]).is_dir()
                    on_stdout(json.dumps({"differs": None if there else "it is missing"}).encode())
                    return 0
                if rest[1:2] == ["blob"]:  # a scripted device reads nothing, and so has nothing to hash
                    rest = [*rest[:-1], "fresh"]
                if rest[1:2] == ["attend"]:
                    on_stdout = self._breaking(rest[2], int(rest[3]), on_stdout)
                return run_python(
                    self._device, code, rest, stdin=stdin, on_stdout=on_stdout, on_stderr=on_stderr, sleep=sleep
                )
            case ["sh", "-c", script, "sh", first, *rest]:
                return self._shell(script, first, rest, on_stdout, on_stderr)
            case ["true"]:
                return 0
        return self._unknown(arguments, on_stderr)

    def _shell(
        self,
        script: str,
        first: str,
        rest: list[str],
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
    ) -> int:
        if script == SEARCH:
            python = {"path": _PYTHON, "version": [3, 11, 2], "numpy": self._device.facts.numpy, "reason": ""}
            on_stdout(json.dumps(python).encode() + b"\n")
        elif script == REMOVE:
            run = self._path(first)
            if not (run / "holder.json").is_file() or rest[0] not in (run / "holder.json").read_text():
                return 1
            shutil.rmtree(run, ignore_errors=True)
        elif script == IN_FOLDER and rest[:4] == [_PYTHON, "-m", "engine", "selftest"]:
            return 0
        elif script == IN_FOLDER and rest[:4] == [_PYTHON, "-m", "engine", "probe"]:
            on_stdout(json.dumps(to_json(self._device.facts)).encode())
        elif script == IN_FOLDER:
            return self._unknown(rest, on_stderr)
        else:  # files are real there, so what a shell does with them is, too
            command = ["sh", "-c", script, "sh", first, *rest]
            environment = {**os.environ, "HOME": str(self._device.home)}
            done = subprocess.run(
                command, cwd=self._device.home, env=environment, capture_output=True, check=False, timeout=SHELL_S
            )
            on_stdout(done.stdout)
            on_stderr(done.stderr)
            return done.returncode
        return 0

    def _survey(self) -> Survey:
        """Returns the survey of a device that is healthy, but for what its script says."""
        setting = self._device.setting
        return Survey(
            utc_s=time.time(), file_system="scripted", storage="scripted", read_only=False, no_exec=False,
            free_bytes=setting.disk_bytes, disk_bytes=setting.disk_bytes, free_inodes=1 << 20, write_error=None,
            direct_reads=True, memory_control_groups=True, governors=(), throttled_bits=None, swaps=(), android=None,
            missing_tools=(), stale_runs=0,
        )  # fmt: skip

    def _unknown(self, arguments: list[str], on_stderr: Callable[[bytes], None]) -> int:
        on_stderr(f"a scripted device does not know `{shlex.join(arguments)[-80:]}`\n".encode())
        return _NOT_FOUND

    def _breaking(self, run: str, offset: int, take: Callable[[bytes], None]) -> Callable[[bytes], None]:
        """Passes output on from `offset`, until the link breaks: once at its place, never again behind it."""
        place: int | None = None
        kind: FaultKind | None = None

        def passing(piece: bytes) -> None:
            nonlocal offset, place, kind
            if place is None:  # asked for when there is output: the run has been started by then
                fault, size = self._device.fault_of(Path(run))
                kind = fault.kind if fault is not None else None
                place = int(fault.at * size) if fault and kind in (FaultKind.DROP, FaultKind.OFFLINE) else -1
            if not offset <= place < offset + len(piece):
                offset += len(piece)
                take(piece)
                return
            take(piece[: place + 1 - offset])
            if kind is FaultKind.OFFLINE:
                self._device.cut_off(OFFLINE_S)
            raise UnreachableError(f"{self.name}: the connection was lost")

        return passing

    def _sleeper(self, what: str, deadline_s: float) -> Callable[[float], None]:
        """Returns the sleep of a command on the device, which its deadline or a lost link ends."""
        end = self._device.clock() + deadline_s

        def sleep(seconds: float) -> None:
            if self._device.clock() >= end:
                raise RemoteTimeoutError(f"{what} did not end within {deadline_s:g} s and was killed on the device")
            self._device.sleep(seconds)
            if not self._device.is_reachable():
                raise UnreachableError(f"{self.name}: the connection was lost while a command ran")

        return sleep

    def _connect(self) -> None:
        if not self._device.is_reachable():
            raise UnreachableError(f"{self.name}: cannot be reached (connection refused): is it on?")

    def _path(self, path: str) -> Path:
        """Returns the real path; refuses one outside the device's home folder."""
        inside = Path(os.path.normpath(self._device.home / path))
        if not inside.is_relative_to(self._device.home):
            raise RemoteCommandError(
                f"{self.name}: {path} is outside the scripted device: set `root` to a relative one"
            )
        return inside


def _reach(device: Device, keyring: Keyring) -> Reach:
    assert device.scripted is not None  # the inventory refuses it
    scripted = ScriptedDevice(Path(device.scripted))
    return Reach(lambda: ScriptedTransport(scripted), scripted.clock, scripted.sleep)


SCRIPTED = TransportKind(open=_reach, address=lambda device: device.host)
