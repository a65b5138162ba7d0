"""A night: what a nightly run found, against a pinned baseline and against the nights before. Written once, as JSON.

History of VERSION: 1.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from engine.codec import from_json, to_json
from engine.errors import ProtocolError
from reports.errors import RecordError
from reports.judging.judgement import Comparison, Mark
from reports.records import Cell, require_utc

VERSION = 1


class Kind(enum.StrEnum):
    """The kinds of findings, the gravest first."""

    REGRESSION = "regression"
    MISSING = "missing"  # a result that should be there
    INFRASTRUCTURE = "infrastructure"  # no device could be used
    INCONCLUSIVE = "inconclusive"  # neither a regression nor none


EXIT_CODES = {Kind.REGRESSION: 1, Kind.MISSING: 3, Kind.INFRASTRUCTURE: 4, Kind.INCONCLUSIVE: 5}


@dataclass(frozen=True)
class Finding:
    """Something that somebody should look at."""

    kind: Kind
    reason: str
    cell: Cell | None = None  # None: of no cell
    metric: str = ""  # of reports.metrics; `answer` where the tokens changed, `result` where there are none any more

    def __str__(self) -> str:
        where = f"{self.cell.key}: " if self.cell else ""
        return f"{where}{self.metric}: {self.reason}" if self.metric else f"{where}{self.reason}"


def exit_code(findings: Iterable[Finding]) -> int:
    """Returns the exit code of the gravest finding, 0 where there is none."""
    kinds = {finding.kind for finding in findings}
    return next((code for kind, code in EXIT_CODES.items() if kind in kinds), 0)


@dataclass(frozen=True)
class ChangePoint:
    """The first point after a series changed, and the medians before and after, in the metric's unit."""

    index: int
    before: float
    after: float
    p_value: float


@dataclass(frozen=True)
class TrendPoint:
    """One night of one cell and metric: median and quartiles of its runs, in the metric's unit."""

    sweep_id: str
    started_at: str
    median: float
    low: float
    high: float
    engine_sha256: str
    environment: tuple[tuple[str, str], ...] = ()  # facts of the device of which a change explains much
    farm_version: str = ""


@dataclass(frozen=True)
class Trend:
    """One cell and metric over the nights, the oldest first."""

    cell: Cell
    metric: str
    points: tuple[TrendPoint, ...]
    changes: tuple[ChangePoint, ...] = ()
    environment: tuple[tuple[int, str], ...] = ()  # (index of the first point under it, what changed in words)

    @property
    def series(self) -> tuple[str, str, str, str]:
        """Returns what makes points one line: another container or workload of the same name begins another."""
        return self.cell.key, self.cell.container_sha256, self.cell.workload_sha256, self.metric


@dataclass(frozen=True)
class Confirmation:
    """A suspected regression, measured again: old and new engine in turns on the same device.

    `ratio` is new over old, with its interval; None where too few pairs were valid.
    """

    cell: Cell
    metric: str
    ratio: float | None
    ci_low: float | None
    ci_high: float | None
    confirmed: bool
    sweep_id: str  # of the last round; empty where nothing was measured
    note: str  # why, in words
    p_value: float | None = None
    pairs: int = 0
    is_refuted: bool = False  # it is not so much worse; neither this nor confirmed: undecided


@dataclass(frozen=True)
class Night:
    """The outcome of a nightly run. `sweep_id` is that of its matrix; `acknowledged` would else be findings."""

    sweep_id: str
    name: str
    at: str  # when it ended, UTC
    exit_code: int
    baseline: str | None = None  # None: none was pinned
    comparison: Comparison | None = None
    findings: tuple[Finding, ...] = ()
    confirmations: tuple[Confirmation, ...] = ()
    acknowledged: tuple[Finding, ...] = ()
    alarms: tuple[str, ...] = ()  # missing results, in words
    trends: tuple[Trend, ...] = ()

    def __post_init__(self) -> None:
        require_utc(self.at, f"night {self.sweep_id}: at")

    def to_json(self) -> str:
        """Returns the night with only the last point of its trends; `with_history` adds those of earlier nights."""
        last = tuple(replace(trend, points=trend.points[-1:]) for trend in self.trends)
        content = to_json(replace(self, trends=last))
        return json.dumps({"v": VERSION, **content}, allow_nan=False)

    @property
    def too_noisy(self) -> int:
        """Returns how many comparisons were inconclusive: no finding, and no proof that all is well."""
        return 0 if self.comparison is None else sum(j.mark is Mark.INCONCLUSIVE for j in self.comparison.judged)

    @classmethod
    def from_json(cls, text: str, *, trends_only: bool = False) -> Night:
        """Reads a night, with `trends_only` without comparison and findings. Raises RecordError."""
        try:
            content = json.loads(text)
            version = content.pop("v", None) if isinstance(content, dict) else None
            if version != VERSION:
                raise RecordError(f"night: version {version!r} where {VERSION} is known: use the farm that wrote it")
            bare = {**content, "comparison": None, "findings": [], "confirmations": [], "acknowledged": []}
            return from_json(cls, bare if trends_only else content)
        except (ValueError, ProtocolError) as error:
            raise RecordError(f"the record of a night is damaged: {error}: restore the database") from None


def with_history(night: Night, earlier: Sequence[Night]) -> Night:
    """Returns `night` with the points of the nights before it, the oldest first, in its trends.

    Where some of those are not there any more, changes among them are left out.
    """
    known = {trend.series: list[TrendPoint]() for trend in night.trends}
    for before in earlier:
        for trend in before.trends:
            if trend.series in known:
                known[trend.series] += trend.points[-1:]
    return replace(night, trends=tuple(_longer(trend, known[trend.series]) for trend in night.trends))


def _longer(trend: Trend, before: Sequence[TrendPoint]) -> Trend:
    points = (*before, *trend.points[-1:])
    there = range(len(points))
    changes = tuple(change for change in trend.changes if change.index in there)
    environment = tuple((index, what) for index, what in trend.environment if index in there)
    return replace(trend, points=points, changes=changes, environment=environment)
