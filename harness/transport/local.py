"""Uses this machine as a device: a folder stands for the home folder, and no network is involved."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from harness.transport.shell import STALL_S, ShellTransport


class LocalTransport(ShellTransport):
    """Runs commands in `folder`, which is also their HOME."""

    def __init__(self, name: str, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(name, clock=clock)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        pass

    def _execute(
        self,
        command_line: str,
        stdin: Iterable[bytes],
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        *,
        wait_s: float,
        silence_s: float | None,
    ) -> int:
        process = subprocess.Popen(
            ["sh", "-c", command_line],
            cwd=self._folder,
            env={**os.environ, "HOME": str(self._folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            outputs = {process.stdout: on_stdout, process.stderr: on_stderr}
            _exchange(process.stdin, stdin, outputs, self._clock, self._clock() + wait_s)
            return process.wait(timeout=STALL_S)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=STALL_S)
            for stream in (process.stdin, process.stdout, process.stderr):
                stream.close()


def _exchange(
    sink: IO[bytes],
    stdin: Iterable[bytes],
    outputs: dict[IO[bytes], Callable[[bytes], None]],
    clock: Callable[[], float],
    end: float,
) -> None:
    """Feeds the command and takes its output until both outputs are closed; TimeoutError at `end`."""
    pieces, pending = iter(stdin), b""
    with selectors.DefaultSelector() as selector:
        for stream in outputs:
            selector.register(stream, selectors.EVENT_READ)
        os.set_blocking(sink.fileno(), False)
        selector.register(sink, selectors.EVENT_WRITE)
        while any(stream in selector.get_map() for stream in outputs):
            ready = selector.select(max(0.0, end - clock()))
            if clock() >= end:
                raise TimeoutError
            for key, _ in ready:
                if key.fileobj is sink:
                    pending = pending or next(pieces, b"")
                    try:
                        pending = pending[os.write(sink.fileno(), pending) :] if pending else b""
                        ended = not pending and (pending := next(pieces, b"")) == b""
                    except BrokenPipeError:
                        ended = True  # the command ended without reading all of it: its exit status tells why
                    if ended:
                        selector.unregister(sink)
                        sink.close()
                else:
                    stream = next(s for s in outputs if s is key.fileobj)
                    piece = os.read(stream.fileno(), 1 << 16)
                    if piece:
                        outputs[stream](piece)
                    else:
                        selector.unregister(stream)
