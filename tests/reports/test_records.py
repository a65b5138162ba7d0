import json
from dataclasses import replace

import pytest

from engine.protocol import Course
from reports.errors import RecordError, ReportError
from reports.records import (
    Conditions,
    RunStatus,
    Verdict,
    attempt,
    last_attempts,
    run_from_json,
    run_id,
    run_to_json,
    sweep_from_json,
    sweep_to_json,
)


def through_json(record):
    return json.loads(json.dumps(record, allow_nan=False))


def test_a_run_survives_json_whole(make) -> None:
    for run in (make.run(), make.failed(log_tail="half a pair: \ud800, a nul: \0")):
        assert run_from_json(through_json(run_to_json(run))) == run


def test_conditions_survive_json_under_the_names_that_others_rely_on(make) -> None:
    conditions = Conditions(
        temperature_c=Course(41.0, 55.5, 41.0, 56.0), throttled=False, governor="ondemand",
        page_cache_resident_fraction=0.004, memory_limit_bytes=1 << 29, memory_limit_method="cgroup-v2",
    )  # fmt: skip
    run = replace(make.run(), conditions=conditions)
    record = through_json(run_to_json(run))
    assert run_from_json(record) == run
    told = record["conditions"]
    assert (told["temperature_c"]["before"], told["temperature_c"]["after"]) == (41.0, 55.5)
    assert (told["throttled"], told["governor"], told["page_cache_resident_fraction"]) == (False, "ondemand", 0.004)
    assert (told["memory_limit_bytes"], told["memory_limit_method"]) == (1 << 29, "cgroup-v2")


def test_a_record_from_before_there_were_conditions_is_read(make) -> None:
    record = through_json(run_to_json(make.run()))
    del record["conditions"]
    for name in ("core_kinds", "board", "storage", "now"):
        del record["facts"][name]
    assert run_from_json(record) == make.run()


def test_a_record_from_before_a_field_was_removed_is_read(make) -> None:
    record = through_json(run_to_json(make.run()))
    assert "extra" not in record
    assert run_from_json(record | {"extra": {}}) == make.run()
    with pytest.raises(RecordError, match="unknown key 'extra'"):
        sweep_from_json(through_json(sweep_to_json(make.sweep(make.runs()))) | {"extra": {}})


def test_a_record_is_a_flat_object_with_plain_values(make) -> None:
    record = run_to_json(make.run())
    assert record["v"] == 1
    assert {"request", "facts", "samples", "status", "verdict"} <= record.keys()
    assert type(record["status"]) is str


def test_a_sweep_survives_json_whole(make) -> None:
    sweep = make.sweep(make.runs())
    assert sweep_from_json(through_json(sweep_to_json(sweep))) == sweep


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": 2}, "record version 2"),
        ({"v": None}, "record version None"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"status": "excellent"}, "Run.status: expected RunStatus"),
        ({"status": ["ok"]}, "Run.status: expected RunStatus"),
        ({"block": "0"}, "Run.block: expected int"),
        ({"cell": None}, "Run.cell: expected an object"),
        ({"id": ""}, "id and sweep_id must not be empty"),
    ],
)
def test_a_damaged_record_is_refused_by_name(make, change, message) -> None:
    with pytest.raises(RecordError, match=message) as refused:
        run_from_json(through_json(run_to_json(make.run()) | change))
    assert isinstance(refused.value, ReportError)


def test_a_missing_key_is_refused(make) -> None:
    record = through_json(run_to_json(make.run()))
    del record["cell"]["device"]
    with pytest.raises(RecordError, match=r"Run\.cell: 'device' is missing"):
        run_from_json(record)


def test_a_plan_entry_must_be_a_pair(make) -> None:
    record = through_json(sweep_to_json(make.sweep(make.runs())))
    record["planned"][0].append(3)
    with pytest.raises(RecordError, match="expected 2 entries, got 3"):
        sweep_from_json(record)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": -1}, "block is negative"),
        ({"started_at": "yesterday"}, "not a UTC time"),
        ({"started_at": "2026-11-23T22:15:00"}, "not a UTC time"),
        ({"totals": None}, "totals is missing"),
        ({"samples": ()}, "no timed sample"),
        ({"status": RunStatus.FAILED}, "is never valid"),
        ({"verdict": Verdict.SUSPECT}, "needs a reason"),
    ],
)
def test_a_run_that_contradicts_itself_is_not_constructed(make, changes, message) -> None:
    with pytest.raises(RecordError, match=message):
        make.run(**changes)


def test_samples_must_answer_what_was_asked_for_and_once(make) -> None:
    run = make.run()
    with pytest.raises(RecordError, match="not asked for"):
        replace(run, samples=(*run.samples, replace(run.samples[-1], prompt=2)))
    with pytest.raises(RecordError, match="recorded twice"):
        replace(run, samples=(*run.samples, run.samples[-1]))


@pytest.mark.parametrize("name", ["", "a/b", "a\nb", "\x1b[31m"])
def test_the_parts_of_a_key_cannot_blur(make, name) -> None:
    with pytest.raises(RecordError, match="device"):
        make.cell(device=name)


def test_the_last_attempt_counts(make) -> None:
    first = make.failed(RunStatus.UNREACHABLE, "no answer", started_at="2026-11-23T20:00:00+00:00")
    again = replace(make.run(), id="again")
    assert last_attempts([again, first]) == [again]


def test_the_last_attempt_counts_whatever_the_clock_says(make) -> None:
    """The controller's clock was set back between two attempts."""
    run = make.run()
    first, second = (
        replace(run, id=run_id(run.sweep_id, run.cell.key, run.block, n), started_at=f"2026-11-{day}T20:00:00+00:00")
        for n, day in ((0, 23), (1, 20))
    )
    assert last_attempts([second, first]) == last_attempts([first, second]) == [second]
    assert [attempt(r.id, r.sweep_id, r.cell.key, r.block) for r in (first, second, run)] == [0, 1, -1]
