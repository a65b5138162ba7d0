"""results migrate, prune, import, bundle and export, as a user types them."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from harness.cli import results_keeping
from harness.sweep.presence import myself
from reports.nights.night import Night
from reports.results.baselines import Baseline, NightRecord
from reports.results.database import ResultsDatabase
from reports.results.schema import REVISION
from tests.harness.cli.test_farm import farm, refused
from tests.reports.conftest import run, sweep

OLD = Path(__file__).parents[2] / "reports" / "results" / "before_controllers.sql"
SWEEPS = [("20241101-020000-aa00", "2024-11-01"), ("20261101-020000-bb00", "2026-11-01")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of one sweep years ago and a later one, each with two runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    with ResultsDatabase.open("results/farm.db") as database:
        for i, (sweep_id, day) in enumerate(SWEEPS):
            at = f"{day}T02:00:00+00:00"
            runs = [replace(run(block=b, seed=i, tokens=4), sweep_id=sweep_id, started_at=at) for b in (0, 1)]
            database.add_sweep(sweep(runs, id=sweep_id, started_at=at))
            for each in runs:
                database.add_run(each)
    return tmp_path


def ids(place: str = "results/farm.db") -> list[str]:
    return [each["id"] for each in json.loads(farm("results", "list", "--results", place, "--json").stdout)]


def test_a_bundle_goes_to_another_machine_and_renders_the_same_page(folder: Path) -> None:
    out = farm("results", "bundle", "2024", "-o", "night.bundle").stdout
    told = json.loads(farm("results", "bundle", "--verify", "night.bundle", "--json").stdout)
    assert f"night.bundle: whole, sha256 {told['sha256']}" in out
    assert told["sweeps"] == ["20241101-020000-aa00"]
    assert told["runs"] == 2
    farm("report", "2024", "-o", "here.html")
    farm("report", "night.bundle", "-o", "there.html")
    farm("results", "import", "night.bundle", "--results", "other.db")
    farm("report", "latest", "-o", "imported.html", "--results", "other.db")
    assert (folder / "here.html").read_bytes() == (folder / "there.html").read_bytes()
    assert (folder / "here.html").read_bytes() == (folder / "imported.html").read_bytes()
    (folder / "notes.txt").write_text("no bundle")
    assert "report: notes.txt is no bundle, and no sweep 'notes.txt'" in refused("report", "notes.txt")
    (folder / "night.bundle").write_bytes((folder / "night.bundle").read_bytes()[:-20])
    for command in (("results", "bundle", "--verify"), ("results", "import"), ("report",)):
        assert "night.bundle is damaged" in refused(*command, "night.bundle")
    assert "give RUN... and -o FILE" in refused("results", "bundle", "latest")


def test_a_report_is_of_the_kind_that_was_asked_for(folder: Path) -> None:
    def kind_of(*arguments: str) -> str:
        farm("report", *arguments, "-o", "page.html")
        return (folder / "page.html").read_text().split('"overline">EdgeMoE Farm: ')[1].split("<")[0]

    assert kind_of() == kind_of("latest", "--kind", "strategies") == "strategies"
    assert kind_of("2024", "2026", "--kind", "devices") == "devices"
    assert "sweep 20261101-020000-bb00 was not judged as a night" in refused("report", "2026", "--kind", "nightly")
    with ResultsDatabase.open("results/farm.db") as database:
        night = Night(SWEEPS[1][0], "demo", "2026-11-01T06:00:00+00:00", 0)
        database.add_night(NightRecord(night.sweep_id, "demo", None, night.at, 0, night.to_json()))
    assert kind_of("latest") == kind_of("--kind", "nightly") == "nightly"
    farm("results", "bundle", "latest", "-o", "night.bundle")
    assert kind_of("night.bundle") == "nightly"
    assert "night.bundle is a bundle, which has a page of its own" in refused("report", "latest", "night.bundle")
    assert "'fast' is not one of" in farm("report", "--kind", "fast", code=2).stderr


@pytest.mark.parametrize("given", [(), ("--with-sweeps",)])
def test_an_export_is_imported(given: tuple[str, ...], folder: Path) -> None:
    farm("results", "export", *given, "-o", "all.jsonl")
    assert "4 runs and 0 nights are new" in farm("results", "import", "all.jsonl", "--results", "new.db").stdout
    assert "4 runs and 0" not in farm("results", "import", "all.jsonl", "--results", "new.db").stdout
    assert ids("new.db") == ids()


def test_a_conflict_is_named_and_the_exit_code_says_so(folder: Path) -> None:
    farm("results", "import", "results/farm.db", "--results", "copy.db")
    with ResultsDatabase.open("copy.db") as database:
        database.pin(Baseline("release", SWEEPS[0][0], "2026-11-24T02:00:00+00:00", "me@lab"))
    with ResultsDatabase.open("results/farm.db") as database:
        database.pin(Baseline("release", SWEEPS[1][0], "2026-11-24T02:00:00+00:00", "me@lab"))
    told = farm("results", "import", "copy.db", code=3)
    assert "conflict: baseline release" in told.stderr
    merged = json.loads(farm("results", "import", "copy.db", "--json", code=3).stdout)
    assert (merged["runs"], merged["known"], len(merged["conflicts"])) == (0, 6, 1)
    assert "no file none.db" in refused("results", "import", "none.db", "--results", "new.db")
    assert not (folder / "new.db").exists()


def test_an_empty_file_is_no_import(folder: Path) -> None:
    (folder / "cut.bundle").touch()
    assert "cut.bundle is empty: get it again" in refused("results", "import", "cut.bundle", "--results", "new.db")
    assert not (folder / "new.db").exists()


def test_export_takes_what_is_asked_for(folder: Path) -> None:
    lines = farm("results", "export", "--since", "2026-01-01", "--device", "pi4b-emulated", "--status", "ok").stdout
    assert {json.loads(line)["sweep_id"] for line in lines.splitlines()} == {SWEEPS[1][0]}
    assert farm("results", "export", "--strategy", "none").stdout == ""
    assert "neither a day nor an age" in farm("results", "export", "--since", "yesterday", code=2).stderr
    assert "--with-sweeps is for" in refused("results", "export", "--with-sweeps", "--format", "csv")


def test_prune_shows_asks_and_removes(folder: Path) -> None:
    assert "20241101-020000-aa00" in farm("results", "prune", "--older-than", "2025-01-01", "--dry-run").stdout
    told = json.loads(farm("results", "prune", "--older-than", "2025-01-01", "--dry-run", "--json").stdout)
    assert (told["removed"], told["runs"], told["dry_run"]) == ([SWEEPS[0][0]], 2, True)
    assert "say so with --yes" in refused("results", "prune", "--older-than", "2025-01-01")
    assert len(ids()) == 2
    assert "removed 1 sweeps" in farm("results", "prune", "--older-than", "2025-01-01", "--yes").stdout
    assert ids() == [SWEEPS[1][0]]
    told = json.loads(farm("results", "prune", "--older-than", "2027-01-01", "--yes", "--json").stdout)
    assert (told["removed"], told["kept"][0]["id"]) == ([], SWEEPS[1][0])
    assert ids() == [SWEEPS[1][0]]


@pytest.mark.parametrize("ends", [True, False], ids=["and ended", "and is at it"])
def test_prune_keeps_a_sweep_that_was_resumed_while_it_asked(
    ends: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resumed_meanwhile(*_: object) -> None:
        with ResultsDatabase.open("results/farm.db") as database:
            controller = myself(SWEEPS[0][0])
            assert database.enter(controller)
            again = replace(run(block=2, seed=9, tokens=4), id="again", sweep_id=SWEEPS[0][0])
            database.add_run(again)
            if ends:
                database.leave(controller)

    monkeypatch.setattr(results_keeping, "_confirm", resumed_meanwhile)
    out = farm("results", "prune", "--older-than", "2025-01-01").stdout
    assert f"kept  {SWEEPS[0][0]}  " in out
    assert "was resumed meanwhile" in out
    assert "removed 0 sweeps" in out
    with ResultsDatabase.open("results/farm.db") as database:
        assert len(database.runs(sweep_id=SWEEPS[0][0])) == 3


def test_a_sweep_that_was_imported_is_resumed_only_where_it_was_measured(folder: Path) -> None:
    (folder / "inventory.toml").write_text('version = 1\n[devices.pi]\nhost = "127.0.0.1"\n')
    farm("results", "import", "results/farm.db", "--results", "other.db")
    told = refused("run", "--resume", "2024", "--inventory", "inventory.toml", "--results", "other.db")
    assert "sweep 20241101-020000-aa00 was imported: only where it was measured can it be resumed" in told
    told = refused("run", "--resume", "--inventory", "inventory.toml", "--results", "other.db")
    assert "no sweep yet: run a matrix first" in told
    assert "was imported" not in farm("run", "--resume", "2024", "--inventory", "inventory.toml", code=2).stderr


def test_migrate_says_what_it_did(folder: Path) -> None:
    with closing(sqlite3.connect("old.db")) as connection:
        connection.executescript(OLD.read_text())
    assert "as it was before: old.db.revision-1.bak" in farm("results", "migrate", "--results", "old.db").stdout
    assert "the newest" in farm("results", "migrate", "--results", "old.db").stdout
    told = json.loads(farm("results", "migrate", "--results", "old.db", "--json").stdout)
    assert told == {"database": "old.db", "before": REVISION, "after": REVISION, "backup": None}
    assert ids("old.db") == ["20261123-221500-3f2a"]
