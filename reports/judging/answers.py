"""Same trace, same answer: what lossless strategies generate from one prompt on one container."""

from __future__ import annotations

from collections.abc import Iterable

from reports.records import Run, RunStatus

Answers = dict[tuple[object, ...], tuple[int, ...]]


def is_lossy(run: Run) -> bool:
    """Returns whether a run used another precision than the stored one, or other experts than the router's."""
    parts = run.load.strategy if run.load else {}
    return parts.get("precision", "stored") != "stored" or parts.get("relief", "none") != "none"


def answers(runs: Iterable[Run]) -> Answers:
    """Returns tokens by all that makes them equal, but for the device; lossy and failed runs are left out.

    Greedy repetitions of one prompt are equal; sampled ones are equal to their like in other runs.
    """
    found: Answers = {}
    for run in runs:
        request, load = run.request, run.load
        if run.status is not RunStatus.OK or request is None or load is None or is_lossy(run):
            continue
        common = (run.cell.container_sha256, run.cell.workload_sha256, request.max_new_tokens, request.stop_at_eos)
        for s in run.samples:
            if s.timeline is not None:  # cut short
                continue
            repetition = (s.repetition, s.warmup) if request.sampling.temperature else None
            found.setdefault((*common, load.backend, s.prompt, repetition), s.tokens)
    return found


def first_change(before: Answers, after: Answers) -> tuple[object, int] | None:
    """Returns which prompt is answered otherwise, and from which token on; None where none is."""
    for key, tokens in after.items():
        known = before.get(key, tokens)
        if known != tokens:
            pairs = zip(known, tokens, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(known), len(tokens)))
            return key[-2], at
    return None
