from __future__ import annotations

import base64
import subprocess

import pytest

from harness.transport.known_hosts import HostKey, KnownHosts, default_path

ONE = HostKey("[10.0.0.1]:8022", "ssh-ed25519", b"\0one")
TWO = HostKey("pi.local", "ssh-ed25519", b"\0two")


@pytest.fixture
def known(tmp_path):
    return KnownHosts(tmp_path / "new" / "folder" / "known_hosts")


def test_what_was_stored_is_found_under_its_host_alone(known) -> None:
    assert known.find(ONE.host) == ()
    known.store(ONE)
    known.store(TWO)
    assert known.find(ONE.host) == (ONE,)
    assert known.find(TWO.host) == (TWO,)
    assert known.find("10.0.0.1") == ()
    assert known.path.stat().st_mode & 0o077 == 0
    assert [p.name for p in known.path.parent.iterdir()] == ["known_hosts"]


def test_a_new_key_replaces_every_old_one_of_its_host_and_nothing_else(known) -> None:
    known.path.parent.mkdir(parents=True)
    other = base64.b64encode(b"\0old").decode()
    known.path.write_text(f"# mine\n\npi.local,10.0.0.9 ssh-rsa {other}\npi.local ssh-ed25519 {other}\ndamaged\n")
    known.store(TWO)
    assert known.find("pi.local") == (TWO,)
    assert known.find("10.0.0.9") == (HostKey("10.0.0.9", "ssh-rsa", b"\0old"),)
    assert known.path.read_text().startswith("# mine\n\n10.0.0.9 ssh-rsa")
    assert "damaged" in known.path.read_text()


def test_hashed_names_are_found_and_replaced(known) -> None:
    known.store(TWO)
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", known.path], check=True, capture_output=True)
    if "pi.local" in known.path.read_text():
        pytest.skip("this ssh-keygen does not hash")
    assert known.find("pi.local") == (TWO,)
    newer = HostKey("pi.local", "ssh-ed25519", b"\0newer")
    known.store(newer)
    assert known.find("pi.local") == (newer,)
    assert len(known.path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "line", ["|1|x|y ssh-ed25519 AAAA", "|1| ssh-ed25519 AAAA", "pi.local ssh-ed25519 !!", "pi.local"]
)
def test_damaged_lines_match_nothing(known, line) -> None:
    known.path.parent.mkdir(parents=True)
    known.path.write_text(line + "\n")
    assert known.find("pi.local") == ()


def test_the_default_follows_xdg(tmp_path) -> None:
    assert default_path({"XDG_CONFIG_HOME": str(tmp_path)}) == tmp_path / "edgemoe-farm" / "known_hosts"
    assert default_path({"XDG_CONFIG_HOME": "relative"}) == default_path({})
    assert default_path({}).parts[-3:] == (".config", "edgemoe-farm", "known_hosts")
