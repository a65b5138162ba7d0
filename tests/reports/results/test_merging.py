"""Two databases, an export or a bundle become one database; what contradicts is named and changes nothing."""

import json
from dataclasses import replace
from io import BytesIO

import pytest
import sqlalchemy as sa

from reports.errors import RecordError, ReportError
from reports.records import run_to_json, sweep_to_json
from reports.results import schema
from reports.results.baselines import Acknowledgement, Baseline, NightRecord
from reports.results.database import ResultsDatabase
from reports.results.export import export
from reports.results.merging import entries_of, is_stand_in, json_lines, merge

AT, LATER = "2026-11-24T02:00:00+00:00", "2026-12-24T02:00:00+00:00"


@pytest.fixture
def runs(make):
    return [make.run(block=block, tokens=4, prompts=1) for block in range(3)]


@pytest.fixture
def source(runs, make, tmp_path):
    sweep = make.sweep(runs)
    with ResultsDatabase.open(tmp_path / "source.db") as database:
        database.add_sweep(sweep)
        for run in runs:
            database.add_run(run)
        database.add_night(NightRecord(sweep.id, "demo", None, AT, 0, "{}"))
        database.pin(Baseline("release", sweep.id, AT, "me@lab"))
        database.acknowledge(Acknowledgement("pi5", "edgemoe", "tpot_s", "", "a new fan", "me@lab", AT, LATER))
        yield database


@pytest.fixture
def target(place):
    with ResultsDatabase.open(place) as database:
        yield database


def test_everything_comes_over_once(source, target, runs) -> None:
    merged = merge(target, entries_of(source))
    assert (merged.sweeps, merged.runs, merged.nights, merged.known, merged.conflicts) == (1, 3, 1, 0, [])
    assert list(entries_of(target)) == list(entries_of(source))
    again = merge(target, entries_of(source))
    assert (again.sweeps, again.runs, again.nights, again.known, again.conflicts) == (0, 0, 0, 6, [])
    assert list(entries_of(target)) == list(entries_of(source))


def test_conflicts_are_named_and_what_is_here_stays(source, target, runs, make) -> None:
    sweep, other = make.sweep(runs), make.sweep(runs, id="another")
    target.add_sweep(sweep)
    target.add_sweep(other)
    target.add_run(replace(runs[1], farm_version="9"))
    target.add_night(NightRecord(sweep.id, "demo", None, AT, 1, "{}"))
    target.pin(Baseline("release", other.id, AT, "you@lab"))
    merged = merge(target, entries_of(source))
    assert merged.conflicts == [
        f"run {runs[1].id} of sweep {sweep.id} is another one here",
        f"the night of sweep {sweep.id} was judged otherwise here",
        f"baseline release is sweep another here, {sweep.id} there",
    ]
    assert [run.farm_version for run in target.runs()] == ["0.1.0", "9", "0.1.0"]
    assert target.baseline("release").sweep_id == "another"
    assert target.night(sweep.id).exit_code == 1


def test_nothing_is_mixed_with_another_sweep_of_the_same_id(source, target, runs, make) -> None:
    target.add_sweep(make.sweep(runs, name="other"))
    merged = merge(target, entries_of(source))
    assert merged.conflicts[0] == f"sweep {runs[0].sweep_id} is another one here: it and its runs are left out"
    assert target.runs() == []


def test_a_record_of_an_earlier_farm_is_the_same_record(target, runs, make) -> None:
    """It lacks what was added since."""
    target.add_sweep(make.sweep(runs))
    target.add_run(runs[0])
    early = {key: value for key, value in run_to_json(runs[0]).items() if key != "lease_token"}
    target._write(lambda connection: connection.execute(sa.update(schema.runs).values(record=json.dumps(early))))
    merged = merge(target, [make.sweep(runs), *runs])
    assert (merged.runs, merged.conflicts) == (2, [])


def test_an_export_comes_back_with_its_sweeps(source, target, runs, make, tmp_path) -> None:
    file = tmp_path / "runs.jsonl"
    export(source.stream(), "jsonl", file, sweeps=source.sweeps())
    assert len(file.read_bytes().splitlines()) == 4
    assert merge(target, json_lines(file)).runs == 3
    assert (target.runs(), target.sweeps()) == (runs, [make.sweep(runs)])


def test_runs_alone_get_a_stand_in_until_their_sweep_comes(source, target, runs, make, tmp_path) -> None:
    for i, part in enumerate((runs[:2], runs[1:])):
        export(part, "jsonl", tmp_path / f"{i}.jsonl")
        assert merge(target, json_lines(tmp_path / f"{i}.jsonl")).conflicts == []
    (sweep,) = target.sweeps()
    assert is_stand_in(sweep)
    assert sweep.planned == make.sweep(runs).planned
    assert target.runs() == runs
    assert merge(target, entries_of(source)).conflicts == []
    assert target.sweeps() == [make.sweep(runs)]
    assert merge(target, json_lines(tmp_path / "0.jsonl")).conflicts == []
    assert target.sweeps() == [make.sweep(runs)], "a stand-in takes nobody's place"


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"v": 1}', b'{"v": 7, "id": "x"}', b'{"planned": []}', b"\xff"])
def test_a_line_that_is_no_record_is_named(line, target, runs, tmp_path) -> None:
    stream = BytesIO()
    export(runs[:1], "jsonl", stream)
    (tmp_path / "runs.jsonl").write_bytes(stream.getvalue() + line + b"\n")
    with pytest.raises(RecordError, match=r"runs\.jsonl, line 2: .*nothing but what `results export"):
        merge(target, json_lines(tmp_path / "runs.jsonl"))
    assert target.sweeps() == []


def test_a_file_that_cannot_be_read_is_named(target, tmp_path) -> None:
    with pytest.raises(ReportError, match=r"cannot read .*none\.jsonl: No such file"):
        merge(target, json_lines(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "two\nlines", "x" * 201])
def test_text_that_no_database_could_search_is_refused(name, target, runs, make, tmp_path) -> None:
    record = sweep_to_json(make.sweep(runs, name=name))
    (tmp_path / "sweep.jsonl").write_text(json.dumps(record))
    with pytest.raises(RecordError, match=r"^sweep .*: name is not printable text of up to 200"):
        merge(target, json_lines(tmp_path / "sweep.jsonl"))
