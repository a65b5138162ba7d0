"""Checks a run that came back: is it complete, is its answer right, may its numbers be used?

What was asked for is no proof that it happened: each condition is compared with what the engine observed.
"""

from __future__ import annotations

import threading
from array import array

from engine.protocol import Load, RunRequest, Sample, Totals
from harness.device.session import Outcome
from reports.records import Cell, Conditions, Run, RunStatus, Verdict

COLD_RESIDENT_FRACTION = 0.01  # of a container: above this it was not cold
WARM_RESIDENT_FRACTION = 0.99
EMULATION_TOLERANCE = 0.05  # of the rate that was asked for
LOW_BATTERY = 0.15  # of its charge


def malformed_samples(request: RunRequest, samples: tuple[Sample, ...]) -> str | None:
    """Returns why the samples of a run cannot be recorded, or None."""
    seen = set()
    for sample in samples:
        key = (sample.prompt, sample.repetition, sample.warmup)
        if not 0 <= sample.prompt < len(request.prompts):
            return f"the engine answered prompt {sample.prompt}, which was not asked for: deploy the engine again"
        if key in seen:
            return f"the engine answered prompt {sample.prompt} twice in one repetition: deploy the engine again"
        seen.add(key)
    return None


def incomplete(request: RunRequest, outcome: Outcome) -> str | None:
    """Returns why a run that says it is ok is not, or None."""
    if outcome.facts is None or outcome.load is None or outcome.totals is None:
        return "the engine ended without saying what it loaded and used: see the end of its log"
    expected = len(request.prompts) * request.repetitions
    timed = [s for s in outcome.samples if not s.warmup]
    if len(timed) != expected:
        return f"the engine returned {len(timed)} of {expected} samples: see the end of its log"
    for sample in timed:
        if not sample.tokens or (len(sample.tokens) != request.max_new_tokens and not request.stop_at_eos):
            return f"prompt {sample.prompt} has {len(sample.tokens)} of {request.max_new_tokens} tokens"
    predicted = len(outcome.totals.passage_nats)
    if predicted != len(request.passages):
        return f"the engine predicted {predicted} of {len(request.passages)} passages: deploy the engine again"
    return None


def judge(
    request: RunRequest, load: Load, conditions: Conditions | None = None, totals: Totals | None = None
) -> tuple[Verdict, tuple[str, ...]]:
    """Returns the verdict on a complete run: suspect where a condition was not seen to hold, or is unknown."""
    reasons = [f"the engine warns: {warning}" for warning in load.warnings]
    fraction = load.page_cache_resident_fraction
    if fraction is None:
        reasons.append(f"page cache: {request.page_cache} was asked for, but the device cannot say what was resident")
    elif request.page_cache == "cold" and fraction > COLD_RESIDENT_FRACTION:
        reasons.append(
            f"page cache: cold was asked for, but {fraction:.1%} of the container was resident: "
            "does another process keep it open?"
        )
    elif request.page_cache == "warm" and fraction < WARM_RESIDENT_FRACTION:
        reasons.append(
            f"page cache: warm was asked for, but only {fraction:.1%} of the container was resident: "
            "the device's memory may be too small for it"
        )
    if request.reader not in ("auto", load.reader):
        reasons.append(f"reader: {request.reader} was asked for, {load.reader} engaged: ask for {load.reader}")
    if request.lanes not in (0, load.lanes):
        reasons.append(f"lanes: {request.lanes} were asked for, {load.lanes} engaged: deploy the engine again")
    if request.backend not in ("auto", load.backend):
        reasons.append(f"backend: {request.backend} was asked for, {load.backend} engaged: ask for auto")
    asked = request.expert_budget.bytes if request.expert_budget else None
    if asked is not None and (load.expert_budget_bytes is None or load.expert_budget_bytes > asked):
        reasons.append(f"expert budget: {asked} bytes were asked for, {load.expert_budget_bytes} were used")
    emulated, achieved = request.emulated_read_bytes_per_s, None if totals is None else totals.emulated_read_bytes_per_s
    if emulated is not None and achieved is not None and abs(achieved / emulated - 1) > EMULATION_TOLERANCE:
        reasons.append(
            f"emulated storage: {emulated / 1e6:g} MB/s were asked for, {achieved / 1e6:.1f} MB/s were given: "
            "the device's own storage is slower than what it emulates"
        )
    reasons += _doubts(request, conditions) if conditions is not None else []
    return (Verdict.SUSPECT if reasons else Verdict.VALID), tuple(reasons)


def _doubts(request: RunRequest, seen: Conditions) -> list[str]:
    """Returns what speaks against a run's numbers in the state of its device.

    A sensor that the device does not have is no doubt: it is recorded as absent, for this run and all others there. One
    that it has, or as a board of its kind should have, and that did not answer, is.
    """
    doubts = [f"{what}: should be known and is not" for what in seen.unknown]
    doubts += [f"before the run, {what}, after a wait of {seen.waited_s:.0f} s" for what in seen.unsettled]
    if seen.throttled:
        doubts.append(f"throttled during the run ({', '.join(seen.throttle_causes)}): cool the board, check its supply")
    elif seen.under_voltage:
        doubts.append("under-voltage during the run: use a stronger power supply or a shorter cable")
    for what, before, after in (
        ("governor", seen.governor, seen.governor_after),
        ("power supply", seen.power, seen.power_after),
    ):
        if before != after and after is not None:
            doubts.append(f"the {what} changed during the run, from {before} to {after}")
    charge = seen.battery.after
    if seen.power_after == "battery" and charge is not None and charge <= LOW_BATTERY:
        doubts.append(f"the battery is down to {charge:.0%}, where devices save power: charge it")
    limit = request.memory_limit_bytes
    if limit is not None and seen.memory_limit_method == "none":
        doubts.append(f"memory limit: {limit} bytes were asked for, and nothing on the device can hold them")
    elif limit is not None and seen.memory_peak_bytes is not None and seen.memory_peak_bytes > limit:
        doubts.append(f"memory limit: {limit} bytes were asked for, {seen.memory_peak_bytes} were used")
    return doubts


class Answers:
    """Holds the tokens of the ok runs so far, by what must make them equal: same trace, same answer.

    Devices are not compared with one another (their arithmetic may round differently), nor are engines
    (reports/nights/gate.py does that), nor strategies that change the precision of an expert or the routing: those have
    an accuracy, not an answer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[object, ...], tuple[str, array[int]]] = {}  # as many as there are prompts, not runs

    def know(self, run: Run) -> None:
        """Takes the answer of a run that is in the records already."""
        if run.status is RunStatus.OK and run.request and run.load:
            self.disagreement(run.id, run.cell, run.request, run.load, run.samples, run.engine_sha256)

    def disagreement(
        self,
        run_id: str,
        cell: Cell,
        request: RunRequest,
        load: Load,
        samples: tuple[Sample, ...],
        engine_sha256: str = "",
    ) -> str | None:
        """Compares a run with those before; remembers it and returns None where nothing differs, else says what."""
        found: dict[tuple[object, ...], tuple[str, array[int]]] = {}
        if load.strategy.get("relief", "none") != "none":
            return None
        for sample in samples:
            if sample.timeline is not None:  # cut short
                continue
            # Greedy repetitions of one prompt are equal; sampled ones are equal to their like in other runs.
            repetition = (sample.repetition, sample.warmup) if request.sampling.temperature else None
            key: tuple[object, ...] = (
                cell.device,
                cell.container_sha256,
                cell.workload_sha256,
                request.max_new_tokens,
                request.stop_at_eos,
                load.strategy.get("precision"),
                load.backend,
                engine_sha256,
                sample.prompt,
                repetition,
            )
            tokens = array("q", sample.tokens)
            first = found.setdefault(key, (f"{run_id} ({cell.strategy})", tokens))
            if first[1] != tokens:
                return f"wrong answer: the tokens of prompt {sample.prompt} differ between repetitions"
        with self._lock:
            for key, (_, tokens) in found.items():
                other, expected = self._known.get(key, ("", tokens))
                if tokens != expected:
                    at = next(
                        (i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b),
                        min(len(tokens), len(expected)),
                    )
                    return f"wrong answer: from token {at} on, prompt {key[-2]} differs from that of run {other}"
            for key, answer in found.items():
                self._known.setdefault(key, answer)
        return None
