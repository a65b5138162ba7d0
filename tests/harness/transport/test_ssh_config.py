"""ssh_config is read as ssh reads it, and what the farm does not heed is named with file and line."""

from __future__ import annotations

import dataclasses
import getpass
import shutil
import socket
from pathlib import Path

import pytest

from device_inventory import Device
from harness.errors import UnreachableError
from harness.transport.ssh_config import Destination, hops

needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is not installed: apt install openssh-client")
LAB = Device("pi", "lab")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty home folder, and no agent."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / ".ssh").mkdir(mode=0o700)
    return tmp_path


def configured(home: Path, text: str) -> Path:
    path = home / ".ssh" / "config"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pi", Destination("pi")),
        ("me@pi:2222", Destination("pi", "me", 2222)),
        ("a@b@pi", Destination("pi", "a@b")),
        ("::1", Destination("::1")),
        ("fe80::1%eth0", Destination("fe80::1%eth0")),
        ("[::1]", Destination("::1")),
        ("[::1]:22", Destination("::1", None, 22)),
        ("me@[fe80::1%eth0]:2222", Destination("fe80::1%eth0", "me", 2222)),
        ("me@::1", Destination("::1", "me")),
        ("ssh://me@[::1]:22/", Destination("::1", "me", 22)),
    ],
)
def test_a_destination_is_read_as_ssh_reads_it(text: str, expected: Destination) -> None:
    assert Destination.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "@pi", "pi:", "pi:x", "pi:0", "pi:65536", "[::1", "::1]", "[::1]x", "-oProxyCommand=x", "-x@pi", "[]", "a@"],
)
def test_what_names_no_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        Destination.parse(text)


@needs_ssh
@pytest.mark.parametrize("host", ["[::1]", "[::1]:2222", "root@[::1]:2222"])
def test_brackets_around_ipv6_in_the_inventory(home: Path, host: str) -> None:
    (hop,) = hops(Device("pi", host))
    assert hop.host == "::1"
    assert hop.port == (2222 if host.endswith("2222") else 22)


@needs_ssh
def test_without_a_configuration_everything_is_sshs_default(home: Path) -> None:
    (hop,) = hops(LAB)
    assert (hop.host, hop.port, hop.user) == ("lab", 22, getpass.getuser())
    assert home / ".ssh/id_ed25519" in hop.identities
    assert (hop.agent, hop.command, hop.alias, hop.notes) == (None, None, None, ())


@needs_ssh
def test_the_inventory_comes_before_ssh_config(home: Path, tmp_path: Path) -> None:
    configured(home, "Host lab\n HostName 10.0.0.1\n Port 2022\n User other\n IdentityFile ~/.ssh/theirs\n")
    key = tmp_path / "mine"
    key.write_text("")
    (hop,) = hops(dataclasses.replace(LAB, port=8022, user="me", identity_file=str(key)))
    assert (hop.host, hop.port, hop.user) == ("10.0.0.1", 8022, "me")
    assert hop.identities == (key, home / ".ssh/theirs"), "as `ssh -i` does"
    (hop,) = hops(LAB)
    assert (hop.host, hop.port, hop.user) == ("10.0.0.1", 2022, "other")


@needs_ssh
@pytest.mark.parametrize(
    "text",
    [
        "# it's a comment\nHost lab # don't\n HostName 10.0.0.1\n",
        "Host lab\n HostName 10.0.0.1\nMatch final all\n ForwardX11Trusted yes\n",
        "Match host lab\n HostName 10.0.0.1\n",
        'Match exec "true"\n HostName 10.0.0.1\n',
        "Include part.conf\n",
        'Include "part.*"\n',
        'Host "lab"\n HostName "10.0.0.1"\n',
        "Host=lab\n HostName=10.0.0.1\n",
        "Host * !other\n HostName 10.0.0.1\n",
        "\ufeff# a comment\nHost lab\n HostName 10.0.0.1\n".removeprefix("\ufeff"),
        "Host lab\r\n HostName 10.0.0.1\r\n",
    ],
)
def test_what_paramiko_stumbles_over_is_read(home: Path, text: str) -> None:
    (home / ".ssh/part.conf").write_text("Host lab\n HostName 10.0.0.1\n")
    configured(home, text)
    (hop,) = hops(LAB)
    assert hop.host == "10.0.0.1"


@needs_ssh
def test_jump_hosts_are_nested_as_ssh_nests_them(home: Path) -> None:
    configured(
        home,
        "Host lab\n ProxyJump me@b:2222\nHost b\n HostName 10.0.0.2\n ProxyJump [::1]:22\nHost none\n ProxyJump none\n",
    )
    assert [str(hop).partition("@")[2] for hop in hops(LAB)] == ["::1 port 22", "10.0.0.2 port 2222", "lab port 22"]
    assert [hop.user for hop in hops(LAB)][1] == "me"
    assert len(hops(Device("pi", "none"))) == 1
    assert [hop.host for hop in hops(dataclasses.replace(LAB, proxy_jump="x,[fe80::2]:9"))] == ["x", "fe80::2", "lab"]
    assert len(hops(dataclasses.replace(LAB, proxy_jump="none"))) == 1, "the inventory comes first"


@needs_ssh
def test_jump_hosts_that_go_round_in_circles(home: Path) -> None:
    configured(home, "Host lab\n ProxyJump b\nHost b\n ProxyJump lab\n")
    with pytest.raises(UnreachableError, match=r"pi: more than 8 jump hosts lead to .* go round in circles"):
        hops(LAB)


@needs_ssh
def test_agents_identities_aliases_and_commands(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
    monkeypatch.setenv("OTHER", "/run/other")
    configured(
        home,
        'Host lab\n IdentitiesOnly yes\n IdentityAgent "/run/my agent"\n IdentityFile %d/.ssh/%r@%h\n'
        ' IdentityFile "~/a b.pub"\n'
        " User u\n HostKeyAlias board\n AddressFamily inet6\n ProxyCommand nc -x ${OTHER} %h %p %%\n"
        "Host none\n IdentityAgent none\nHost variable\n IdentityAgent $OTHER\n",
    )
    (hop,) = hops(LAB)
    assert hop.identities_only
    assert hop.identities == (home / ".ssh/u@lab", home / "a b.pub")
    assert hop.agent == "/run/my agent"
    assert (hop.alias, hop.family, hop.command) == ("board", socket.AF_INET6, "nc -x /run/other lab 22 %")
    assert hops(Device("pi", "other"))[0].agent == "/run/agent"
    assert hops(Device("pi", "none"))[0].agent is None
    assert hops(Device("pi", "variable"))[0].agent == "/run/other"


@needs_ssh
def test_what_is_not_heeded_is_named_with_file_and_line(home: Path) -> None:
    (home / ".ssh/part.conf").write_text("\nCertificateFile ~/.ssh/it.pub\n")
    path = configured(
        home, "# one\nInclude part.conf\nBindAddress 10.0.0.9\nKexAlgorithms +diffie-hellman-group1-sha1\n"
    )
    notes = hops(LAB)[0].notes
    assert f"CertificateFile ({home}/.ssh/part.conf line 2) is not supported" in notes
    assert f"BindAddress ({path} line 3) is not supported" in notes
    assert f"KexAlgorithms ({path} line 4) is not supported" in notes
    assert len(notes) == 3


@needs_ssh
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Host lab\n Frobnicate yes\n", r"line 2: Bad configuration option: frobnicate"),
        ("Host lab\n Port x\n", r"line 2: Bad port"),
        ('Host "lab\n', "line 1"),
        ("\xff\x1b[2J\n", "line 1"),
        ("Host lab\n IdentityFile ~nobody-of-that-name/key\n", "home directory"),
        ("Host lab\n IdentityFile %C/key\n", r"the token %C in .* is not supported"),
    ],
)
def test_what_ssh_refuses_is_told_in_its_words(home: Path, text: str, told: str) -> None:
    path = configured(home, text)
    with pytest.raises(UnreachableError, match=told) as raised:
        hops(LAB)
    assert str(raised.value).isprintable()
    assert str(path) in str(raised.value) or "IdentityFile" in text


@needs_ssh
def test_a_configuration_of_ones_own(home: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("Host lab\n HostName 10.0.0.7\n")
    configured(home, "Host lab\n HostName 10.0.0.1\n")
    assert hops(LAB, own)[0].host == "10.0.0.7"


def test_without_ssh_a_device_works_of_which_the_inventory_says_all(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert hops(LAB)[0].host == "lab"
    path = configured(home, "Host lab\n HostName 10.0.0.1\n")
    with pytest.raises(UnreachableError, match=f"{path} is read by `ssh -G`, and ssh is not installed: install"):
        hops(LAB)
    key = home / "key"
    key.write_text("")
    (hop,) = hops(dataclasses.replace(LAB, port=22, user="me", identity_file=str(key)))
    assert (hop.host, hop.identities) == ("lab", (key,))


def test_a_user_who_is_named_twice(home: Path) -> None:
    with pytest.raises(UnreachableError, match="say the same twice"):
        hops(Device("pi", "me@lab", user="other"))
