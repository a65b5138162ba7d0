from dataclasses import replace

import pytest

from reports.errors import SelectionError, UnknownSweepError
from reports.judging.selection import select
from reports.records import RunStatus, Verdict
from reports.results.database import ResultsDatabase

OLD, NEW = "a1" * 32, "b2" * 32  # engines
SWEEPS = (("20261121-220000-aaaa", "nightly", OLD), ("20261122-220000-bbbb", "nightly", NEW),
          ("20261123-120000-cccc", "other", NEW), ("20261123-220000-dddd", "nightly", NEW))  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    from tests.reports.conftest import runs, sweep

    with ResultsDatabase.open(tmp_path_factory.mktemp("results") / "farm.db") as database:
        for i, (sweep_id, name, engine) in enumerate(SWEEPS):
            mine = [
                replace(run, id=f"{sweep_id}-{run.id}", sweep_id=sweep_id, engine_sha256=engine)
                for run in runs(blocks=2, tokens=2)
            ]
            at = f"2026-11-2{i}T22:00:00+00:00"
            database.add_sweep(sweep(mine, id=sweep_id, name=name, started_at=at))
            for run in mine:
                database.add_run(run)
        yield database


def sides(database, a, b):
    chosen = select(database, a, b)
    return chosen.baseline.name, chosen.candidate.name, set(chosen.across)


@pytest.mark.parametrize(
    ("text", "sweep"),
    [
        ("latest", "20261123-220000-dddd"),
        ("latest~0", "20261123-220000-dddd"),
        ("latest~1", "20261122-220000-bbbb"),  # of the same matrix
        ("latest~2", "20261121-220000-aaaa"),
        ("nightly", "20261123-220000-dddd"),
        ("nightly~2", "20261121-220000-aaaa"),
        ("other", "20261123-120000-cccc"),
        ("20261122", "20261122-220000-bbbb"),
        ("20261123-12", "20261123-120000-cccc"),
        ("20261123-220000-dddd~1", "20261122-220000-bbbb"),
    ],
)
def test_a_sweep_has_many_names(database, text, sweep) -> None:
    chosen = select(database, text, "latest")
    assert chosen.baseline.name == sweep
    assert (chosen.between[0].id, len(chosen.baseline.runs)) == (sweep, 12)
    assert chosen.across == frozenset()


def test_parts_of_a_sweep(database) -> None:
    chosen = select(database, "device:pi4b-emulated,strategy:edgemoe@latest~1", "latest")
    assert chosen.baseline.name == "device:pi4b-emulated,strategy:edgemoe@20261122-220000-bbbb"
    for side in (chosen.baseline, chosen.candidate):  # what one side names holds for both
        assert {(run.cell.device, run.cell.strategy) for run in side.runs} == {("pi4b-emulated", "edgemoe")}
    assert {run.sweep_id for run in chosen.candidate.runs} == {"20261123-220000-dddd"}
    assert chosen.across == frozenset()
    budget = select(database, "budget:10-experts,cache:cold,workload:dialogue,container:tiny-mixtral-int4", "latest")
    assert {run.cell.strategy for run in budget.candidate.runs} == {"edgemoe"}


def test_devices_and_strategies_are_compared_where_both_sides_name_one(database) -> None:
    pi, jetson = "device:pi4b-emulated", "device:jetson-tx2-emulated"
    assert sides(database, pi, jetson)[2] == {"device"}
    assert sides(database, pi, f"{pi}@latest~1")[2] == set()
    assert sides(database, "strategy:naive-swap", "strategy:edgemoe")[2] == {"strategy"}
    chosen = select(database, f"{pi},strategy:full-load@nightly~1", f"{jetson},strategy:edgemoe@other")
    assert chosen.across == {"device", "strategy"}
    assert {run.sweep_id for run in chosen.candidate.runs} == {"20261123-120000-cccc"}


def test_engines_are_those_of_their_newest_sweep(database) -> None:
    assert sides(database, "engine:a1", "engine:b2b2") == (
        "engine:a1a1a1a1a1a1a1a1@20261121-220000-aaaa",
        "engine:b2b2b2b2b2b2b2b2@20261123-220000-dddd",
        set(),
    )
    older = select(database, "engine:b2@latest~1", "engine:b2,device:pi4b-emulated")
    assert older.between[0].id == "20261122-220000-bbbb"
    assert {run.cell.device for run in older.baseline.runs} == {"pi4b-emulated"}


def test_commits_are_those_of_their_newest_sweep(tmp_path, make) -> None:
    runs = make.runs(blocks=1)
    with ResultsDatabase.open(tmp_path / "own.db") as own:
        for i, commit in enumerate(("3f2a91c04b7e", "3f2a91c04b7e.dirty", "3f2b00000000")):
            started = f"2026-11-25T0{i}:00:00+00:00"
            own.add_sweep(make.sweep(runs, id=f"s{i}", started_at=started, farm_version=f"0.1.0+g{commit}"))
            for run in runs:
                own.add_run(replace(run, id=f"s{i}-{run.id}", sweep_id=f"s{i}", started_at=started))
        assert sides(own, "commit:3f2a,strategy:edgemoe", "commit:3f2b") == ("strategy:edgemoe@s1", "s2", set())
        with pytest.raises(SelectionError, match="commit:3f2 begins more than one, 3f2b00000000 and 3f2a91c04b7e"):
            select(own, "commit:3f2", "latest")


def test_one_run_is_a_side_and_the_other_is_its_cell(database) -> None:
    run = database.runs(sweep_id="20261122-220000-bbbb", strategy="edgemoe")[0]
    chosen = select(database, run.id, "latest")
    assert chosen.baseline.runs == (run,)
    assert {other.cell for other in chosen.candidate.runs} == {run.cell}
    other = database.runs(sweep_id="20261122-220000-bbbb", strategy="full-load")[0]
    assert sides(database, run.id, other.id) == (run.id, other.id, {"strategy"})


def test_of_a_cell_that_was_tried_again_the_last_attempt_counts(database, make) -> None:
    lost = replace(
        database.runs(sweep_id="20261123-120000-cccc")[0], id="lost", status=RunStatus.UNREACHABLE,
        verdict=Verdict.INVALID, reasons=("gone",), started_at="2026-11-23T01:00:00+00:00",
    )  # fmt: skip
    database.add_run(lost)
    assert "lost" not in {run.id for run in select(database, "other", "other").baseline.runs}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("nothing", "no sweep 'nothing'"),
        ("", "no sweep ''"),
        ("~1", "no sweep ''"),
        ("2026112", "begins more than one sweep"),
        ("latest~3", "matrix nightly has 2 sweeps before 20261123-220000-dddd: go less far back"),
        ("latest~99999999999999999999", "matrix nightly has 2 sweeps before"),
        ("latest~x", "~x does not say how far back: write latest~1"),
        ("device:pi9", "no run there with device pi9: see `results show 20261123-220000-dddd`"),
        ("device:", "is no part: write PART:NAME"),
        ("device:a,budgets:b", "'budgets:b' is no part: write PART:NAME, where PART is one of device, strategy"),
        ("device:a,device:b", "names two of device: compare them as two sides"),
        ("device:pi4b-emulated@nothing", "no sweep 'nothing'"),
        ("engine:ff", "engine:ff: nothing was measured by such an engine"),
        ("engine:%", "engine:%: nothing was measured by such an engine"),
        ("commit:3f2a", "commit:3f2a: nothing was measured by such a commit"),
        ("commit:%", "commit:%: nothing was measured by such a commit"),
        ("commit:3f2a@latest", "a commit has its newest sweep: name no other sweep or engine beside it"),
        ("engine:a1@latest", "no run there with engine_sha256 a1a1"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(database, text, error) -> None:
    with pytest.raises((SelectionError, UnknownSweepError)) as found:
        select(database, text, "latest")
    assert error in str(found.value)
    assert "\n" not in str(found.value)


def test_an_ambiguous_engine_is_refused(database, monkeypatch) -> None:
    monkeypatch.setattr(ResultsDatabase, "engines", lambda *_: [("a" * 64, "x"), ("ab" * 32, "y")])
    with pytest.raises(SelectionError, match="engine:a begins more than one, aaaaaaaaaaaaaaaa and abab"):
        select(database, "engine:a", "latest")


@pytest.mark.parametrize("part", ["device", "strategy", "container", "workload"])
def test_the_name_of_a_part_is_told_from_that_of_a_sweep(database, make, part) -> None:
    run = make.run()
    name = getattr(run.cell, part)
    planned = make.sweep([run], id="20261125-000000-ffff", started_at="2026-11-25T00:00:00+00:00")
    database.add_sweep(planned)
    with pytest.raises(UnknownSweepError, match=rf"no sweep '{name}'.*; a {part} has that name: write {part}:{name}"):
        select(database, name, "latest")
