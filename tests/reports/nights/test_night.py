import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from reports.errors import RecordError
from reports.judging.judgement import Comparison, Judged, Mark
from reports.judging.statistics import Summary
from reports.nights.night import (
    ChangePoint,
    Confirmation,
    Finding,
    Kind,
    Night,
    Trend,
    TrendPoint,
    exit_code,
    with_history,
)
from reports.nights.summary import junit, markdown, payload, summary_line

AT = "2026-11-25T04:00:00+00:00"
HOSTILE = "a|b `c` <script>alert(1)</script> *d* [e](http://f) @g \x1b[31m\nnext \ud800".replace("\ud800", "\ufffe")


@pytest.fixture
def night(make):
    cell, other = make.cell(), make.cell(strategy="full-load", expert_budget="default")
    summary = Summary(0.1, 0.09, 0.11, 12, 3)
    judged = [
        Judged(c, "tpot_s", summary, summary, 1.1, 1.05, 1.15, 0.02, 0.03, mark, "slower")
        for c, mark in ((cell, Mark.WORSE), (other, Mark.BETTER))
    ]
    point = TrendPoint("s2", AT, 0.1, 0.09, 0.11, "e" * 64, (("kernel", "6.6"),))
    return Night(
        "s2", "farm", AT, 1, "main", Comparison("main", "s2", tuple(judged), (), (("pi: kernel", "6.1", "6.6"),)),
        (
            Finding(Kind.REGRESSION, "10 % slower", cell, "tpot_s"),
            Finding(Kind.MISSING, "never tried", other, "result"),
        ),
        (Confirmation(cell, "tpot_s", 1.1, 1.05, 1.15, True, "s3", "confirmed: it is", 0.001, 12),),
        (Finding(Kind.REGRESSION, "known", other, "ttft_s"),), ("never tried",),
        (Trend(cell, "tpot_s", (point,), (ChangePoint(0, 0.1, 0.2, 0.005),), ((0, "kernel 6.1 → 6.6"),)),),
    )  # fmt: skip


def test_a_night_comes_back_as_it_was_written(night) -> None:
    assert Night.from_json(night.to_json()) == night


def test_the_points_of_the_nights_before_are_kept_by_those_nights(night) -> None:
    older = replace(night.trends[0].points[0], sweep_id="s1")
    before = replace(night, sweep_id="s1", trends=(replace(night.trends[0], points=(older,)),))
    full = with_history(night, [before])
    assert [point.sweep_id for point in full.trends[0].points] == ["s1", "s2"]
    assert Night.from_json(full.to_json()) == night
    assert with_history(Night.from_json(full.to_json()), [before]) == full
    bare = Night.from_json(before.to_json(), trends_only=True)
    assert (bare.trends, bare.comparison, bare.findings) == (before.trends, None, ())
    assert with_history(night, [bare]) == full


def test_changes_among_nights_that_are_gone_are_left_out(night) -> None:
    late = replace(night.trends[0], changes=(ChangePoint(3, 0.1, 0.2, 0.005),), environment=((2, "kernel"), (0, "os")))
    (alone,) = with_history(replace(night, trends=(late,)), []).trends
    assert (alone.changes, alone.environment) == ((), ((0, "os"),))


def test_another_container_of_the_same_name_is_another_line(night) -> None:
    trend = night.trends[0]
    before = replace(night, trends=(replace(trend, cell=replace(trend.cell, container_sha256="c1" * 32)),))
    assert with_history(night, [before]) == night


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"v": 2}', '{"v": 1, "sweep_id": "s"}', "nul"])
def test_what_is_no_night_is_refused(text) -> None:
    with pytest.raises(RecordError, match="night"):
        Night.from_json(text)


def test_the_gravest_finding_decides() -> None:
    kinds = [Kind.INCONCLUSIVE, Kind.INFRASTRUCTURE, Kind.MISSING, Kind.REGRESSION]
    codes = [exit_code([Finding(kind, "") for kind in kinds[: n + 1]]) for n in range(4)]
    assert codes == [5, 4, 3, 1]
    assert exit_code([]) == 0


def test_a_summary_says_what_where_and_by_how_much(night) -> None:
    text = markdown(night)
    assert text.startswith("## farm, sweep s2 against main: 1 regressions, 1 missing results, 1 acknowledged")
    for line in ("### Regressions", "### Missing results", "### Acknowledged", "### Measured again", "6.1 → 6.6"):
        assert line in text
    assert f"- `{night.findings[0].cell.key}`: tpot\\_s: 10 % slower" in text
    assert "1 better than the baseline." in text
    assert summary_line(replace(night, findings=(), acknowledged=())).endswith("against main: no regression")


def test_junit_has_a_case_for_each_cell(night) -> None:
    suite = ElementTree.fromstring(junit(night))
    assert suite.attrib["tests"] == "2"
    assert (suite.attrib["failures"], suite.attrib["errors"], suite.attrib["skipped"]) == ("1", "1", "0")
    (failed,) = suite.findall("testcase[failure]")
    assert failed.attrib["classname"] == "pi4b-emulated"
    assert "edgemoe" in failed.attrib["name"]
    assert "10 % slower" in failed.find("failure").attrib["message"]


def test_a_cell_that_was_not_measured_has_not_passed(night, make) -> None:
    """Its line of the nights before is there, and nothing of tonight."""
    before = replace(night.trends[0], points=(replace(night.trends[0].points[0], sweep_id="s1"),))
    lost = replace(night, findings=(Finding(Kind.INFRASTRUCTURE, "no device"),), comparison=None, trends=(before,))
    suite = ElementTree.fromstring(junit(lost))
    assert (suite.attrib["tests"], suite.attrib["errors"]) == ("2", "2")
    assert [case.attrib["classname"] for case in suite.findall("testcase[error]")] == ["pi4b-emulated", "farm"]
    measured = ElementTree.fromstring(junit(replace(lost, trends=night.trends, findings=())))
    assert measured.attrib["errors"] == "0"


def test_hostile_text_stays_text(night) -> None:
    hostile = replace(night, findings=(replace(night.findings[0], reason=HOSTILE),), name=HOSTILE)
    text = markdown(hostile)
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "](http" not in text.replace("\\]", "")
    assert "\x1b" not in text
    assert "\nnext" not in text
    message = ElementTree.fromstring(junit(hostile)).find("testcase/failure").attrib["message"]
    assert "<script>alert(1)</script>" in message
    assert json.loads(json.dumps(payload(hostile)))["findings"][0]["reason"] == HOSTILE


def test_findings_of_no_cell_have_a_case_too(night) -> None:
    lone = replace(night, findings=(Finding(Kind.INFRASTRUCTURE, "no device"),), trends=(), comparison=None)
    (case,) = ElementTree.fromstring(junit(lone)).findall("testcase")
    assert (case.attrib["classname"], case.attrib["name"]) == ("farm", "the night")
    assert case.find("error") is not None


@pytest.mark.parametrize(("found", "last"), [(50, "- finding 49"), (51, "- and 1 more"), (73, "- and 23 more")])
def test_the_summary_shows_fifty_of_a_kind_and_counts_the_rest(night, found: int, last: str) -> None:
    findings = tuple(Finding(Kind.MISSING, f"finding {i}") for i in range(found))
    text = markdown(replace(night, findings=findings, acknowledged=()))
    section = text.split("### Missing results\n\n")[1].split("\n\n")[0].splitlines()
    assert section[-1] == last
    assert section[:50] == [f"- finding {i}" for i in range(50)]
    assert len(section) == min(found, 51)
