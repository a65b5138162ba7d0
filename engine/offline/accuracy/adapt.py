"""Adapts each expert's bitwidth to a tolerable loss (paper, section 3.2).

Both methods order single changes, each of which saves bytes, into a ladder; the more of them, the smaller and the worse
the model. How far down is decided by measuring: the largest number of changes within the tolerance, or the smallest
within a budget of bytes.

paper: symmetric abs-max per output channel. Two uniform bitwidths bracket the tolerance; the least important experts
       get the lower one. An expert's importance is the loss with it at INT2 and all others at INT4.
best:  groups with zero points, INT2 to INT8. The divergence that one expert at INT2 causes, scaled to other formats by
       the errors of its outputs, estimates its loss; changes come by estimated loss per byte saved.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from engine.container import RECORD_ALIGNMENT, Container, ContainerWriter, ExpertKey
from engine.errors import RequestError
from engine.experts.profile import PathProfile
from engine.files import read_bounded, replacing
from engine.offline.accuracy.calibration import Assignment, Calibration, MixedExperts, Score, output_errors, pool, score
from engine.quantize import Format, align

METRICS = ("perplexity", "agreement", "rouge-2")
PAPER_FORMATS = (Format("int8"), Format("int4"), Format("int2"))
BEST_FORMATS = tuple(
    Format(precision, group, symmetric=False)
    for precision, group in (
        ("int8", 0), ("int4", 32), ("int4", 64), ("int3", 32), ("int3", 64), ("int2", 32), ("int2", 64), ("int2", 0),
    )
)  # fmt: skip

_MAX_PLAN_BYTES = 64 << 20
_MEANING = {
    "paper": "Relative loss with this expert at INT2 and all others at INT4.",
    "best": "Estimated loss, in nats a token, with this expert alone at INT2.",
}
_PRIOR = 8  # activations: with fewer, an expert is taken to be like the others of its layer

Progress = Callable[[int, int], None]
Change = tuple[ExpertKey, int]


@dataclass(frozen=True)
class Ladder:
    start: Assignment
    changes: tuple[Change, ...]

    def assignment(self, rungs: int) -> Assignment:
        return {**self.start, **dict(self.changes[:rungs])}


@dataclass(frozen=True)
class BitwidthPlan:
    """Holds what was decided and why. Losses are relative to the stored precision, on the calibration text."""

    method: str
    metric: str
    assignment: Assignment
    formats: tuple[Format, ...]  # by number
    bytes_experts: int
    score: Score
    loss: float
    measured: tuple[tuple[int, float], ...]  # (expert bytes, loss) of every mixture that the search measured
    evidence: dict[str, float]  # "layer/expert": its importance (paper) or its estimated loss at INT2 (best)
    calibration_sha256: str

    def precisions(self) -> dict[str, int]:
        return dict(Counter(self.formats[number].precision for number in self.assignment.values()))

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "metric": self.metric,
            "bytes_experts": self.bytes_experts,
            "loss": self.loss,
            "nats_per_token": self.score.nats_per_token,
            "agreement": self.score.agreement,
            "divergence": self.score.divergence,
            "rouge_2": self.score.rouge_2,
            "precisions": self.precisions(),
            "formats": dict(Counter(self.formats[n].label for n in self.assignment.values())),
            "calibration_sha256": self.calibration_sha256,
            "measured": [list(pair) for pair in self.measured],
            "experts": {
                f"{layer}/{expert}": {
                    "format": self.formats[number].label,
                    "evidence": self.evidence.get(f"{layer}/{expert}"),
                }
                for (layer, expert), number in sorted(self.assignment.items())
            },
        }

    def save(self, path: Path) -> None:
        """Writes the plan atomically. Raises RequestError."""
        try:
            with replacing(str(path)) as file:
                file.write(json.dumps(self.to_json(), indent=1).encode() + b"\n")
        except OSError as error:
            raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from None


@dataclass(frozen=True)
class ExpertEvidence:
    """Holds what a saved plan says of each expert, for people."""

    importance: dict[ExpertKey, float]
    meaning: str
    loss: str


def read_evidence(path: Path) -> ExpertEvidence:
    """Reads a saved plan's evidence. Raises RequestError, which names the file, unless `save` wrote it."""
    try:
        content = json.loads(read_bounded(str(path), _MAX_PLAN_BYTES))
        experts = {tuple(map(int, key.split("/"))): float(e["evidence"]) for key, e in content["experts"].items()
                   if e["evidence"] is not None}  # fmt: skip
        importance = {(layer, expert): value for (layer, expert), value in experts.items() if math.isfinite(value)}
        loss = f"{float(content['loss']):.2%} in {str(content['metric'])[:40]}, by {str(content['method'])[:40]}"
        return ExpertEvidence(importance, _MEANING[content["method"]], loss)
    except OSError as error:
        raise RequestError(f"{path}: cannot be opened: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise RequestError(
            f"{path}: not a plan of `model adapt` ({type(error).__name__}: {str(error)[:80]}): name another"
        ) from None


def adapt(
    path: str,
    calibration: Calibration,
    *,
    profile: PathProfile,
    method: str = "paper",
    metric: str = "perplexity",
    tolerance: float = 0.02,
    budget_bytes: int | None = None,
    workers: int | None = None,
    progress: Progress = lambda done, of: None,
) -> BitwidthPlan:
    """Returns the plan for the container at `path`, calibrated on passages. A budget overrides the tolerance.

    Raises ContainerError for a container that is not in full precision, RequestError for what cannot be reached.
    """
    formats = PAPER_FORMATS if method == "paper" else BEST_FORMATS
    container = Container.open(path)
    experts = MixedExperts(container, formats)
    if (profile.layers, profile.experts) != (container.moe_layers, container.experts_per_layer):
        raise RequestError(f"{path}: the profile is of another model; make one with `edgemoe-farm model profile`")
    if not calibration.passages:
        raise RequestError("the calibration text has fewer than two tokens")
    if metric == "rouge-2" and not calibration.targets:
        raise RequestError("Rouge-2 compares with what should be written: calibrate on pairs")
    with pool(path, calibration, formats, workers) as executor:
        search = _Search(executor, experts, profile, metric, tolerance, budget_bytes, progress)
        try:
            ladder, evidence = search.paper_ladder() if method == "paper" else search.best_ladder()
            assignment = ladder.assignment(search.rungs(ladder))
            found, loss = search.measure(assignment)
        finally:
            executor.shutdown(cancel_futures=True)
    return BitwidthPlan(
        method, metric, assignment, experts.formats, search.bytes_of(assignment), found, loss,
        tuple(sorted(search.measured)), evidence, _sha256(calibration),
    )  # fmt: skip


def _sha256(calibration: Calibration) -> str:
    content = [[p.prompt, p.continuation] for p in calibration.passages]
    return hashlib.sha256(json.dumps([content, calibration.targets]).encode()).hexdigest()


class _Search:
    def __init__(
        self,
        executor: Executor,
        experts: MixedExperts,
        profile: PathProfile,
        metric: str,
        tolerance: float,
        budget_bytes: int | None,
        progress: Progress,
    ) -> None:
        self._executor, self._metric, self._progress = executor, metric, progress
        self._formats, self._layouts = experts.formats, experts.layouts
        self._keys = sorted(experts.container.primary)
        self._layers = experts.container.moe_layers
        self._frequency = profile.frequency()
        self._tolerance, self._budget_bytes = tolerance, budget_bytes
        self._known: dict[tuple[int, ...], tuple[Score, float]] = {}
        self._done, self._of = 0, 1
        self.measured: list[tuple[int, float]] = []
        self._slots = [align(layout.bytes, RECORD_ALIGNMENT) for layout in experts.layouts]
        self._exact: Score | None = None

    def bytes_of(self, assignment: Assignment) -> int:
        return sum(self._slots[number] for number in assignment.values())

    def uniform(self, number: int) -> Assignment:
        return dict.fromkeys(self._keys, number)

    def measure(self, assignment: Assignment) -> tuple[Score, float]:
        """Returns the score, and the loss relative to the stored precision."""
        known = tuple(assignment[key] for key in self._keys)
        if known not in self._known:
            (found,) = self._scores(self.uniform(0), [{k: n for k, n in assignment.items() if n}])
            self._known[known] = found, self._loss(found)
            self.measured.append((self.bytes_of(assignment), self._known[known][1]))
        return self._known[known]

    def rungs(self, ladder: Ladder) -> int:
        """Returns how many changes to make: by bytes for a budget, else the most whose measured loss is tolerable."""
        if self._budget_bytes is not None:
            for rungs in range(len(ladder.changes) + 1):
                if self.bytes_of(ladder.assignment(rungs)) <= self._budget_bytes:
                    return rungs
            raise RequestError(
                f"a budget of {self._budget_bytes} bytes is too small: the fewest that this method reaches are "
                f"{self.bytes_of(ladder.assignment(len(ladder.changes)))}"
            )
        low, high = 0, len(ladder.changes) + 1  # tolerable, and not
        while high - low > 1:
            middle = (low + high) // 2
            if self.measure(ladder.assignment(middle))[1] <= self._tolerance:
                low = middle
            else:
                high = middle
        return low

    def paper_ladder(self) -> tuple[Ladder, dict[str, float]]:
        """Orders the least important experts first, from the upper to the lower of the bitwidths around the goal."""
        four, two = (self._number("int4"), self._number("int2"))
        self._of = len(self._keys) + 16
        found = self._scores(self.uniform(four), [{key: two} for key in self._keys])
        importance = {key: self._loss(s) for key, s in zip(self._keys, found, strict=True)}
        order = sorted(self._keys, key=lambda key: (importance[key], self._frequency.get(key, 0.0)))
        upper = lower = 0
        for number in range(1, len(self._formats)):
            upper, lower = lower, number
            assignment = self.uniform(number)
            if self._budget_bytes is not None:
                if self.bytes_of(assignment) <= self._budget_bytes:
                    break
            elif self.measure(assignment)[1] > self._tolerance:
                break
        evidence = {f"{layer}/{expert}": loss for (layer, expert), loss in importance.items()}
        return Ladder(self.uniform(upper), tuple((key, lower) for key in order)), evidence

    def best_ladder(self) -> tuple[Ladder, dict[str, float]]:
        """Orders all changes of all experts by estimated loss per byte saved."""
        losses = self._estimated_losses()
        changes: list[tuple[float, int, ExpertKey, int]] = []
        for key in self._keys:
            points = [(self._slots[n], losses.get((key, n), 0.0), n) for n in range(len(self._formats))]
            for (bytes_a, loss_a, _), (bytes_b, loss_b, n) in itertools.pairwise(_lower_hull(points)):
                changes.append(((loss_b - loss_a) / (bytes_a - bytes_b), -bytes_b, key, n))
        changes.sort()
        probe = self._number("int2")
        evidence = {f"{layer}/{expert}": losses[(layer, expert), probe] for layer, expert in self._keys}
        return Ladder(self.uniform(0), tuple((key, n) for _, _, key, n in changes)), evidence

    def _estimated_losses(self) -> dict[tuple[ExpertKey, int], float]:
        """Returns nats a token by (expert, format): measured alone at INT2, scaled by its output errors."""
        self._of = len(self._keys) + self._layers + 12
        futures = [self._executor.submit(output_errors, layer) for layer in range(self._layers)]
        watched = []
        for future in futures:
            watched.append(future.result())
            self._step()
        probe = self._number("int2")  # strong enough a change to tell its cost from the noise of rounding
        found = dict(zip(self._keys, self._scores(self.uniform(0), [{key: probe} for key in self._keys]), strict=True))
        losses = {}
        for layer, seen in enumerate(watched):
            experts = [expert for of, expert in self._keys if of == layer]
            counts = {expert: seen.activations.get(expert, 0) for expert in experts}
            divergence = {expert: found[layer, expert].divergence for expert in experts}
            usual = median(divergence[e] / counts[e] for e in experts if counts[e])  # of one activation
            total = sum(counts.values())
            known = sum(self._frequency.get((layer, expert), 0.0) for expert in experts)  # 0: not in the profile
            of_all = {n: sum(seen.errors.get((e, n), 0.0) for e in experts) for n in range(1, len(self._formats))}
            for expert in experts:
                share = counts[expert] / total
                if known:
                    share = (share + self._frequency.get((layer, expert), 0.0) / known) / 2
                per_activation = (divergence[expert] + _PRIOR * usual) / (counts[expert] + _PRIOR)
                errors = {n: seen.errors.get((expert, n), 0.0) for n in of_all} if counts[expert] else of_all
                for n in of_all:
                    ratio = errors[n] / errors[probe] if errors[probe] else 0.0
                    losses[(layer, expert), n] = per_activation * share * total * ratio
        return losses

    def _scores(self, base: Assignment, changes: Sequence[Assignment]) -> list[Score]:
        futures = [self._executor.submit(score, base, change) for change in changes]
        for _ in as_completed(futures):
            self._step()
        return [future.result() for future in futures]

    def _loss(self, found: Score) -> float:
        """Returns the relative loss: perplexity's rise, Rouge-2's fall, or the share that answers differently."""
        if self._metric == "agreement":
            return 1 - found.agreement
        if self._exact is None:
            (self._exact,) = self._scores(self.uniform(0), [{}])
        if self._metric == "rouge-2":
            assert found.rouge_2 is not None and self._exact.rouge_2 is not None
            if self._exact.rouge_2 == 0:
                raise RequestError("the model scores 0 in Rouge-2 in full precision: no loss can be measured by it")
            return 1 - found.rouge_2 / self._exact.rouge_2
        return math.exp(found.nats_per_token - self._exact.nats_per_token) - 1

    def _number(self, precision: str) -> int:
        return next(n for n, f in enumerate(self._formats) if n and f.precision == precision)

    def _step(self) -> None:
        self._done += 1
        self._progress(self._done, max(self._of, self._done))


def _lower_hull(points: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """Returns the worthwhile (bytes, loss, format), from the most bytes to the fewest: ever more loss per byte saved.

    The first stays: it is where the expert stands, even if another format loses nothing.
    """
    hull: list[tuple[int, float, int]] = []
    for point in sorted(points, key=lambda p: (-p[0], p[1])):
        if hull and point[0] == hull[-1][0]:
            continue
        while len(hull) > 1 and point[1] <= hull[-1][1]:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float, int], b: tuple[int, float, int]) -> float:
    return (b[1] - a[1]) / (a[0] - b[0])


def write_adapted(path: str, plan: BitwidthPlan, to: Path, progress: Progress = lambda done, of: None) -> Container:
    """Writes the container `to`: each expert of the one at `path` in its format of the plan. Raises ContainerError."""
    source = Container.open(path)
    used = sorted(set(plan.assignment.values()))
    experts = MixedExperts(source, plan.formats[1:])
    origin = {
        **source.origin,
        "adapted": f"{plan.method}, {plan.metric} loss {plan.loss:.4f}, calibration {plan.calibration_sha256[:16]}",
    }
    with ContainerWriter(
        str(to),
        architecture=source.architecture,
        config=source.config,
        formats=[plan.formats[n] for n in used],
        tokenizer=source.tokenizer_json(),
        origin=origin,
    ) as writer:
        for name in source.tensors:
            writer.copy_tensor(source, name)
        for done, (key, number) in enumerate(sorted(plan.assignment.items()), 1):
            writer.add_expert(*key, experts.weights(key), [used.index(number)])
            progress(done, len(plan.assignment))
    return Container.open(str(to))
