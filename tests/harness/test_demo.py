"""The demonstration, as `ci/demo` runs it but with one block: the shipped model, two SSH devices, a report."""

from __future__ import annotations

import subprocess
from pathlib import Path

from harness.scripted import WHAT_HAPPENS, FaultKind
from harness.sweep.plan import SCRIPTED
from reports.records import RunStatus, Verdict
from reports.results.database import ResultsDatabase
from tests.command_line import COMMAND


def test_the_demonstration_ends_with_a_report_and_leaves_nothing_running(tmp_path: Path) -> None:
    arguments = [*COMMAND, "demo", "--quick", "--output", "out"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    page = tmp_path / "out" / "report.html"
    assert done.stdout.splitlines()[-1] == f"report: {page}"
    html = page.read_text(encoding="utf-8")
    for words in ("pi4b-emulated", "jetson-tx2-emulated", "edgemoe", "storage limited to 43 MB/s by the engine"):
        assert words in html

    with ResultsDatabase.open(tmp_path / "out" / "results.db", create=False) as database:
        runs = database.runs()
    assert len(runs) == 6
    assert {run.status for run in runs} == {RunStatus.OK}
    assert {run.verdict for run in runs} <= {Verdict.VALID, Verdict.SUSPECT}
    assert all(run.emulated for run in runs)
    for device in ("pi4b-emulated", "jetson-tx2-emulated"):
        tokens = {run.samples[0].tokens for run in runs if run.cell.device == device}
        assert len(tokens) == 1, "every strategy gives the same answer"

    assert not (tmp_path / "out" / "work").exists()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            folder = (process / "cwd").readlink()
        except OSError:
            continue
        assert not folder.is_relative_to(tmp_path), f"process {process.name} still runs in {folder}"


def test_the_demonstration_of_faults_ends_every_cell_and_says_that_it_is_made_up(tmp_path: Path) -> None:
    arguments = [*COMMAND, "demo", "--faults", "--output", "out"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    *table, ended, last = done.stdout.splitlines()
    assert last == f"report: {tmp_path / 'out' / 'report.html'}"
    assert ended.startswith("60 of 60 cells ended")
    rows = {line.split()[0]: line for line in table if not line.startswith(" ")}
    for fault in FaultKind:
        assert WHAT_HAPPENS[fault] in rows[fault.value]
    for fault, cost in {
        "drop": "nothing",
        "reboot": "one more attempt: unreachable",
        "stall": "its cell: timed out",
    }.items():
        assert cost in rows[fault]
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert html.count(SCRIPTED) > len(rows)
    assert html.count("<script>") == 1  # the page's own
    with ResultsDatabase.open(tmp_path / "out" / "results.db", create=False) as database:
        runs = database.runs()
    assert {run.emulated for run in runs} == {(SCRIPTED,)}
    for device in ("drop", "healthy", "throttle", "slow-disk"):
        assert {run.status for run in runs if run.cell.device == device} == {RunStatus.OK}
    assert not (tmp_path / "out" / "work").exists()


def test_a_folder_that_no_demonstration_made_is_left_alone(tmp_path: Path) -> None:
    thesis = tmp_path / "out" / "work" / "thesis"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    done = subprocess.run(
        [*COMMAND, "demo", "--faults", "--output", "out"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "out/work is not empty, and no demonstration made it: choose another --output" in done.stderr
    assert thesis.exists()
