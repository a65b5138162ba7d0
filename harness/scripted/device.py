"""A scripted device: a folder, a clock, and runs that nobody carries out.

A run is no process but a function of time: what it has written by now is worked out when somebody looks. So it goes on
while no controller is there, survives it, and costs nothing meanwhile.

FOLDER/script.json     Setting: made by `declare`, never changed
FOLDER/state.json      _State: boots, runs and uploads so far
FOLDER/starts          one line for each engine that was started: its run folder's name
FOLDER/home/           the device's home folder; containers there are as long as they should be, and empty
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from device_inventory import Device
from engine.codec import from_json, loads, to_json
from engine.protocol import DeviceFacts
from harness.errors import UnreachableError
from harness.scripted.course import ScriptedCourse, course
from harness.scripted.faults import FaultKind, FaultScript, ScriptedFault

T = TypeVar("T")

VERSION = 1
BOOT_S = 20.0
OFFLINE_S = 240.0


@dataclass(frozen=True)
class Setting:
    """Describes a scripted device. `speed`: seconds of its time that pass in one of ours."""

    v: int
    name: str
    faults: FaultScript
    speed: float = 1.0
    upload_bytes_per_s: float = 50e6
    disk_bytes: int = 64 << 30


@dataclass(frozen=True)
class _State:
    boots: int = 1
    runs: int = 0
    uploads: int = 0
    down_until_s: float = 0.0  # nobody can connect before


@dataclass(frozen=True)
class _Started:
    """Holds a run's own facts, kept in its folder."""

    n: int  # which run of the device
    boot: int
    began_s: float
    deadline_s: float


@dataclass
class _Looked:
    """Holds a run as this process has found it."""

    started: _Started
    course: ScriptedCourse
    written: int = 0  # lines, by this process


def declare(folder: Path, name: str, *, faults: FaultScript | None = None, **setting: Any) -> Device:
    """Makes a scripted device in `folder`, or finds the one that is there; `setting` as in Setting."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Setting(VERSION, name, faults or FaultScript(), **setting)
    if not (folder / "script.json").exists():
        _write(folder / "script.json", made)
    return Device(name=name, host="scripted", transport="scripted", scripted=str(folder.resolve()), tags=("scripted",))


def speed_of(devices: Iterable[Device]) -> float:
    """Returns how much faster time passes on devices that are all scripted; 1 where one of them is real."""
    folders = [device.scripted for device in devices]
    if not folders or None in folders:
        return 1.0
    return min(_read(Setting, Path(folder) / "script.json").speed for folder in folders if folder is not None)


class ScriptedDevice:
    """Keeps all that it knows in its folder: safe to use from several threads and processes at once."""

    def __init__(
        self,
        folder: Path,
        *,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        """Reads the setting. `clock` and `sleep` are the device's; default: this machine's, `speed` times as fast."""
        self.folder = folder
        self.home = folder.resolve() / "home"
        self.home.mkdir(exist_ok=True)
        self.setting = _read(Setting, folder / "script.json")
        speed = self.setting.speed
        self.clock = clock or (lambda: time.monotonic() * speed)
        self.sleep = sleep or (lambda seconds: time.sleep(seconds / speed))
        self._looked_at: dict[Path, _Looked] = {}  # the run that was looked at last

    @property
    def name(self) -> str:
        return self.setting.name

    @property
    def facts(self) -> DeviceFacts:
        return DeviceFacts(
            hostname=self.name, machine="scripted", kernel="scripted", os="no system: scripted",
            model="scripted device, nothing is measured", cpu=None, cores=4, memory_bytes=4 << 30, page_bytes=4096,
            boot_id=self.boot_id(), python="3.11.2", numpy="2.0.0", blas=None, engine="scripted",
        )  # fmt: skip

    def boot_id(self) -> str:
        return hashlib.sha256(f"{self.name} boot {self._state().boots}".encode()).hexdigest()[:32]

    def is_reachable(self) -> bool:
        return self.clock() >= self._state().down_until_s

    def cut_off(self, seconds: float) -> None:
        """Lets nobody connect for `seconds` from now."""
        with self._locked() as state:
            self._store(replace(state, down_until_s=self.clock() + seconds))

    def next_upload(self) -> ScriptedFault | None:
        """Counts an upload, and says what befalls it."""
        with self._locked() as state:
            self._store(replace(state, uploads=state.uploads + 1))
            return self.setting.faults.of_upload(self.name, state.uploads + 1)

    def starts(self) -> list[str]:
        """Returns the names of the run folders in which an engine was started, one for each start."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "starts").read_text().split()
        return []

    # --- runs, as the system on the device sees them --------------------------------------------------------------

    def fork(self) -> None:
        """Starts the engines of the run folders that nobody works on yet."""
        with self._locked() as state:
            for run in self.home.glob("*/runs/*"):
                if run.suffix == ".part" or (run / "started.json").exists():
                    continue
                n = state.runs + 1
                self._store(replace(state, runs=n))
                deadline_s = float(json.loads((run / "request.json").read_bytes())["deadline_s"])
                _write(run / "engine.json", {"group": n, "boot_id": self.boot_id(), "oom_kills": 0})
                _write(run / "started.json", _Started(n, state.boots, self.clock(), deadline_s))
                with (self.folder / "starts").open("a") as starts:
                    starts.write(f"{run.name}\n")

    def is_alive(self, run: str) -> bool:
        return self._advance(Path(run))

    def free_bytes(self, path: str) -> int:
        """Returns the free bytes: none for a run on a full disk."""
        fault, _ = self.fault_of(Path(path))
        return 0 if fault is not None and fault.kind is FaultKind.DISK_FULL else self.setting.disk_bytes

    def signal(self, group: int, number: int) -> bool:
        """Signals the process group of run `group`; any signal but 0 ends it. Tells whether there was one."""
        for run in self.home.glob("*/runs/*"):
            try:
                started = _read(_Started, run / "started.json")
            except FileNotFoundError:
                continue
            if started.n == group and self._advance(run):
                if number:
                    with self._locked():
                        _write(run / "exit.json", {"status": -number, "timed_out": False, "oom_kills": 0})
                return True
        return False

    def fault_of(self, run: Path) -> tuple[ScriptedFault | None, int]:
        """Returns what befalls a run that was started, and how many bytes of events it writes in all."""
        try:
            looked = self._look(run)
        except FileNotFoundError:
            return None, 0
        return self.setting.faults.of_run(self.name, looked.started.n), looked.course.size_bytes

    def _advance(self, run: Path) -> bool:
        """Writes down what happened in a run until now; tells whether it goes on. UnreachableError: a power cut."""
        with self._locked() as state:
            try:
                looked = self._look(run)
            except FileNotFoundError:  # it was removed
                return False
            started, planned = looked.started, looked.course
            if started.boot != state.boots or (run / "exit.json").exists() or not run.exists():
                return False
            passed_s = self.clock() - started.began_s
            due = sum(due_s <= passed_s for due_s, _ in planned.lines)
            if due > looked.written:
                with (run / "events.jsonl").open("ab") as events:
                    events.write(b"".join(line for _, line in planned.lines[:due])[events.tell() :])
                looked.written = due
            if passed_s < planned.end_s:
                return True
            if planned.ending is None:
                down_until_s = started.began_s + planned.end_s + BOOT_S
                self._store(replace(state, boots=state.boots + 1, down_until_s=down_until_s))
                raise UnreachableError(f"{self.name}: the connection was lost while a command ran")
            (run / "log").write_text(planned.log)
            _write(run / "exit.json", planned.ending)
            return False

    def _look(self, run: Path) -> _Looked:
        """Returns a run. Raises FileNotFoundError where no engine was started, or the folder is being removed."""
        if run not in self._looked_at:
            started = _read(_Started, run / "started.json")
            fault = self.setting.faults.of_run(self.name, started.n)
            seed = f"{self.setting.faults.seed}/{self.name}/{started.n}"
            text = (run / "request.json").read_text()
            self._looked_at = {run: _Looked(started, course(text, self.facts, seed, fault, started.deadline_s))}
        return self._looked_at[run]

    # --- state ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_State]:
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self._state()

    def _state(self) -> _State:
        try:
            return _read(_State, self.folder / "state.json")
        except FileNotFoundError:
            return _State()

    def _store(self, state: _State) -> None:
        _write(self.folder / "state.json", state)


def _read(cls: type[T], path: Path) -> T:
    return from_json(cls, loads(path.read_bytes()))


def _write(path: Path, value: Any) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(to_json(value)))
    part.replace(path)
