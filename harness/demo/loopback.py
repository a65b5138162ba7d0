"""Serves loopback devices: real SSH servers of this process on 127.0.0.1, without root, each in a folder.

To the controller they are devices like any other: it connects through the same transport, checks the host key, copies
the engine, starts it detached. What is emulated is only what the inventory says, such as the rate of the storage.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import asyncssh

from device_inventory import Device, Inventory
from harness.errors import FarmError

START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 15.0
_MARK = "EDGEMOE_FARM_LOOPBACK"  # in the environment of everything that a loopback device runs


@dataclass(frozen=True)
class Emulated:
    """Names what a loopback device stands for."""

    name: str
    read_bytes_per_s: float


class LoopbackFarm:
    """Runs SSH servers as long as the context lasts; at its end nothing of theirs runs any more.

    with LoopbackFarm(folder, [Emulated("pi4b-emulated", 43e6)]) as inventory: ...
    """

    def __init__(self, folder: Path, devices: Sequence[Emulated]) -> None:
        """Puts keys and the devices' home folders into `folder`."""
        self._folder = folder
        self._devices = devices
        self._mark = secrets.token_hex(8)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="loopback devices", daemon=True)
        self._inventory: Future[Inventory] = Future()
        self._stop = asyncio.Event()

    def __enter__(self) -> Inventory:
        """Returns the devices, ready to be trusted. Raises FarmError where they do not start."""
        self._thread.start()
        try:
            return self._inventory.result(START_DEADLINE_S)
        except (OSError, TimeoutError, asyncssh.Error) as error:
            self._end()
            raise FarmError(f"the loopback devices did not start on 127.0.0.1: {error}") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_DEADLINE_S)
        kill_marked(self._mark)

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # at its end it cancels what still runs
            runner.run(self._serve_until_stopped())

    async def _serve_until_stopped(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                self._inventory.set_result(await self._start(stack))
            except (OSError, asyncssh.Error) as error:
                self._inventory.set_exception(error)
                return
            await self._stop.wait()

    async def _start(self, stack: contextlib.AsyncExitStack) -> Inventory:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        identity = self._folder / "id_ed25519"
        client_key = asyncssh.generate_private_key("ssh-ed25519", comment="edgemoe-farm demo")
        client_key.write_private_key(identity)
        identity.chmod(0o600)
        authorized = asyncssh.import_authorized_keys(client_key.export_public_key().decode())
        devices = {}
        for emulated in self._devices:
            home = self._folder / emulated.name
            home.mkdir(exist_ok=True)
            connections = _Connections()
            server = await asyncssh.listen(
                "127.0.0.1",
                0,
                server_factory=connections.server,
                server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
                authorized_client_keys=authorized,
                process_factory=_Shell(home, self._mark).run,
                sftp_factory=lambda channel, home=home: _HomeSFTP(channel, home),
                encoding=None,
                line_editor=False,
                agent_forwarding=False,
            )
            stack.push_async_callback(connections.close)
            stack.push_async_callback(server.wait_closed)
            stack.callback(server.close)
            devices[emulated.name] = Device(
                name=emulated.name,
                host="127.0.0.1",
                port=server.get_port(),
                user=getpass.getuser(),
                identity_file=str(identity),
                python=sys.executable,
                emulated_read_bytes_per_s=emulated.read_bytes_per_s,
                tags=("emulated",),
            )
        return Inventory(devices)


class _Connections:
    """Holds the connections of one device, which a server that is closed leaves open."""

    def __init__(self) -> None:
        self._open: set[asyncssh.SSHServerConnection] = set()

    def server(self) -> asyncssh.SSHServer:
        opened = self._open

        class Server(asyncssh.SSHServer):
            def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
                opened.add(conn)

        return Server()

    async def close(self) -> None:
        for connection in self._open:
            connection.abort()
        for connection in self._open:
            await connection.wait_closed()


class _Shell:
    """Runs what a client asks for as sshd would: through sh, in the home folder, in a session of its own."""

    def __init__(self, home: Path, mark: str) -> None:
        self._home = home
        self._environment = {
            "HOME": str(home),
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": os.environ.get("LANG", "C.UTF-8"),
            "USER": getpass.getuser(),
            _MARK: mark,
        }

    async def run(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        if process.command is None:
            process.stderr.write(b"this device takes commands only\n")
            process.exit(1)
            return
        child = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            process.command,
            cwd=self._home,
            env=self._environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            await process.redirect(stdin=child.stdin)
            assert child.stdout is not None
            assert child.stderr is not None
            # As sshd does: all that it wrote goes before its exit status. asyncssh's redirections may lose the end.
            await asyncio.gather(_sent(child.stdout, process.stdout), _sent(child.stderr, process.stderr))
            status = await child.wait()
        except (asyncio.CancelledError, OSError, asyncssh.Error):
            with contextlib.suppress(ProcessLookupError):  # as sshd does when the connection is lost
                os.killpg(child.pid, signal.SIGHUP)
            raise
        if status < 0:
            process.exit_with_signal(signal.Signals(-status).name.removeprefix("SIG"))
        else:
            process.exit(status)
        await process.wait_closed()  # asyncssh finishes its redirections only here


async def _sent(source: asyncio.StreamReader, sink: asyncssh.SSHWriter[bytes]) -> None:
    """Sends all that a process writes."""
    while piece := await source.read(1 << 16):
        sink.write(piece)
        await sink.drain()


class _HomeSFTP(asyncssh.SFTPServer):
    """Transfers files, starting in the home folder."""

    def __init__(self, channel: asyncssh.SSHServerChannel[Any], home: Path) -> None:
        super().__init__(channel)
        self._home = home

    def map_path(self, path: bytes) -> bytes:
        return os.fsencode(self._home / os.fsdecode(path))


def kill_marked(mark: str) -> None:
    """Ends every process that was started under `mark`, detached engines too. Needs /proc; elsewhere does nothing."""
    deadline = time.monotonic() + STOP_DEADLINE_S
    while _kill_once(f"{_MARK}={mark}".encode()) and time.monotonic() < deadline:
        time.sleep(0.01)


def _kill_once(wanted: bytes) -> bool:
    """Returns whether to look again: something was killed that may have had a child, or cannot be told yet."""
    again = False
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (folder / "environ").read_bytes()
            if wanted in environment.split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
                again = True
            elif not environment:  # so for a moment in exec: memory already, but neither arguments nor environment
                starting = not (folder / "cmdline").read_bytes() and (folder / "statm").read_bytes().split()[0] != b"0"
                again = again or starting
    return again
