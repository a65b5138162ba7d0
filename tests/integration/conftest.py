"""Real OpenSSH servers on 127.0.0.1, each a device of its own: own port, keys, folder."""

from __future__ import annotations

import base64
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import engine.protocol
from device_inventory import Device
from harness.transport.known_hosts import HostKey, KnownHosts

STUB = Path(__file__).parent / "stub_engine"


def sshd_binary() -> str | None:
    return shutil.which("sshd") or shutil.which("/usr/sbin/sshd")


@dataclass
class Sshd:
    """One server. `device` reaches it; `known_hosts` starts empty unless `trusted`."""

    name: str
    folder: Path
    port: int
    client_key: Path
    known_hosts: Path
    options: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    user: str = field(default_factory=getpass.getuser)
    python: str | None = sys.executable
    inside: tuple[str, ...] = ()  # a command that starts the server in surroundings of its own
    prepare: Callable[[Path], None] = lambda folder: None  # done to its folder before it starts
    seen_as: str = ""  # its folder as the server itself sees it, where it lives in another root file system
    start_s: float = 30.0  # within which it answers
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def device(self) -> Device:
        return self.device_at(self.port)

    def device_at(self, port: int) -> Device:
        return Device(
            name=self.name,
            host=self.host,
            port=port,
            user=self.user,
            identity_file=str(self.client_key),
            root=f"{self.home}/root",
            python=self.python,
        )

    @property
    def home(self) -> str:
        return self.seen_as or str(self.folder)

    @property
    def host_key(self) -> HostKey:
        kind, content = (self.folder / "host_key.pub").read_text().split()[:2]
        return HostKey(f"[{self.host}]:{self.port}", kind, base64.b64decode(content))

    def trust(self, port: int | None = None) -> None:
        key = self.host_key
        KnownHosts(self.known_hosts).store(HostKey(f"[{self.host}]:{port or self.port}", key.kind, key.content))

    def new_host_key(self) -> None:
        for path in self.folder.glob("host_key*"):
            path.unlink()
        _keygen(self.folder / "host_key")

    def start(self) -> None:
        config = self.folder / "sshd_config"
        lines = (
            f"Port {self.port}",
            f"ListenAddress {self.host}",
            f"HostKey {self.home}/host_key",
            f"AuthorizedKeysFile {self.home}/authorized_keys",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "UseDNS no",
            "MaxStartups 100:30:200",
            # bash would read this user's own .bashrc for every command. Of SetEnv only the first line counts.
            *(() if self.seen_as else (f"SetEnv HOME={self.folder}",)),
            *self.options,
        )
        config.write_text("".join(f"{line}\n" for line in lines))
        shutil.copy(f"{self.client_key}.pub", self.folder / "authorized_keys")
        self.prepare(self.folder)
        # In another root file system it is the one of that.
        binary = "sshd" if self.seen_as else sshd_binary()
        assert binary is not None
        command = [*self.inside, binary, "-D", "-e", "-f", f"{self.home}/sshd_config"]
        with (self.folder / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(
            lambda: _answers(self.host, self.port) or self.process.poll() is not None,  # type: ignore[union-attr]
            "sshd to answer",
            self.start_s,
        )
        assert self.process.poll() is None, (self.folder / "sshd.log").read_text()

    def sessions(self) -> list[int]:
        """The server's processes of all open connections."""
        assert self.process is not None
        return [pid for pid in _descendants(self.process.pid) if _command(pid).startswith("sshd")]

    def kill_sessions(self) -> int:
        """Kills the server's process of every open connection, with SIGKILL; what they started lives on."""
        sessions = self.sessions()
        for pid in sessions:
            _kill(pid)
        return len(sessions)

    def stop(self) -> None:
        if self.process is not None:
            self.kill_sessions()
            self.process.kill()
            self.process.wait()
            self.process = None

    def kill_everything(self) -> None:
        """Ends what a power cut ends: the server, its sessions, and what was detached from them."""
        self.stop()
        for pid in _all_processes():
            if str(self.folder).encode() in _arguments(pid):
                _kill(pid)


@pytest.fixture
def make_sshd(tmp_path: Path) -> Iterator[Callable[..., Sshd]]:
    """make_sshd(name, *options, trusted=True, **fields of Sshd) starts a server; all end with the test."""
    if sshd_binary() is None:
        pytest.skip("sshd is not installed: apt install openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    servers: list[Sshd] = []
    client_key, known_hosts = tmp_path / "client_key", tmp_path / "known_hosts"
    _keygen(client_key)

    def make(name: str = "pi", *options: str, trusted: bool = True, port: int | None = None, **fields: Any) -> Sshd:
        folder = tmp_path / name
        folder.mkdir()
        _keygen(folder / "host_key")
        server = Sshd(name, folder, port or free_port(), client_key, known_hosts, options, **fields)
        servers.append(server)
        server.start()
        if trusted:
            server.trust()
        return server

    yield make
    for server in servers:
        server.kill_everything()


@pytest.fixture
def sshd(make_sshd: Callable[..., Sshd]) -> Sshd:
    return make_sshd()


class Relay:
    """A TCP relay that breaks every connection off once `limit` bytes have gone to the server (None: never)."""

    def __init__(self, target_port: int) -> None:
        self.limit: int | None = None
        self.forwarded = 0  # to the server, over all connections
        self._target_port = target_port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target_port))
            threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        sent = 0
        try:
            while piece := source.recv(1 << 16):
                if counted:
                    sent += len(piece)
                    if self.limit is not None and sent > self.limit:
                        break
                    self.forwarded += len(piece)
                sink.sendall(piece)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        if not counted:
            return
        time.sleep(0.05)  # the other direction sees the end before its sockets go away
        source.close()
        sink.close()


@pytest.fixture
def relay(sshd: Sshd) -> Iterator[Relay]:
    """Before `sshd`: use sshd.device_at(relay.port)."""
    link = Relay(sshd.port)
    sshd.trust(link.port)
    yield link
    link.close()


@pytest.fixture
def stub_engine(tmp_path: Path) -> Path:
    """An engine that speaks the real protocol and measures nothing: see stub_engine/__main__.py."""
    folder = tmp_path / "stub" / "engine"
    left_out = shutil.ignore_patterns("__pycache__", "experts", "kernels", "models", "offline", "py.typed")
    shutil.copytree(Path(engine.protocol.__file__).parent, folder, ignore=left_out)
    shutil.copytree(STUB, folder, ignore=left_out, dirs_exist_ok=True)
    return folder


@pytest.fixture
def mount_tmpfs() -> Iterator[Callable[[Path, str], Path]]:
    """mount_tmpfs(folder, size) -> folder, now a small file system; needs root."""
    mounted: list[Path] = []

    def mount(folder: Path, size: str) -> Path:
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(name="wait_until")
def wait_until_fixture() -> Callable[..., None]:
    return wait_until


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def wait_until(condition: Callable[[], object], what: str, within_s: float = 30.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"waited {within_s:g} s for {what}"
        time.sleep(0.02)


def _answers(host: str, port: int) -> bool:
    """With its own first words: what forwards a port of a machine listens there before the machine does."""
    try:
        with socket.create_connection((host, port), 1) as probe:
            probe.settimeout(30)  # under emulation a session takes its time
            return probe.recv(4) == b"SSH-"
    except OSError:
        return False


def _keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _all_processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _descendants(parent: int) -> list[int]:
    children = [pid for pid in _all_processes() if _parent(pid) == parent]
    return children + [pid for child in children for pid in _descendants(child)]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _arguments(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
