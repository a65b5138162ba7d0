"""A server that speaks SSH and sends one packet that is wrong, before or after the login; one case for each seed.

What is asked of the farm: each case ends as an answer or as an error of its own device, and leaves nothing open.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import paramiko
from paramiko.packet import Packetizer

from device_inventory import Device
from harness.errors import DeviceError
from harness.transport import shell
from harness.transport.known_hosts import HostKey, KnownHosts
from harness.transport.ssh import SshTransport
from reports.text import harmless

CONNECT_S = 0.3
MOST_PACKETS = 20  # the server sends about so many until a command has ended
Mutation = Callable[[random.Random, bytes], bytes]
Answer = Callable[[paramiko.Channel, bytes], None]


def _flipped(rng: random.Random, payload: bytes) -> bytes:
    content = bytearray(payload)
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def _number(rng: random.Random, payload: bytes) -> bytes:
    """Puts a length or count where it may be taken for one."""
    at = rng.randrange(len(payload))
    number = rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFF00, 1 << 24))
    return payload[:at] + struct.pack(">I", number) + payload[at + 4 :]


MUTATIONS: dict[str, Mutation] = {
    "flipped bits": _flipped,
    "a number": _number,
    "cut off": lambda rng, payload: payload[: rng.randrange(len(payload))] or payload[:1],
    "another type": lambda rng, payload: bytes([rng.randrange(256)]) + payload[1:],
    "random content": lambda rng, payload: payload[:1] + rng.randbytes(rng.randrange(300)),
    "another message": lambda rng, payload: bytes([rng.randrange(1, 101)]) + rng.randbytes(rng.randrange(80)),
    "no UTF-8": lambda rng, payload: payload[:1] + b"\0\0\0\x04\xff\xfe\xff\xfe" + payload[1:],
    "longer": lambda rng, payload: payload + rng.randbytes(rng.choice((1, 1000, 60_000))),
    "as long as none may be": lambda rng, payload: payload + bytes(300_000),
}
RAW = ("a length of 4 GB", "a length of nothing", "random bytes", "nothing more", "an end", "an endless banner")
KINDS = (*MUTATIONS, *RAW)


class _Message:
    """Holds a payload as the packetizer takes it."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload

    def asbytes(self) -> bytes:
        return self._payload


class _Lying(Packetizer):
    """Sends one packet that is wrong."""

    def __init__(self, wire: socket.socket) -> None:
        super().__init__(wire)
        self.wire, self.sent = wire, 0
        self.rng, self.kind, self.which = random.Random(0), "", -1

    def start_handshake(self, timeout: float) -> None:
        """Starts no timer, whose thread would outlive the case."""

    def send_message(self, data: Any) -> None:
        self.sent += 1
        if self.sent - 1 != self.which:
            return super().send_message(data)
        if self.kind in MUTATIONS:
            return super().send_message(_Message(MUTATIONS[self.kind](self.rng, data.asbytes())))
        if self.kind == "a length of 4 GB":
            self.write_all(struct.pack(">I", self.rng.choice((0xFFFFFFF4, 0xFFFFFFFC, 0x7FFFFFFC))) + bytes(200_000))
        elif self.kind == "a length of nothing":
            self.write_all(bytes(64))
        elif self.kind == "random bytes":
            self.write_all(self.rng.randbytes(self.rng.randrange(1, 4000)))
        elif self.kind == "an end":
            self.wire.close()
        return None  # and nothing more


class _Everything(paramiko.ServerInterface):
    """Lets everybody in, and answers each command as the farm's `sh` would."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def check_auth_none(self, username: str) -> int:
        return paramiko.AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return "publickey,none"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        mark = command.split(b"'")[9]
        threading.Thread(target=self._answer, args=(channel, mark), daemon=True).start()
        return True


def _answer(channel: paramiko.Channel, mark: bytes) -> None:
    with suppress(Exception):
        time.sleep(0.01)  # that the command was started is said first
        channel.sendall(b"begin-" + mark + b"hello\nend-" + mark)
        channel.sendall_stderr(b"begin-" + mark + b"end-" + mark)
        channel.send_exit_status(0)
        channel.shutdown_write()
        channel.close()


class LyingServer:
    """Serves one connection after another, each wrong in the way of its seed."""

    def __init__(self, answer: Answer = _answer) -> None:
        """Takes what answers a command, given its channel and mark."""
        self._answer = answer
        self.key = paramiko.ECDSAKey.generate(bits=256)
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._server.getsockname()[1]
        self._case = (0, "", -1)
        self._open: list[Any] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def will(self, seed: int, kind: str, which: int) -> None:
        """Says how the next connections are wrong: in packet `which`, from 0; -1: in none."""
        self._case = (seed, kind, which)

    def hang_up(self) -> None:
        """Ends all connections."""
        while self._open:
            with suppress(Exception):
                self._open.pop().close()

    def close(self) -> None:
        self._server.close()
        self.hang_up()

    def _serve(self) -> None:
        while True:
            try:
                wire, _ = self._server.accept()
            except OSError:
                return
            seed, kind, which = self._case
            self._open.append(wire)
            if kind == "an endless banner":
                threading.Thread(target=_babble, args=(wire,), daemon=True).start()
                continue
            with suppress(Exception):
                transport = paramiko.Transport(wire, packetizer_class=_Lying)
                self._open.append(transport)
                transport.add_server_key(self.key)
                lying = transport.packetizer
                lying.rng, lying.kind, lying.which = random.Random(seed), kind, which  # type: ignore[attr-defined]
                transport.start_server(threading.Event(), _Everything(self._answer))


def _babble(wire: socket.socket) -> None:
    with suppress(OSError):
        while True:
            wire.sendall(b"y" * 4096)


class Fuzz:
    """Puts one case after another to the farm's transport."""

    def __init__(self, folder: Path) -> None:
        self.server = LyingServer()
        self.ended: dict[str, int] = {}  # how many cases ended how
        known = KnownHosts(folder / "known_hosts")
        key = self.server.key
        known.store(HostKey(f"[127.0.0.1]:{self.server.port}", key.get_name(), key.asbytes()))
        self._known_hosts = known.path
        self._config = folder / "ssh_config"
        self._config.write_text("IdentityAgent none\nIdentityFile none\n")
        shell.GRACE_S = CONNECT_S

    def case(self, seed: int) -> tuple[str, int, str]:
        """Runs the case of a seed; returns its kind, its packet and how it ended. Raises what is no DeviceError."""
        rng = random.Random(seed)
        kind, which = KINDS[seed % len(KINDS)], rng.randrange(MOST_PACKETS)
        self.server.will(seed, kind, which)
        device = Device("liar", "127.0.0.1", port=self.server.port, user="me")
        transport = SshTransport(device, self._known_hosts, ssh_config=self._config, connect_s=CONNECT_S)
        try:
            done = transport.run(["true"], deadline_s=1, check=False)
            how = "answered" if done.stdout == b"hello\n" else "answered otherwise"
        except DeviceError as error:
            told = str(error)
            assert told.startswith("liar: ") and told == harmless(told) and len(told) < 2000, told
            how = type(error).__name__
        finally:
            transport.close()
            self.server.hang_up()
        self.ended[how] = self.ended.get(how, 0) + 1
        return kind, which, how
