"""Plays the system that the farm's agent finds on a scripted device.

The agent itself is the real one, run as the controller sent it. Its files are real, too, in the device's folder. What
is made up is the rest of the system: the clock, processes, signals, /proc, and who keeps a lock because it lives.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import os
import signal
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, NoReturn, Protocol


class Machine(Protocol):
    """Defines what a scripted device says of itself to the system on it."""

    def clock(self) -> float: ...

    def boot_id(self) -> str: ...

    def fork(self) -> None:
        """Takes over a run's folder that the agent has laid out, as a supervising process would."""
        ...

    def is_alive(self, run: str) -> bool:
        """Tells whether a process of the run in this folder lives, and so keeps its lock."""
        ...

    def free_bytes(self, path: str) -> int: ...

    def signal(self, group: int, number: int) -> bool:
        """Signals a process group; tells whether there is one."""
        ...


def run_python(
    machine: Machine,
    code: str,
    arguments: list[str],
    *,
    stdin: bytes,
    on_stdout: Callable[[bytes], None],
    on_stderr: Callable[[bytes], None],
    sleep: Callable[[float], None],
) -> int:
    """Does what `python3 -c CODE ARGUMENT...` would do there; returns its exit status."""
    modules = _modules(machine, arguments, stdin, on_stdout, on_stderr, sleep)

    def import_(name: str, *details: Any) -> Any:
        if name in modules:
            return modules[name]
        made = modules["sys"].modules  # by the code itself
        if name not in made:
            return builtins.__import__(name, *details)
        wanted = (details[2] if len(details) > 2 else None) or ()
        for part in wanted:
            if f"{name}.{part}" in made:
                setattr(made[name], part, made[f"{name}.{part}"])
        return made[name] if wanted else made[name.split(".")[0]]

    def open_(path: Any, *mode: Any, **options: Any) -> Any:
        if path == "/proc/sys/kernel/random/boot_id":
            return io.StringIO(machine.boot_id())
        if path == "/proc/vmstat":
            return io.StringIO("oom_kill 0\n")
        return builtins.open(path, *mode, **options)  # noqa: PTH123 - as the agent asks

    changed = {"__import__": import_, "open": open_, "compile": _compiled}
    try:
        exec(  # noqa: S102 - the controller's own code, as it goes to any device
            _compiled(code, "-c", "exec"), {"__builtins__": {**vars(builtins), **changed}, "__name__": "__main__"}
        )
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _modules(
    machine: Machine,
    arguments: list[str],
    stdin: bytes,
    on_stdout: Callable[[bytes], None],
    on_stderr: Callable[[bytes], None],
    sleep: Callable[[float], None],
) -> dict[str, Any]:
    def fork() -> int:
        machine.fork()
        return 1

    def killpg(group: int, number: int) -> None:
        if not machine.signal(group, number):
            raise ProcessLookupError(group)

    def flock(handle: int, operation: int) -> None:
        file = Path(f"/proc/self/fd/{handle}").readlink()
        if operation & fcntl.LOCK_NB and file.name == "alive" and machine.is_alive(str(file.parent)):
            raise BlockingIOError
        fcntl.flock(handle, operation)

    def statvfs(path: str) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=machine.free_bytes(path) >> 12, f_frsize=1 << 12)

    def exit_(status: int = 0) -> NoReturn:
        raise SystemExit(status)

    return {
        "sys": SimpleNamespace(
            argv=["-c", *arguments],
            stdin=SimpleNamespace(buffer=io.BytesIO(stdin)),
            stdout=_Stream(on_stdout),
            stderr=_Stream(on_stderr),
            modules={},
            path=[],
            exit=exit_,
        ),
        "time": SimpleNamespace(
            **{name: value for name, value in vars(time).items() if name.startswith("CLOCK_")},
            monotonic=machine.clock,
            clock_gettime=lambda clock: machine.clock(),
            time=time.time,
            sleep=sleep,
        ),
        "os": SimpleNamespace(
            **{**vars(os), "fork": fork, "killpg": killpg, "statvfs": statvfs, "umask": lambda mask: 0o077}
        ),
        "fcntl": SimpleNamespace(**{**vars(fcntl), "flock": flock}),
        "signal": SimpleNamespace(**{**vars(signal), "signal": lambda number, handler: None}),
        "zipfile": SimpleNamespace(ZipFile=_Unread),
    }


class _Stream:
    """An output of the agent's: text and bytes alike."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take
        self.buffer = self

    def write(self, piece: str | bytes) -> int:
        self._take(piece.encode() if isinstance(piece, str) else piece)
        return len(piece)

    def flush(self) -> None: ...


class _Unread:
    """A zip of the engine: nothing of it is needed where nothing runs."""

    def __init__(self, content: Any) -> None: ...

    def __enter__(self) -> _Unread:
        return self

    def __exit__(self, *error: object) -> None: ...

    def extractall(self, folder: str) -> None: ...


@lru_cache(16)
def _compiled(source: str | bytes, name: str, mode: str) -> CodeType:
    return compile(source, name, mode, dont_inherit=True)
