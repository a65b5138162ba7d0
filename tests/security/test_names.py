"""Names that users and files choose: each is refused, or harmless in a shell, a path, a terminal and a page."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from device_inventory import Inventory, InventoryError
from device_inventory.inventory import Device
from engine.protocol import RunRequest
from harness.device.collect import Ending
from harness.device.deploy import FarmFolder, safe_name
from harness.errors import UsageError
from harness.sweep.matrix import parse_matrix
from harness.transport.shell import ShellTransport
from reports.errors import RecordError
from reports.records import Cell, Run, RunStatus, Sweep, Verdict, run_id
from reports.text import harmless
from tests.reports.seen import pages_of
from tests.security.hostile import long_texts, texts
from tests.security.test_device_output import is_harmless

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def toml(text: str) -> str:
    """Returns it as a TOML text."""
    escaped = "".join(c if c.isalnum() else f"\\U{ord(c):08x}" for c in text if not 0xD800 <= ord(c) < 0xE000)
    return f'"{escaped}"'


@given(texts, st.sampled_from(["name", "host", "user", "identity_file", "proxy_jump", "root", "python", "tags"]))
def test_an_inventory_takes_what_is_safe_and_tells_of_the_rest_in_one_line(text: str, key: str) -> None:
    table: dict[str, Any] = {"host": "h"}
    if key != "name":
        table[key] = [text] if key == "tags" else text
    try:
        inventory = Inventory.parse({"version": 1, "devices": {text if key == "name" else "pi": table}})
    except InventoryError as error:
        assert is_harmless(harmless(error))
        return
    (device,) = inventory.devices.values()
    assert PLAIN.fullmatch(device.name)
    for value in (device.host, device.user, device.identity_file, device.proxy_jump, device.root, device.python):
        assert value is None or (value.isprintable() and value.strip())
    for word in (device.host, device.user or "u", *(device.proxy_jump or "j").split(",")):
        assert not word.startswith("-"), "ssh would take it for an option"
    assert not device.root.startswith(("-", "~"))


@given(
    texts, st.sampled_from(["name", "containers", "workloads", "strategies", "devices", "expert_budgets", "baseline"])
)
def test_a_matrix_takes_what_is_safe_and_tells_of_the_rest_in_one_line(text: str, key: str) -> None:
    word = {name: toml(text) if key == name else '"plain"' for name in ("name", "containers", "workloads")}
    lists = {name: f"[{toml(text) if key == name else usual}]" for name, usual in (
        ("strategies", '"edgemoe"'), ("devices", '"all"'), ("expert_budgets", '"default"'),
    )}  # fmt: skip
    source = f"""
name = {word["name"]}
{"".join(f"{name} = {value}" + chr(10) for name, value in lists.items())}
{f"baseline = {toml(text)}" if key == "baseline" else ""}
[[containers]]
name = {word["containers"]}
path = "c.emoe"
[[workloads]]
name = {word["workloads"]}
tokens = [[1]]
"""
    try:
        matrix = parse_matrix(source, source="m.toml", folder=Path("/nowhere"))
    except UsageError as error:
        assert is_harmless(harmless(error))
        return
    for name in (matrix.name, matrix.containers[0].name, matrix.workloads[0].name):
        assert PLAIN.fullmatch(name)


@given(long_texts)
def test_no_name_leads_out_of_the_farms_folder_on_a_device(text: str) -> None:
    place = FarmFolder("/f")
    source = Path(f"/models/{text}".replace("\0", "") or "/models/x")
    for path in (place.blob("a" * 64, source), place.run(text), place.run(run_id(text, "cell", 0, 0))):
        assert path.startswith(f"{place.root}/")
        assert not {"..", ".", ""} & set(path.split("/")[1:])
        assert shlex.quote(path) == path, "it needs no quoting"
        assert not any(part.startswith("-") for part in path.split("/"))
    assert len(safe_name(text)) <= 100


class Shell(ShellTransport):
    """What a device's login shell would be told."""

    def close(self) -> None: ...

    def _execute(
        self, command_line: str, stdin: Any, out: Callable[[bytes], None], err: Callable[[bytes], None], **_: Any
    ) -> int:
        self.line = command_line
        self.words = shlex.split(command_line)
        out(b"begin-" + self.words[4].encode())
        return 0


@given(st.lists(long_texts, min_size=1, max_size=4), texts)
def test_every_word_reaches_the_command_as_it_is(words: list[str], value: str) -> None:
    words = [word.replace("\0", "") for word in words]
    shell = Shell("pi")
    shell.run(["printf", "%s", *words], deadline_s=5, environment={"KEY": value.replace("\0", "")})
    sent = [decoded(word) for word in shell.words[5:]]
    assert sent[-len(words) :] == [word.encode("utf-8", "surrogatepass") for word in words]
    assert f"KEY={value.replace(chr(0), '')}".encode("utf-8", "surrogatepass") in sent
    assert shell.line.isascii() and shell.line.isprintable()
    assert not set(shell.line) & set("\\!") - {"\\"}, "csh would take it for more"
    assert not re.search(r"\\[\\']", shell.line), "fish would take it for more"


def decoded(word: str) -> bytes:
    """Undoes what a word is sent in, as `printf %b` does."""
    if word.startswith("="):
        return word[1:].encode()
    return re.sub(rb"\\0([0-7]{3})", lambda found: bytes([int(found[1], 8)]), word[1:].encode())


def test_a_real_shell_finds_nothing_to_do_in_hostile_words(tmp_path: Path) -> None:
    from tests.security.hostile import SNIPPETS

    words = [word for word in SNIPPETS if "\0" not in word and "\ud800" not in word]
    shell = Shell("pi")
    shell.run(["printf", "%s\\n", *words], deadline_s=5)
    done = subprocess.run(["sh", "-c", shell.line], cwd=tmp_path, capture_output=True, check=True, timeout=60)
    mark = shell.words[4]
    assert done.stdout.decode() == f"begin-{mark}" + "".join(f"{word}\n" for word in words) + f"end-{mark}"
    assert list(tmp_path.iterdir()) == []


@given(texts, texts, texts, long_texts)
def test_a_cell_of_whatever_name_is_refused_or_shown_as_text(
    device: str, strategy: str, workload: str, name: str
) -> None:
    try:
        cell = Cell(device, "c", "c" * 64, strategy, "default", workload, "d" * 64, "cold")
    except RecordError as error:
        assert is_harmless(harmless(error))
        return
    request = RunRequest("r", "c", strategy, prompts=((1,),), max_new_tokens=1)
    run = Run("r", "20260101-000000-abcd", cell, 0, RunStatus.FAILED, Verdict.INVALID, (name,), request=request,
              started_at="2026-01-01T00:00:00+00:00", ended_at="2026-01-01T00:00:00+00:00")  # fmt: skip
    sweep = Sweep(run.sweep_id, name or "n", name, strategy, ((cell.key, 0),), run.started_at, "0")
    for page in pages_of(sweep, [run]).values():
        assert is_harmless(page)
        assert page.count("<script") == 1 and "<img" not in page
    terminal = io.StringIO()
    Console(file=terminal, markup=False, width=200).print(cell.key)
    assert is_harmless(terminal.getvalue())


@pytest.mark.parametrize("name", ["", ".", "..", "...", "-", "/", "../../etc/passwd", "\0", "\u202e", "a" * 500])
def test_names_of_files_on_a_device(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", safe_name(name))


def test_nothing_here_is_tame() -> None:
    """A device's own declared names are checked, an ending's are not: the checks above must see the difference."""
    with pytest.raises(InventoryError):
        Device("-rf", "h")
    assert not is_harmless(Ending("exited", 0, log_tail="\x1b[2J").log_tail)
