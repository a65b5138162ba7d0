"""The whole controller over a real OpenSSH server: trusted, killed in the middle of a sweep, resumed, reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.offline.importing.importer import import_checkpoint
from reports.records import RunStatus
from reports.results.database import ResultsDatabase
from tests.command_line import finish, start
from tests.golden.checkpoints import RECIPES

pytestmark = pytest.mark.integration

MATRIX = """
name = "killed"
strategies = ["naive-swap", "full-load"]
warmups = 0
repetitions = 1
blocks = 3
deadline_s = 60
[[containers]]
name = "tiny"
path = "tiny.emoe"
[[workloads]]
name = "ids"
tokens = [[5, 6, 7]]
max_new_tokens = 40
"""


@pytest.fixture
def user(tmp_path: Path, make_sshd: Callable[..., object]) -> Path:
    """A user's folder with one device on slow storage, where a cell of naive-swap takes seconds."""
    server = make_sshd("pi", trusted=False)
    device = server.device  # type: ignore[attr-defined]
    import_checkpoint(RECIPES[0].write(tmp_path / "hf"), tmp_path / "tiny.emoe")
    (tmp_path / "matrix.toml").write_text(MATRIX)
    (tmp_path / "devices.toml").write_text(
        f'version = 1\n[devices.pi]\nhost = "{device.host}"\nport = {device.port}\nuser = "{device.user}"\n'
        f'identity_file = "{device.identity_file}"\nroot = "{device.root}"\npython = "{device.python}"\n'
        f"emulated_read_bytes_per_s = {4 * (tmp_path / 'tiny.emoe').stat().st_size}\n"
    )
    return tmp_path


def test_a_killed_controller_is_resumed_and_every_cell_ends_once(user: Path) -> None:
    code, _, err = finish(start(user, "run", "matrix.toml"))
    assert (code, "edgemoe-farm trust pi" in err) == (4, True), err
    code, out, err = finish(start(user, "trust", "pi", "--yes"))
    assert (code, "SHA256:" in out + err) == (0, True)

    controller = start(user, "run", "matrix.toml", "--json")
    assert controller.stdout is not None
    started = 0
    for line in controller.stdout:  # until one record is stored and the next cell is under way
        started += json.loads(line)["event"] == "cell_started"
        if started == 2:
            break
    controller.kill()
    finish(controller)

    with ResultsDatabase.open(user / "results/farm.db", create=False) as database:
        sweep = database.sweep("latest").id
        before = [run.id for run in database.runs(sweep_id=sweep)]
    assert 1 <= len(before) < 6
    code, out, err = finish(start(user, "run", "--resume"))
    assert code == 0, err
    assert "in the queue" not in err, "it knows that the holder of the device's lease, its former self, is dead"
    with ResultsDatabase.open(user / "results/farm.db", create=False) as database:
        runs = database.runs(sweep_id=sweep)
    assert [run.id for run in runs][: len(before)] == before
    assert len({(run.cell.key, run.block) for run in runs}) == len(runs) == 6
    assert {run.status for run in runs} == {RunStatus.OK}
    assert len({run.lease_token for run in runs}) == 2
    samples = [sample for run in runs for sample in run.samples if sample.timeline is None]  # else it is cut short
    assert len({sample.tokens for sample in samples}) == 1

    assert finish(start(user, "report", "latest", "-o", "page.html"))[0] == 0
    page = (user / "page.html").read_text()
    assert "emulated" in page
    assert "naive-swap" in page
    code, out, _ = finish(start(user, "results", "export", sweep, "--format", "jsonl"))
    assert code == 0
    assert [json.loads(line)["status"] for line in out.splitlines()] == ["ok"] * 6
