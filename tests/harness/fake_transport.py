"""A transport with a bad wire: everything behind it is real, only the link fails, as a script says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.errors import RemoteTimeoutError, UnreachableError
from harness.transport import Completed, Transport


@dataclass(frozen=True)
class LinkFault:
    """What goes wrong with one act. Acts that have no fault in the script go well.

    drop      the link is lost: after the command has run (its effects stay), and `after_bytes` of output got through
    refuse    no connection: the command never reaches the device
    stall     nothing comes back within the deadline
    truncate  the output ends after `after_bytes`, and nothing tells so
    """

    kind: Literal["drop", "refuse", "stall", "truncate"]
    after_bytes: int = 0


class FakeTransport:
    """Wraps a real transport; the n-th act meets the n-th entry of `script` (None: it goes well)."""

    def __init__(self, inner: Transport, script: Iterable[LinkFault | None] = ()) -> None:
        self.name = inner.name
        self.acts: list[tuple[str, ...]] = []  # what was asked for, for tests
        self._inner = inner
        self._script = iter(script)

    @property
    def bytes_sent(self) -> int:
        return self._inner.bytes_sent

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
        fault = self._next(tuple(arguments))
        collected = bytearray()
        room = fault.after_bytes if fault else None

        def take(piece: bytes) -> None:
            nonlocal room
            if room is not None:
                piece, room = piece[:room], room - len(piece[:room])
            if on_stdout is None:
                collected.extend(piece)
            elif piece:
                on_stdout(piece)

        done = self._inner.run(
            arguments,
            deadline_s=deadline_s,
            environment=environment,
            stdin=stdin,
            check=check,
            on_stdout=take,
            silence_s=silence_s,
        )
        if fault is not None and fault.kind == "drop":
            raise UnreachableError(f"{self.name}: the connection was lost")
        return Completed(done.exit_status, bytes(collected), done.stderr)

    def upload(
        self,
        source: Path,
        target: str,
        *,
        sha256: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        fault = self._next(("upload", str(source), target))

        def watch(present: int) -> None:
            if progress is not None:
                progress(present)
            if fault is not None and present >= fault.after_bytes:
                raise UnreachableError(f"{self.name}: the connection was lost")

        return self._inner.upload(source, target, sha256=sha256, progress=watch)

    def close(self) -> None:
        self._inner.close()

    def _next(self, act: tuple[str, ...]) -> LinkFault | None:
        self.acts.append(act)
        fault = next(self._script, None)
        if fault is not None and fault.kind == "refuse":
            raise UnreachableError(f"{self.name}: connection refused")
        if fault is not None and fault.kind == "stall":
            raise RemoteTimeoutError(f"{self.name}: `{act[0]}` gave no end in time")
        return fault
