"""Damages known_hosts and ssh_config, one case for each seed.

What is asked of the farm: each is read, or refused in one line; and a good line that was left alone is still found.
"""

from __future__ import annotations

import base64
import random
from pathlib import Path

from device_inventory import Device
from harness.errors import DeviceError
from harness.transport.known_hosts import HostKey, KnownHosts
from harness.transport.ssh_config import hops
from reports.text import harmless

GOOD = HostKey("[10.0.0.1]:2222", "ssh-ed25519", b"\0\0\0\x0bssh-ed25519\0\0\0 " + bytes(range(32)))
_KEY = base64.b64encode(GOOD.content).decode()
_LINES = (
    f"pi.local {GOOD.kind} {_KEY}",
    f"*.lab,!bad.lab,[10.*]:?? {GOOD.kind} {_KEY} a comment",
    f"@cert-authority *.lab {GOOD.kind} {_KEY}",
    f"@revoked *.lab {GOOD.kind} {_KEY}",
    f"|1|F1E1KeoE/eEWhi10WpGv4OdiO6Y=|3988QV0VE8wmZL7suNrYQLITLCg= ssh-rsa {_KEY}",
    "# a comment",
    "",
)
# Nothing that ssh would run or read elsewhere: what is damaged may still be obeyed.
_CONFIG = (
    "Host lab *.example !other", "HostName 10.0.0.1", "Port 2222", "User me", 'IdentityFile "~/.ssh/a key"',
    "IdentityFile %d/.ssh/%r", "IdentitiesOnly yes", "IdentityAgent none", "ProxyJump a@[::1]:22,b", "ProxyJump none",
    "HostKeyAlias board", "AddressFamily inet6", "Match host lab", "Match all", "Match final all", "# it's a comment",
    "CertificateFile x", "ForwardX11Trusted yes", "Host=lab", "KexAlgorithms +x",
)  # fmt: skip


def _damaged(rng: random.Random, text: bytes, most: int = 5) -> bytes:
    content = bytearray(text)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(6):
            case 0:
                content[at:at] = rng.randbytes(rng.randint(1, 9))
            case 1:
                del content[at : at + rng.randint(1, 30)]
            case 2 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 3:
                content[at:at] = rng.choice(
                    (b"\0", b"\r", b"\n", b'"', b"'", b"%", b"${X}", b"*" * 99, b"=", b"\xff", b"@")
                )
            case 4:
                content[at:at] = content[at : at + 60] * rng.randint(1, 20)
            case _:
                content[at:at] = b"x" * rng.choice((1, 1000, 100_000))
    return bytes(content)


def known_hosts_case(folder: Path, seed: int) -> str:
    """Runs a case; returns how it ended. Raises what is not foreseen."""
    rng = random.Random(seed)
    known = KnownHosts(folder / "known_hosts")
    lines = [rng.choice(_LINES).encode() for _ in range(rng.randint(1, 6))]
    good = f"{GOOD.host} {GOOD.kind} {_KEY}".encode()
    known.path.write_bytes(good + b"\n" + _damaged(rng, b"\n".join(lines)))
    assert GOOD in known.find(GOOD.host)
    for host in ("pi.local", "x.lab", "\udcff", "a" * 300, GOOD.host):
        known.find(host)
        known.revoked(HostKey(host, GOOD.kind, GOOD.content))
        known.authority(host)
    new = HostKey("new.host", "ssh-ed25519", rng.randbytes(51))
    known.store(new)
    assert new in known.find(new.host)
    assert GOOD in known.find(GOOD.host)
    return "read"


def ssh_config_case(folder: Path, seed: int) -> str:
    """Runs a case; returns how it ended. Raises what is not foreseen."""
    rng = random.Random(seed)
    path = folder / "ssh_config"
    lines = [rng.choice(_CONFIG).encode() for _ in range(rng.randint(1, 8))]
    content = _damaged(rng, b"\n".join(lines), most=2)
    lowered = content.lower()
    if b"exec" in lowered or b"include" in lowered or b"proxycommand" in lowered or b"`" in content:
        return "left out"
    path.write_bytes(content)
    try:
        for hop in hops(Device("pi", rng.choice(("lab", "x.example", "[::1]:22", "me@lab"))), path):
            assert 0 < hop.port < 65536 and hop.host and hop.user
            assert all(note.isprintable() for note in hop.notes)
    except DeviceError as error:
        told = str(error)
        assert told.startswith("pi: ") and told == harmless(told), told
        return "refused"
    return "read"
