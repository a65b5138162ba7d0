"""`gate`, `baseline` and `ack` on a results database."""

import json
from dataclasses import replace

import pytest

from reports.results.database import ResultsDatabase
from tests.command_line import invoke
from tests.programs.nights.simulated import Change, SimulatedFarm, recorded

TARGET = ("pi4b-emulated", "edgemoe")


@pytest.fixture
def farm(tmp_path, monkeypatch):
    """farm(*arguments) -> (exit code, output); its database has a baseline's sweep, one like it, and a slower one."""
    monkeypatch.setenv("EDGEMOE_FARM_RESULTS", str(tmp_path / "farm.db"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    simulated = SimulatedFarm(1, recorded(), tmp_path)
    sides = [simulated.baseline, simulated.measure({}), simulated.measure({TARGET: Change(slower=1.5)})]
    with ResultsDatabase.open(tmp_path / "farm.db") as database:
        for name, side in zip(("before", "like", "slower"), sides, strict=True):
            database.add_sweep(replace(side.sweep, id=name))
            for run in side.runs:
                database.add_run(replace(run, id=f"{name}-{run.id}", sweep_id=name))

    def call(*arguments):
        result = invoke(*arguments)
        return result.exit_code, result.output

    return call


def test_a_gate_needs_a_baseline(farm):
    code, output = farm("gate", "like")
    assert code == 2
    assert "no baseline main (known: none): `edgemoe-farm baseline pin main RUN`" in output


def test_the_exit_code_tells(farm, tmp_path):
    assert farm("baseline", "pin", "main", "before")[0] == 0
    code, output = farm("gate", "slower", "--json", "--junit", str(tmp_path / "j.xml"))
    told = json.loads(output)
    assert code == told["exit_code"] == 1
    assert {(f["device"], f["strategy"]) for f in told["findings"] if f["kind"] == "regression"} == {TARGET}
    assert "<failure" in (tmp_path / "j.xml").read_text()
    assert farm("gate", "slower", "--limit", "tpot_s=0.9", "--limit", "ttft_s=0.9")[0] in (0, 5)
    assert farm("gate", "before")[0] == 0
    code, output = farm("gate", "slower", "--junit", str(tmp_path))
    assert code == 2
    assert "regression" in output, "the verdict is told before a file fails"
    assert farm("gate", "slower", "--limit", "tpot=0.9")[0] == 2


def test_an_acknowledged_regression_fails_no_gate(farm):
    farm("baseline", "pin", "main", "before")
    where = ("--device", TARGET[0], "--strategy", TARGET[1])
    for metric in ("tpot_s", "ttft_s"):
        assert farm("ack", "add", *where, "--metric", metric, "--reason", "issue 12", "--for", "9999d")[0] == 0
    known = json.loads(farm("ack", "list", "--json")[1])
    assert {a["metric"] for a in known} == {"tpot_s", "ttft_s"}
    code, output = farm("gate", "slower")
    assert code in (0, 5)
    assert "### Acknowledged" in output
    assert farm("ack", "remove", *where, "--metric", "tpot_s")[0] == 0
    assert farm("gate", "slower")[0] == 1
    code, output = farm("ack", "remove", *where, "--metric", "tpot_s")
    assert code == 2
    assert "nothing is acknowledged" in output


def test_a_baseline_is_pinned_moved_and_removed(farm):
    code, output = farm("baseline", "pin", "main", "before", "--note", "0.1")
    assert code == 0
    assert "its engine 0000000000000000 is not kept on this machine" in output
    code, output = farm("baseline", "pin", "main", "like")
    assert code == 2
    assert "is pinned to before: `edgemoe-farm baseline move main RUN`" in output
    assert farm("baseline", "move", "main", "like")[0] == 0
    (listed,) = json.loads(farm("baseline", "list", "--json")[1])
    assert (listed["name"], listed["sweep_id"], listed["engine_kept"]) == ("main", "like", False)
    assert farm("baseline", "remove", "main")[0] == 0
    assert json.loads(farm("baseline", "list", "--json")[1]) == []
    assert farm("baseline", "move", "main", "like")[0] == 2
    assert farm("baseline", "pin", "main", "none-such")[0] == 2
