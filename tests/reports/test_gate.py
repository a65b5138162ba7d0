"""What a comparison leaves to be looked at."""

from collections.abc import Sequence

from reports.gate import Measured, hard_findings
from reports.judgement import Mark
from reports.night import Kind
from tests.reports.test_judgement import AFTER, compared, only, steady


def unseen(make, factors: Sequence[float]):
    after = steady(make, factors, sweep=AFTER)
    comparison = compared(steady(make, factors), after)
    found = hard_findings(comparison, Measured.of(make.sweep(list(after)), after))
    return only(comparison), [finding for finding in found if finding.kind is Kind.INCONCLUSIVE]


def test_where_a_doubling_would_not_have_been_seen_nothing_was_found_out(make):
    judged, (finding,) = unseen(make, (1.0, 3.0, 0.4))
    assert judged.mark is Mark.INCONCLUSIVE
    assert finding.metric == "tpot_s"
    assert "would have been found: measure more blocks" in finding.reason


def test_less_noise_is_left_to_the_nights_together(make):
    judged, findings = unseen(make, (1.0, 1.2, 0.9))
    assert (judged.mark, findings) == (Mark.INCONCLUSIVE, [])
