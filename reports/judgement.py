"""What a comparison of two sides says of each cell and metric: better, worse, neither, or that nothing can be said."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from reports.records import Cell, Fault, Run
from reports.statistics import Summary

# By which share a metric must get worse for it to matter: less is unchanged, however certain.
GATED = {"tpot_s": 0.03, "ttft_s": 0.05, "peak_resident_bytes": 0.03, "perplexity": 0.02}
ANSWER = "answer"  # instead of a metric: the tokens that were generated
RESULT = "result"  # instead of a metric: whether there is one


class Mark(enum.StrEnum):
    """Of one cell and metric, the candidate against the baseline."""

    BETTER = "better"
    WORSE = "worse"
    UNCHANGED = "unchanged"
    INCONCLUSIVE = "inconclusive"
    SUSPECT = "suspect"  # a device's state speaks against the numbers: they are not compared
    NEW = "new"
    GONE = "gone"
    FAILING = "failing"


@dataclass(frozen=True)
class Judged:
    """One cell and one metric. Ratios are candidate over baseline of the metric's value, whichever way is better."""

    cell: Cell  # the candidate's, or the baseline's where it is gone
    metric: str  # one of METRICS, or ANSWER or RESULT
    baseline: Summary | None
    candidate: Summary | None
    ratio: float | None
    ci_low: float | None  # 95 % interval of the ratio
    ci_high: float | None
    noise: float | None  # by how much two sweeps of one engine differ here, as a share; None: not known, or paired
    minimum_detectable: float | None  # the change, as a share, that would have been found 4 times in 5
    mark: Mark
    reason: str
    fault: Fault | None = None  # why it is failing


@dataclass(frozen=True)
class Comparison:
    baseline: str  # as shown
    candidate: str
    judged: tuple[Judged, ...]
    incomparable: tuple[tuple[str, str], ...]  # (cell key, reason)
    environment: tuple[tuple[str, str, str], ...]  # (device and fact, before, after)


@dataclass(frozen=True)
class Side:
    """One of two that are compared: its name, and the last attempts at its cells."""

    name: str
    runs: tuple[Run, ...]
