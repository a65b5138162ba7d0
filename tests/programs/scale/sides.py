"""Sweeps and a night as large as a page must bear: every record complete, so that each chart and table has its say.

Seeded: the same arguments give the same records.
"""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from engine.protocol import Course, LayerCounts, Sample, Series, Steps, Totals
from engine.spans import COMPUTED, LOADED, ComputeSpans, LoadSpans, Timeline
from reports.judging.judgement import GATED, Side, compare_sides
from reports.nights.gate import Measured
from reports.nights.night import ChangePoint, Confirmation, Finding, Kind, Night, Trend, TrendPoint
from reports.nights.outcome import Context, judge_sweep
from reports.nights.trends import NIGHTS, trends
from reports.records import Conditions, Fault, Run, RunEstimate, RunStatus, Sweep, Verdict
from tests.reports.conftest import EXPERT_BYTES, MIB, STRATEGIES, run

LAYERS = 8
STARTED = datetime(2026, 11, 23, 2, tzinfo=UTC)
_LIKE = ("naive-swap", "edgemoe", "full-load")  # the first is the baseline; how those behave that have other names


def side(
    devices: int, strategies: int, workloads: int, *, blocks: int = 3, seed: int = 1, day: int = 0, slower: float = 1.0
) -> Measured:
    """A sweep of `devices` x `strategies` x `workloads` cells. `slower`: the second strategy on the first device."""
    rng = random.Random(seed)
    sweep_id = f"{STARTED + timedelta(days=day):%Y%m%d-%H%M%S}-{seed:04x}"
    patterns = {
        (s, b): complete(run("pi4b", _LIKE[s % 3], b, seed=seed)) for s in range(strategies) for b in range(blocks)
    }
    runs = []
    for block in range(blocks):
        for d in range(devices):
            for w in range(workloads):
                for s in range(strategies):
                    factor = (1 + d / 3) * (1 + w / 20) * (0.9 + s / 8) * rng.uniform(0.99, 1.01)
                    pattern = patterns[s, block]
                    name = _LIKE[s] if s < len(_LIKE) else f"{_LIKE[s % 3]}-{s}"
                    cell = replace(pattern.cell, device=f"board-{d:02d}", strategy=name, workload=f"text-{w}")
                    scaled = paced(pattern, factor * (slower if (d, s) == (0, 1) else 1.0))
                    runs.append(
                        replace(
                            scaled,
                            id=f"{sweep_id}-{len(runs):05d}",
                            sweep_id=sweep_id,
                            cell=cell,
                            emulated=pattern.emulated if d % 2 else (),
                            engine_sha256=f"{seed:064x}",
                        )
                    )
    planned = tuple((each.cell.key, each.block) for each in runs)
    at = (STARTED + timedelta(days=day)).isoformat()
    sweep = Sweep(sweep_id, "large", '[matrix]\nname = "large"\n', _LIKE[0], planned, at, "0.1.0")
    return Measured.of(sweep, (unlucky(each, i) for i, each in enumerate(runs)))


def unlucky(measured: Run, i: int) -> Run:
    """One in 90 failed, one in 70 is suspect."""
    if i % 90 == 89:
        reasons = ("the device restarted during the run: look at its power supply",)
        return replace(
            measured, status=RunStatus.FAILED, verdict=Verdict.INVALID, fault=Fault.REBOOTED, reasons=reasons,
            samples=(), totals=None, log_tail="loading layer 3\nloading layer 4",
        )  # fmt: skip
    if i % 70 == 69:
        return replace(
            measured, verdict=Verdict.SUSPECT, reasons=("throttled during the run (soft temperature limit)",)
        )
    return measured


def paced(measured: Run, factor: float) -> Run:
    """Each step takes `factor` of its time."""

    def scaled(sample: Sample) -> Sample:
        times, stalls = (tuple(x * factor for x in column) for column in (sample.steps.time_s, sample.steps.stall_s))
        return replace(sample, steps=replace(sample.steps, time_s=times, stall_s=stalls))

    return replace(measured, samples=tuple(map(scaled, measured.samples)))


def complete(measured: Run) -> Run:
    """With all that a record may carry: a timeline, counts by layer, conditions, an estimate and an accuracy."""
    rng = random.Random(measured.id)
    behaviour = STRATEGIES[measured.cell.strategy]
    samples = tuple(replace(each, layers=_layers(each.steps)) for each in measured.samples)
    last = samples[-1]
    short = Steps(**{name: column[:9] for name, column in vars(last.steps).items()})
    extra = replace(
        last,
        repetition=99,
        warmup=True,
        layers=None,
        tokens=last.tokens[:9],
        steps=short,
        timeline=timeline(rng, behaviour.hit),
    )
    resident = tuple(22 * MIB + min(1.0, i / 30) * (behaviour.peak_bytes - 22 * MIB) for i in range(120))
    conditions = Conditions(
        readings=120, period_s=0.1, watched_s=12.0, cpu_s=0.04, temperature_c=Course(48.2, 57.9, 48.2, 58.4),
        frequency_hz=Course(1.5e9, 1.5e9, 1.5e9, 1.5e9), load=Course(0.1, 1.4, 0.1, 1.5), governor="performance",
        throttled=False, power="mains", absent=("battery",), page_cache_resident_fraction=0.004,
        resident=Series(tuple(i / 10 for i in range(120)), tuple(map(int, resident))), memory_limit_bytes=256 * MIB,
        memory_limit_method="cgroup-v2", memory_peak_bytes=behaviour.peak_bytes, memory_peak_source="memory.peak",
    )  # fmt: skip
    estimate = RunEstimate(0.03, 0.02, behaviour.hit, 4e6, behaviour.peak_bytes, "the routing of another run")
    assert measured.totals is not None
    totals = replace(measured.totals, passage_nats=(231.5,))
    return replace(
        measured, samples=(*samples, extra), conditions=conditions, estimate=estimate, totals=Totals(**vars(totals))
    )


def timeline(rng: random.Random, hit: float, steps: int = 4) -> Timeline:
    compute: list[tuple[int, ...]] = []
    loads: list[tuple[int, ...]] = []
    starts, times, now = [], [], 0
    for _ in range(steps):
        starts.append(now)
        for layer in range(LAYERS):
            compute.append((COMPUTED.index("attention"), layer, now, 400))
            now += 400
            for expert in range(2):
                if rng.random() >= hit:
                    kind = rng.choice(("demanded", "late")) if hit else "demanded"
                    wait = rng.randrange(900, 1500) if kind == "demanded" else rng.randrange(100, 500)
                    loads.append(
                        (
                            LOADED.index(kind),
                            layer,
                            expert,
                            now - (0 if kind == "demanded" else 900),
                            wait,
                            EXPERT_BYTES,
                        )
                    )
                    compute.append((COMPUTED.index("stall"), layer, now, wait))
                    now += wait
                elif 0 < hit < 1:
                    loads.append((LOADED.index("preloaded"), layer, 8 + expert, now - 700, 600, EXPERT_BYTES))
                compute.append((COMPUTED.index("experts"), layer, now, 350))
                now += 350
        compute.append((COMPUTED.index("head"), LAYERS - 1, now, 500))
        now += 500
        times.append(now - starts[-1])
    phases = {kind: sum(span[3] for span in compute if COMPUTED[span[0]] == kind) / 1e6 for kind in COMPUTED}
    return Timeline(
        1, tuple(starts), tuple(times), ComputeSpans(*_columns(compute, 4)), LoadSpans(*_columns(loads, 6)),
        {**phases, "dequantise": phases["experts"] / 3},
    )  # fmt: skip


def _columns(rows: list[tuple[int, ...]], n: int) -> list[tuple[int, ...]]:
    return list(zip(*rows, strict=True)) or [()] * n


def _layers(steps: Steps) -> LayerCounts:
    """Later layers hit more often; together they are what the decode steps counted."""
    columns = []
    for name, weight in (("hits", 1), ("late", 0), ("misses", -1)):
        weights = [LAYERS + weight * layer for layer in range(LAYERS)]
        total = sum(getattr(steps, name)[1:])
        counts = [total * each // sum(weights) for each in weights]
        columns.append((total - sum(counts[1:]), *counts[1:]))
    return LayerCounts(*columns)


def night(baseline: Measured, candidate: Measured, *, nights: int = NIGHTS) -> Night:
    """`candidate` against `baseline`, with what was confirmed, acknowledged, and a line of `nights` for each cell."""
    comparison = compare_sides(Side("main", baseline.runs), Side(candidate.sweep.id, candidate.runs))
    different = (*comparison.environment, ("board-00 kernel", "6.6.31", "6.6.62"))
    comparison = replace(comparison, environment=different)
    judged = judge_sweep("large", comparison, candidate, Context(), candidate.sweep.started_at)
    worse = [finding for finding in judged.findings if finding.kind is Kind.REGRESSION and finding.cell]
    told = [
        Confirmation(
            finding.cell,
            finding.metric,
            1.12,
            1.09,
            1.16,
            i % 2 == 0,
            "20261124-021500-0003",
            "12 % slower in 10 pairs",
            0.001,
            10,
        )
        for i, finding in enumerate(worse)
        if finding.cell is not None
    ]
    return replace(
        judged,
        confirmations=tuple(told),
        acknowledged=tuple(worse[1:2]) or (Finding(Kind.REGRESSION, "known since Monday"),),
        trends=tuple(_past(trend, i, nights) for i, trend in enumerate(trends(candidate, GATED, ()))),
    )


def _past(trend: Trend, i: int, nights: int) -> Trend:
    """A line as of `nights` nights; every fiftieth has a change, every seventieth another kernel."""
    rng, (last,) = random.Random(i), trend.points
    changes = (ChangePoint(nights * 2 // 3, last.median * 0.9, last.median, 0.002),) if i % 50 == 0 else ()
    points = []
    for n in range(nights - 1):
        level = rng.uniform(0.99, 1.01) * (0.9 if changes and n < changes[0].index else 1.0)
        at = datetime.fromisoformat(last.started_at) - timedelta(days=nights - 1 - n)
        points.append(
            TrendPoint(
                f"{at:%Y%m%d}-night",
                at.isoformat(),
                last.median * level,
                last.low * level,
                last.high * level,
                f"{n // 7:064x}",
            )
        )
    environment = ((nights // 2, "kernel 6.6.31 → 6.6.62"),) if i % 70 == 0 else ()
    return replace(trend, points=(*points, last), changes=changes, environment=environment)
