"""A nightly run over a real OpenSSH server: killed and resumed, and a slower engine is found."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from engine.offline.importing.importer import import_checkpoint
from tests import command_line
from tests.golden.checkpoints import RECIPES

pytestmark = pytest.mark.integration

MATRIX = """
name = "small"
strategies = ["naive-swap"]
warmups = 0
repetitions = 1
blocks = 2
deadline_s = 60
[[containers]]
name = "tiny"
path = "tiny.emoe"
[[workloads]]
name = "ids"
tokens = [[5, 6, 7]]
max_new_tokens = 12
"""
# Limits that whatever else the machine does is under.
NIGHTLY = """
name = "farm"
matrix = "matrix.toml"
baseline = "main"
[thresholds]
tpot_s = 0.2
ttft_s = 10
peak_resident_bytes = 0.5
[confirmation]
pairs = 8
rounds = 1
[webhook]
url_env = "HOOK"
"""
LIKE_EVERY_NIGHT = ("nightly", "nightly.toml", "--json")


@pytest.fixture
def user(tmp_path: Path, make_sshd: Callable[..., Any]) -> Path:
    """A user's folder with a device on slow storage, where a token of naive-swap takes tens of milliseconds."""
    import_checkpoint(RECIPES[0].write(tmp_path / "hf"), tmp_path / "tiny.emoe")
    (tmp_path / "matrix.toml").write_text(MATRIX)
    (tmp_path / "nightly.toml").write_text(NIGHTLY)
    device = make_sshd("pi").device
    inventory = (
        "version = 1\n"
        f'[devices.pi]\nhost = "{device.host}"\nport = {device.port}\nuser = "{device.user}"\n'
        f'identity_file = "{device.identity_file}"\nroot = "{device.root}"\npython = "{device.python}"\n'
        f"emulated_read_bytes_per_s = {8 * (tmp_path / 'tiny.emoe').stat().st_size}\n"
    )
    (tmp_path / "devices.toml").write_text(inventory)
    return tmp_path


def farm(user: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return command_line.start(user, *arguments, EDGEMOE_FARM_KNOWN_HOSTS=str(user / "known_hosts"), **environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]], str]:
    code, out, err = command_line.finish(process)
    return code, [json.loads(line) for line in out.splitlines() if line.startswith("{")], err


def test_a_slower_engine_is_found_the_first_night(user: Path) -> None:
    assert finish(farm(user, "run", "matrix.toml"))[0] == 0
    assert finish(farm(user, "baseline", "pin", "main"))[0] == 0

    slower = {"EDGEMOE_TEST_DELAY": "naive-swap@pi=0.6", "HOOK": "http://127.0.0.1:1/SECRET"}  # where nobody listens
    killed = farm(user, *LIKE_EVERY_NIGHT, **slower)
    assert killed.stdout is not None
    next(line for line in killed.stdout if json.loads(line)["event"] == "cell_ended")
    killed.kill()
    finish(killed)

    code, said, err = finish(farm(user, *LIKE_EVERY_NIGHT, **slower))
    night = said[-1]
    assert code == night["exit_code"] == 1, (night, err)
    assert "webhook (HOOK): Connection refused: farm, sweep" in err
    assert "SECRET" not in err + json.dumps(said)
    assert f"going on with the night that began at {night['at'][:10]}" in err
    assert {(f["kind"], f["device"], f["strategy"], f["metric"]) for f in night["findings"]} == {
        ("regression", "pi", "naive-swap", "tpot_s")
    }
    folder = user / "nightly" / night["sweep"]
    assert night["page"] == str(folder / "report.html")
    assert "slowed on purpose" in (folder / "report.html").read_text()
    failures = ElementTree.parse(folder / "junit.xml").findall("testcase/failure/..")
    assert [case.get("classname") for case in failures] == ["pi"]
    assert "### Regressions" in (folder / "summary.md").read_text()
    assert not (user / "nightly" / ".farm.state.json").exists()
