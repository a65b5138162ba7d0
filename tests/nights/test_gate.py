"""What a night finds, on a farm whose noise was recorded."""

from dataclasses import replace

import pytest

from reports.nights.night import Kind
from reports.nights.outcome import without_baseline
from reports.nights.trends import trends
from reports.records import Fault, RunStatus, Verdict
from reports.results.baselines import Acknowledgement
from tests.programs.nights.simulated import CHANGED, NEW, OLD, Change, SimulatedFarm, recorded

PI, JETSON = "pi4b-emulated", "jetson-tx2-emulated"
TARGET = (PI, "edgemoe")


@pytest.fixture(scope="module")
def noise():
    return recorded()


@pytest.fixture
def farm(noise, tmp_path):
    return SimulatedFarm(1, noise, tmp_path)


def found(night, kind=Kind.REGRESSION):
    return {(f.cell.device, f.cell.strategy, f.metric) for f in night.findings if f.kind is kind and f.cell}


def test_nights_without_a_change_raise_no_alarm(noise, tmp_path):
    for seed in range(3):
        farm = SimulatedFarm(seed, noise, tmp_path)
        assert not any(found(farm.night()) for _ in range(10))


def test_a_tenth_slower_is_found_the_first_night_on_the_right_device_and_strategy(farm):
    night = farm.night({TARGET: Change(slower=1.10)})
    assert night.exit_code == 1
    assert {where[:2] for where in found(night)} == {TARGET}
    (confirmed,) = (c for c in night.confirmations if c.confirmed and c.metric == "tpot_s")
    assert confirmed.ratio == pytest.approx(1.10, abs=0.02)
    assert farm.database.sweep(confirmed.sweep_id).name == "simulated (confirmation)"


def test_a_throttled_device_is_suspect_and_never_a_regression(farm):
    throttled = {(PI, s): Change(slower=2.0, throttled=True) for s in ("edgemoe", "full-load", "naive-swap")}
    night = farm.night(throttled)
    assert night.exit_code == 5
    assert found(night) == set()
    assert {device for device, *_ in found(night, Kind.INCONCLUSIVE)} == {PI}
    assert all("throttled" in f.reason for f in night.findings)


@pytest.mark.parametrize("slower", [1.0, 0.5])
def test_another_answer_fails_whatever_the_speed(farm, slower):
    night = farm.night({TARGET: Change(slower=slower, other_answer=True)})
    assert night.exit_code == 1
    assert found(night) == {(*TARGET, "answer")}
    assert "prompt 0 differs from token 1 on" in night.findings[0].reason


@pytest.mark.parametrize(("nats", "code"), [(1.0, 0), (1.005, 0), (1.02, 1)])  # e^2.3 is 10: 1.02 is 4.7 % more
def test_a_loss_of_accuracy_fails_whatever_the_speed(farm, nats, code):
    night = farm.night({TARGET: Change(slower=0.5, nats=nats)})
    assert night.exit_code == code
    assert found(night) == ({(*TARGET, "perplexity")} if code else set())


def test_a_missing_result_is_an_alarm(farm):
    def with_a_lost_link(runs):
        return [
            replace(
                run, status=RunStatus.UNREACHABLE, verdict=Verdict.INVALID, fault=Fault.LINK_LOST,
                reasons=("the link was lost",),
            )
            if (run.cell.device, run.cell.strategy, run.block) == (*TARGET, 1)
            else run
            for run in runs
            if run.cell.device == PI or run.block != 2
        ]  # fmt: skip

    farm.disturb = with_a_lost_link
    night = farm.night()
    assert night.exit_code == 3
    assert (*TARGET, "result") in found(night, Kind.MISSING)
    assert len(night.alarms) == 1 + 3  # the link, and a block of each strategy on the other device
    assert any("1 of 3 runs: unreachable: the link was lost" in alarm for alarm in night.alarms)


def test_no_device_at_all_is_infrastructure(farm):
    def unreachable(runs):
        lost = {"status": RunStatus.UNREACHABLE, "verdict": Verdict.INVALID, "reasons": ("no connection",)}
        return [replace(run, **lost, fault=Fault.UNREACHABLE) for run in runs]

    farm.disturb = unreachable
    night = farm.night()
    assert night.exit_code == 4
    assert "no device could be used: no connection" in night.findings[0].reason


@pytest.mark.parametrize(
    ("fault", "status", "metric"),
    [
        (Fault.OUT_OF_MEMORY, RunStatus.OUT_OF_MEMORY, "result"),
        (Fault.ENGINE, RunStatus.FAILED, "result"),
        (Fault.WRONG_ANSWER, RunStatus.FAILED, "answer"),
    ],
)
def test_an_engine_that_fails_now_is_a_regression(farm, fault, status, metric):
    def failing(runs):
        failed = {"status": status, "verdict": Verdict.INVALID, "reasons": ("it failed",), "fault": fault}
        return [replace(run, **failed) if (run.cell.device, run.cell.strategy) == TARGET else run for run in runs]

    farm.disturb = failing
    night = farm.night()
    assert night.exit_code == 1
    assert found(night) == {(*TARGET, metric)}


def test_what_is_acknowledged_is_shown_and_fails_nothing_until_it_expires(farm):
    known = Acknowledgement(
        *TARGET, "tpot_s", "", "issue 12", "me", "2026-01-01T00:00:00+00:00", "2026-01-03T00:00:00+00:00"
    )
    both = [known, replace(known, metric="ttft_s")]
    first = farm.night({TARGET: Change(slower=1.2)}, both)  # of January 2
    assert first.exit_code == 0
    assert {f.metric for f in first.acknowledged} == {"tpot_s", "ttft_s"}
    farm.night({}, both)
    assert farm.night({TARGET: Change(slower=1.2)}, both).exit_code == 1


def test_an_engine_that_is_not_kept_leaves_it_inconclusive(farm):
    night = farm.night({TARGET: Change(slower=1.2)}, kept=())
    assert night.exit_code == 5
    assert any(f"engine {OLD[:16]} is not kept here: move the baseline" in f.reason for f in night.findings)


def test_the_engine_of_the_baseline_cannot_have_got_slower_by_itself(farm):
    night = farm.night({TARGET: Change(slower=1.5)}, engine=OLD)
    assert found(night) == set()
    assert night.exit_code == 5
    assert "of the baseline's own engine: the device has changed" in " ".join(f.reason for f in night.findings)
    assert night.confirmations == ()


def test_a_trend_has_the_nights_before_and_marks_where_it_changed(farm):
    for _ in range(12):
        farm.night()
    for _ in range(4):
        night = farm.night({TARGET: Change(slower=1.5)})
    (trend,) = (t for t in night.trends if (t.cell.device, t.cell.strategy, t.metric) == (*TARGET, "tpot_s"))
    assert len(trend.points) == 16
    assert [change.index for change in trend.changes] == [12]
    assert trend.changes[0].after / trend.changes[0].before == pytest.approx(1.5, abs=0.05)
    assert [point.engine_sha256 for point in trend.points[11:13]] == [NEW, CHANGED]


def test_without_a_baseline_there_is_nothing_to_say(farm):
    candidate = farm.measure({})
    night = without_baseline(
        "farm", candidate, trends(candidate, ["tpot_s"], []), "pin one", "2026-01-02T00:00:00+00:00"
    )
    assert night.exit_code == 5
    assert len(night.trends) == 6
    assert night.findings[0].reason == "pin one"


def test_what_too_few_pairs_could_not_tell_is_said(farm, monkeypatch):
    monkeypatch.setattr("tests.programs.nights.simulated.PAIRS", 1)
    night = farm.night({TARGET: Change(slower=1.5)})
    assert night.exit_code == 5
    assert any("only 3 valid pairs" in f.reason for f in night.findings)
