"""The farm's commands as a user types them, against loopback devices: real SSH, the real engine, a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_inventory import Device
from engine.offline.importing.importer import import_checkpoint
from harness.cli import exit_code
from harness.demo.loopback import Emulated, LoopbackFarm, kill_marked
from reports.results.database import ResultsDatabase
from tests.command_line import COMMAND, farm, refused
from tests.golden.checkpoints import HELD_OUT, RECIPES, SHIPPED, held_out_text

MATRIX = """
name = "tiny"
strategies = ["full-load", "naive-swap"]
baseline = "naive-swap"
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
max_new_tokens = 4
"""


def declare(folder: Path, devices: dict[str, Device]) -> None:
    text = "version = 1\n"
    for device in devices.values():
        text += f'[devices.{device.name}]\nhost = "{device.host}"\nport = {device.port}\nuser = "{device.user}"\n'
        text += f'identity_file = "{device.identity_file}"\npython = "{device.python}"\n'
        text += f"emulated_read_bytes_per_s = {device.emulated_read_bytes_per_s}\n"
    (folder / "devices.toml").write_text(text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: two devices are declared, none is trusted yet."""
    import_checkpoint(RECIPES[0].write(tmp_path / "hf"), tmp_path / "tiny.emoe")
    (tmp_path / "matrix.toml").write_text(MATRIX)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def devices(folder: Path) -> Iterator[dict[str, Device]]:
    with LoopbackFarm(folder / "loopback", [Emulated("fast", 1e9), Emulated("slow", 1e9)]) as inventory:
        declare(folder, inventory.devices)
        yield inventory.devices


@pytest.fixture
def trusted(devices: dict[str, Device]) -> dict[str, Device]:
    for name in devices:
        farm("trust", name, "--yes")
    return devices


def test_the_whole_way(folder: Path, trusted: dict[str, Device]) -> None:
    assert [d["name"] for d in json.loads(farm("devices", "--json").stdout)] == ["fast", "slow"]
    facts = json.loads(farm("probe", "--json").stdout)
    assert [(f["device"], f["error"]) for f in facts] == [("fast", None), ("slow", None)]
    assert facts[0]["facts"]["cores"] == os.cpu_count()
    assert "hostname" in farm("probe", "fast").stdout

    assert "8 runs of 4 cells: 4 on fast, 4 on slow" in farm("run", "matrix.toml", "--plan").stdout
    planned = json.loads(farm("run", "matrix.toml", "--plan", "--json").stdout)
    assert len(planned) == 8
    assert not (folder / "results").exists(), "a plan leaves nothing behind"

    events = [json.loads(line) for line in farm("run", "matrix.toml", "--json").stdout.splitlines()]
    summary = events[-1]
    assert (summary["event"], summary["ok"], summary["missing"], summary["exit_code"]) == ("summary", 8, 0, 0)

    ended = [event for event in events if event["event"] == "cell_ended"]
    assert all(event["estimated_tpot_s"] > 0 for event in ended)

    listed = json.loads(farm("results", "list", "--json").stdout)
    assert [(s["id"], s["ok"]) for s in listed] == [(summary["sweep"], 8)]
    assert summary["sweep"] in farm("results", "list").stdout
    shown = json.loads(farm("results", "show", "--json").stdout)
    assert {r["status"] for r in shown["runs"]} == {"ok"}
    (basis,) = {r["estimate"]["basis"] for r in shown["runs"]}
    assert basis.startswith("arithmetic timed on the device; emulated storage, 1000 MB/s; routing uniform: ")
    assert {tuple(r["emulated"]) for r in shown["runs"]} == {("storage limited to 1000 MB/s by the engine",)}
    assert farm("results", "show").stdout.count(" ok ") == 8

    lines = farm("results", "export").stdout.splitlines()
    assert {json.loads(line)["id"] for line in lines} == {r["id"] for r in shown["runs"]}
    for kind in ("csv", "parquet"):
        farm("results", "export", "latest", "--format", kind, "-o", f"runs.{kind}")
        assert (folder / f"runs.{kind}").stat().st_size > 1000

    assert farm("report", summary["sweep"][:12], "-o", "page.html").stdout == "report: page.html\n"
    page = (folder / "page.html").read_text()
    assert "slow" in page
    assert "Estimated" in page
    assert json.loads(farm("run", "--resume", "--plan", "--json").stdout) == []
    farm("run", "--resume")


def test_an_estimate_for_a_device_uploads_nothing_unasked(folder: Path, trusted: dict[str, Device]) -> None:
    arguments = ("estimate", "tiny.emoe", "--device", "fast", "--strategy", "naive-swap", "--prompt-tokens", "4")
    assert "upload it with --deploy" in refused(*arguments)
    assert not list((folder / "loopback").rglob("*.emoe"))
    found = json.loads(farm(*arguments, "--deploy", "--json").stdout)
    assert found["basis"]["storage"] == "1000 MB/s, emulated on fast"
    assert found["basis"]["arithmetic"].startswith("timed on fast")
    assert found["strategies"][0]["token_s"] > 0
    assert "said by hand" in farm(*arguments, "--storage-rate", "5").stdout


def test_nothing_talks_to_a_device_that_is_not_trusted(folder: Path, devices: dict[str, Device]) -> None:
    assert "2 of 2 devices cannot be used: fast, slow" in refused("probe", code=4)
    result = farm("run", "matrix.toml", code=4)
    assert "8 unreachable" in result.stdout
    assert "edgemoe-farm trust fast" in farm("results", "show", "--json").stdout
    assert not list((folder / "loopback").glob("*/edgemoe-farm"))
    # Once they are trusted, what was unreachable is measured.
    farm("trust", "fast", "--yes")
    farm("trust", "slow", "--yes")
    assert "8 ok" in farm("run", "--resume").stdout


def test_trust_asks_a_person(devices: dict[str, Device]) -> None:
    declined = farm("trust", "fast", typed="n\n", code=4)
    assert "SHA256:" in declined.stdout
    assert "was not accepted" in declined.stderr
    accepted = farm("trust", "fast", typed="y\n")
    assert "is trusted now" in accepted.stdout
    assert "was trusted before" in farm("trust", "fast").stdout


def test_a_dead_device_costs_only_its_own_cells(folder: Path, trusted: dict[str, Device]) -> None:
    gone = Device("slow", "127.0.0.1", port=1, user="x", identity_file=trusted["slow"].identity_file,
                  python="python3", emulated_read_bytes_per_s=1e9)  # fmt: skip
    declare(folder, {**trusted, "slow": gone})
    events = [json.loads(line) for line in farm("run", "matrix.toml", "--json", code=3).stdout.splitlines()]
    ended = [(e["cell"]["device"], e["status"]) for e in events if e["event"] == "cell_ended"]
    assert sorted(ended) == [("fast", "ok")] * 4 + [("slow", "unreachable")] * 4
    assert (events[-1]["exit_code"], events[-1]["unreachable"]) == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "give a matrix, as in `edgemoe-farm run matrix.toml`, or --resume"),
        (["run", "matrix.toml", "--resume", "x"], "not both"),
        (["run", "matrix.toml", "--retry-failed"], "goes with --resume"),
        (["run", "absent.toml"], "absent.toml: the matrix cannot be read: No such file"),
        (["run", "matrix.toml", "--inventory", "absent.toml"], "absent.toml"),
        (["run", "--resume"], "run a matrix first"),
        (["report", "latest"], "results/farm.db"),
        (["results", "list", "--results", "absent.db"], "absent.db"),
        (["probe", "phone"], "phone"),
        (["trust", "phone"], "phone"),
    ],
)
def test_a_users_mistake_is_one_line(
    folder: Path, devices: dict[str, Device], arguments: list[str], words: str
) -> None:
    assert words in refused(*arguments)


def test_debug_shows_where_an_error_came_from(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.toml"):
        farm("--debug", "devices", "--inventory", "absent.toml")


def test_a_container_that_changed_is_not_mixed_into_a_sweep(folder: Path, trusted: dict[str, Device]) -> None:
    farm("run", "matrix.toml")
    import_checkpoint(RECIPES[1].write(folder / "other"), folder / "tiny.emoe")
    assert "container tiny has changed since it was measured: start a new sweep" in refused("run", "--resume")


def test_a_device_that_left_the_inventory_is_missed(folder: Path, trusted: dict[str, Device]) -> None:
    farm("run", "matrix.toml")
    declare(folder, {"fast": trusted["fast"]})
    assert "slow/" in refused("run", "--resume")


def test_a_strategy_that_does_not_fit_is_refused_before_anything_runs(folder: Path, devices: dict[str, Device]) -> None:
    for strategy, words in (("naive-swap-int4", "--precision int4"), ("edgemoe-lowbit", "a second, lower precision")):
        matrix = MATRIX.replace('"full-load"', f'"{strategy}"')
        (folder / "matrix.toml").write_text(matrix.replace('"tiny.emoe"', '"tiny.emoe"\nprofile = "tiny.emoe"'))
        message = refused("run", "matrix.toml", "--plan")
        assert "tiny.emoe" in message
        assert words in message


def test_lossy_strategies_carry_the_loss_that_was_measured(tmp_path: Path) -> None:
    container, text = tmp_path / "c.emoe", tmp_path / "t.txt"
    precisions = [word for precision in ("fp16", "int8", "int2") for word in ("--precision", precision)]
    farm("model", "import", SHIPPED, "--to", container, *precisions)
    text.write_text(held_out_text(HELD_OUT[0])[:2000], encoding="utf-8")
    options = ("--loss-on", container, "--text", text, "--tokens", 300, "--context", 100)
    rows = {row["name"]: row for row in json.loads(farm("strategies", *options, "--json").stdout)}
    for name, row in rows.items():
        assert (row["measured_loss"] is None) == row["lossless"], name
    loss = {name: row["measured_loss"] for name, row in rows.items() if not row["lossless"]}
    assert abs(loss["full-load-int8"]["perplexity_rise"]) < 0.002 < loss["naive-swap-int2"]["perplexity_rise"]
    assert loss["naive-swap-int2"]["scored_tokens"] == 297
    assert loss["naive-swap-int4"]["perplexity"] is None
    assert "--precision int4" in loss["naive-swap-int4"]["unfit"]
    assert "profile" in loss["edgemoe-lowbit"]["unfit"]
    table = farm("strategies", *options)
    assert "does not fit" in table.stdout
    assert "--precision int4" in table.stderr
    assert "not measured" in farm("strategies").stdout
    assert "give both" in farm("strategies", "--text", text, code=2).stderr


def test_strategies_come_from_the_engine() -> None:
    rows = json.loads(farm("strategies", "--json").stdout)
    assert {"full-load", "naive-swap", "edgemoe"} <= {row["name"] for row in rows}
    assert "edgemoe" in farm("strategies").stdout


def test_version_and_help() -> None:
    assert farm("--version").stdout.startswith("edgemoe-farm")
    assert "Exit codes" in farm("--help").stdout
    assert "Exit codes" in farm("run", "--help").stdout


def test_the_engines_errors_have_the_farms_exit_codes() -> None:
    from engine.errors import ContainerError, MemoryBudgetError

    assert exit_code(ContainerError("x")) == 2
    assert exit_code(MemoryBudgetError("x")) == 1


# --- interruptions: the controller is a process of its own ------------------------------------------------------------

LONG = MATRIX.replace("max_new_tokens = 4", "max_new_tokens = 40").replace("blocks = 2", "blocks = 3")


@pytest.fixture
def long_matrix(folder: Path, trusted: dict[str, Device]) -> Path:
    """A cell of naive-swap takes about two seconds on the one device that is left."""
    size = (folder / "tiny.emoe").stat().st_size
    slow = {"slow": Device(**{**vars(trusted["slow"]), "emulated_read_bytes_per_s": max(1e3, 4.0 * size)})}
    declare(folder, slow)
    (folder / "matrix.toml").write_text(LONG)
    return folder


def start_and_wait_for_second_cell(folder: Path) -> subprocess.Popen[str]:
    """A controller with one record stored and a cell in flight."""
    arguments = [*COMMAND, "run", "matrix.toml", "--json"]
    controller = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert controller.stdout is not None
    started = 0
    for line in controller.stdout:
        event = json.loads(line)
        started += event["event"] == "cell_started"
        if started >= 2 and event == {"event": "device", "device": "slow", "state": "measuring"}:
            return controller
    raise AssertionError(f"the controller ended with {controller.wait()}")


def records(folder: Path) -> list[str]:
    with ResultsDatabase.open(folder / "results" / "farm.db", create=False) as database:
        return [run.id for run in database.runs()]


def engines(folder: Path) -> list[int]:
    """Processes of the engine that run on the devices of this test."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"engine" in words and (path / "cwd").readlink().is_relative_to(folder):
                found.append(int(path.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_stops_the_device_and_is_resumed(long_matrix: Path, number: signal.Signals) -> None:
    controller = start_and_wait_for_second_cell(long_matrix)
    for _ in range(300):
        if engines(long_matrix):
            break
        time.sleep(0.05)
    else:
        pytest.fail("no engine was started")
    assert "is being measured by" in refused("run", "--resume"), "two controllers at one sweep"
    controller.send_signal(number)
    output, _ = controller.communicate(timeout=60)
    assert controller.returncode == 130
    summary = json.loads(output.splitlines()[-1])
    assert summary["exit_code"] == 130
    assert summary["missing"] == 6 - len(records(long_matrix)) > 0
    assert engines(long_matrix) == []
    resume_and_check(long_matrix)


def test_a_killed_controller_loses_the_cell_in_flight_at_most(long_matrix: Path) -> None:
    controller = start_and_wait_for_second_cell(long_matrix)
    controller.kill()
    controller.communicate(timeout=60)
    assert len(records(long_matrix)) >= 1
    resume_and_check(long_matrix)


def resume_and_check(folder: Path) -> None:
    before = records(folder)
    assert "6 ok" in farm("run", "--resume").stdout
    after = records(folder)
    assert after[: len(before)] == before, "what was measured is not measured again"
    assert len(set(after)) == len(after) == 6


def test_nothing_of_a_loopback_device_outlives_it(tmp_path: Path) -> None:
    environment = {**os.environ, "EDGEMOE_FARM_LOOPBACK": "mark-of-this-test"}
    with subprocess.Popen(["sleep", "600"], env=environment, start_new_session=True) as process:
        try:
            kill_marked("mark-of-this-tes")
            assert process.poll() is None
            kill_marked("mark-of-this-test")
            assert process.wait(timeout=30) == -signal.SIGKILL
        finally:
            process.kill()
