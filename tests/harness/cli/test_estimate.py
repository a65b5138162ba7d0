"""`estimate` as a user types it, without a device; test_farm.py has the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from device_inventory import Device, Inventory
from engine.offline.importing.importer import import_checkpoint
from engine.strategies import STRATEGIES
from harness.cli import main
from harness.errors import UnreachableError
from harness.sweep.estimator import CellEstimator
from harness.sweep.matrix import parse_matrix
from harness.sweep.plan import make_plan
from reports.records import Run, RunStatus, run_from_json, run_to_json
from tests.golden.checkpoints import HELD_OUT, SHIPPED, held_out_text
from tests.harness.conftest import Bench


def farm(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A container with its profile and trace beside it."""
    path = tmp_path_factory.mktemp("estimating") / "m.emoe"
    import_checkpoint(SHIPPED, path)
    text = path.with_name("text.txt")
    text.write_text(held_out_text(HELD_OUT[0])[:1500])
    farm("model", "profile", path, "--text", text, "--to", path.with_name("m.profile.json"))
    farm("model", "trace", path, "--text", text, "--to", path.with_name("m.trace"))
    return path


def test_by_hand_for_a_device_that_is_not_here(model: Path) -> None:
    arguments = (
        "estimate", model, "--storage-rate", "43", "--memory-rate", "4", "--trace", model.with_name("m.trace"),
        "--profile", model.with_name("m.profile.json"), "--expert-budget", "32-experts",
    )  # fmt: skip
    found = json.loads(farm(*arguments, "--json").stdout)
    assert found["estimate"] is True
    assert found["bytes_per_s"] == 43e6
    rows = {row["strategy"]: row for row in found["strategies"]}
    assert list(rows) == list(STRATEGIES)
    assert rows["naive-swap"]["token_s"] > rows["edgemoe"]["token_s"] > rows["full-load"]["token_s"]
    assert rows["naive-swap"]["bound"] == "storage"
    assert rows["full-load"]["bound"] == "memory"
    assert "second, lower precision" in rows["edgemoe-lowbit"]["needs"]
    shown = farm(*arguments).stdout
    assert shown.startswith("estimate, not measured")
    assert "edgemoe-lowbit: " in shown
    assert "by hand, from 4 GB/s" in shown
    assert "replayed from" in shown


def test_on_this_machine_with_the_routing_of_a_text(model: Path) -> None:
    found = json.loads(
        farm(
            "estimate", model, "--storage-rate", "200", "--text", model.with_name("text.txt"), "--strategy",
            "naive-swap", "--strategy", "full-load", "--json",
        ).stdout
    )  # fmt: skip
    assert [row["strategy"] for row in found["strategies"]] == ["naive-swap", "full-load"]
    assert found["times"]["expert_s"].keys() == {"fp16"}
    full = found["strategies"][1]
    times = found["times"]
    expected = 8 * times["layer_s"] + times["head_s"] + 16 * times["expert_s"]["fp16"]
    assert full["token_s"] == pytest.approx(expected) == pytest.approx(full["arithmetic_s"])
    assert "timed on this machine" in found["basis"]["arithmetic"]


def test_this_machines_storage_is_measured_and_the_routing_made_up(model: Path) -> None:
    found = json.loads(farm("estimate", model, "--strategy", "naive-swap", "--json").stdout)
    (row,) = found["strategies"]
    assert row["token_s"] > row["read_bytes"] / found["bytes_per_s"]
    assert "measured on this machine" in found["basis"]["storage"]
    assert found["basis"]["routing"].startswith("uniform")


MATRIX = """
name = "estimated"
strategies = ["full-load", "naive-swap", "edgemoe", "edgemoe-lookahead"]
warmups = 0
repetitions = 1
blocks = 2
[[containers]]
name = "c"
path = "m.emoe"
profile = "m.profile.json"
TRACE
[[workloads]]
name = "w"
tokens = [[5, 6, 7], [8, 9, 10]]
max_new_tokens = 3
"""


def estimated(bench: Bench, model: Path, trace: str, rate: float | None = 1e8) -> list[Run]:
    """The runs of a sweep on two scripted devices."""
    matrix = parse_matrix(MATRIX.replace("TRACE", trace), source="m.toml", folder=model.parent)
    inventory = Inventory({name: Device(name, "h", emulated_read_bytes_per_s=rate) for name in ("one", "two")})
    bench.estimate = CellEstimator()
    return bench.measure(make_plan(matrix, inventory, container_sha256={"c": "c" * 64}, tokenise=lambda p, t: ()))


def test_each_cell_of_a_run_has_its_estimate_and_a_device_is_asked_once(bench: Bench, model: Path) -> None:
    runs = estimated(bench, model, 'trace = "m.trace"')
    assert len(runs) == 16
    assert sorted(bench.farm.timed) == [("one", "store/m.emoe"), ("two", "store/m.emoe")]
    by_strategy = {run.cell.strategy: run.estimate for run in runs}
    assert all(found is not None and "replayed from" in found.basis for found in by_strategy.values())
    assert len({run.estimate for run in runs}) == 4, "the same for every block and every equal device"
    assert by_strategy["naive-swap"].token_s > by_strategy["full-load"].token_s == pytest.approx(8e-3 + 1e-3 + 16e-3)
    assert run_from_json(json.loads(json.dumps(run_to_json(runs[0])))) == runs[0]


def test_what_is_not_known_is_not_estimated_and_the_run_goes_on(bench: Bench, model: Path) -> None:
    runs = estimated(bench, model, "", rate=None)
    assert {run.cell.strategy for run in runs if run.estimate} == {"full-load"}
    assert {run.status for run in runs} == {RunStatus.OK}


def test_a_device_that_cannot_be_timed_is_measured_all_the_same(bench: Bench, model: Path) -> None:
    bench.farm.time_error = lambda container: UnreachableError("gone")
    runs = estimated(bench, model, "")
    assert [(run.estimate, run.status) for run in runs] == [(None, RunStatus.OK)] * 16
    assert len(bench.farm.timed) == 2, "and is not asked again"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--trace", "a", "--text", "b"], "not both"),
        (["--device", "pi5", "--memory-rate", "4"], "give one of them"),
        (["--deploy"], "goes with --device"),
        (["--strategy", "faster"], "is not one of"),
        (["--trace", "absent", "--memory-rate", "4"], "absent: cannot be opened"),
        (["--device", "pi5"], "devices.toml"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    model: Path, arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason in farm("estimate", model, *arguments, code=2).stderr.strip().splitlines()[-1]
