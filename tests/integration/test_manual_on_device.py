"""Runs command lines of README.md and MANUAL.md that ask a device, as they stand there, on a real OpenSSH server."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.command_line import farm
from tests.test_manual import command_lines

ROOT = Path(__file__).parents[2]

# In the order in which they need one another.
LINES = (
    "edgemoe-farm trust pi5",
    "edgemoe-farm devices",
    "edgemoe-farm probe pi5",
    "edgemoe-farm doctor",
    "edgemoe-farm model import harness/demo/mix16 --to mix16.emoe",
    "edgemoe-farm model info mix16.emoe",
    "edgemoe-farm model verify mix16.emoe",
    "edgemoe-farm model profile mix16.emoe --text harness/demo/texts/novel.train.txt --to mix16.profile.json",
    "edgemoe-farm estimate mix16.emoe --device pi5 --deploy --profile mix16.profile.json",
    "edgemoe-farm devices health pi5",
    "edgemoe-farm devices locks",
    "edgemoe-farm devices prune pi5",
)


@pytest.mark.integration
def test_the_examples_that_ask_a_device_work(make_sshd, tmp_path, monkeypatch) -> None:
    server = make_sshd("pi5", trusted=False)
    device = server.device
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    folder = tmp_path / "farm"
    folder.mkdir()
    (folder / "harness/demo/texts").mkdir(parents=True)
    (folder / "harness/demo/mix16").symlink_to(ROOT / "harness/demo/mix16")
    text = (ROOT / "harness/demo/texts/novel.train.txt").read_text(encoding="utf-8")
    (folder / "harness/demo/texts/novel.train.txt").write_text(text[:3000], encoding="utf-8")  # all of it takes 30 s
    (folder / "devices.toml").write_text(
        f'version = 1\n[devices.pi5]\nhost = "{device.host}"\nport = {device.port}\nuser = "{device.user}"\n'
        f'identity_file = "{device.identity_file}"\nroot = "{device.root}"\npython = "{device.python}"\n'
    )
    monkeypatch.chdir(folder)
    shown = {line: farm(*shlex.split(line)[1:], typed="y\n").output for line in LINES}
    assert set(LINES) <= set(command_lines())
    assert "edgemoe" in shown[LINES[8]]
    assert "naive-swap" in shown[LINES[8]]
