"""Measures a model with experts in any mixture of formats, on a calibration text, in several processes.

An assignment gives each expert the number of a format; 0 is the precision that the container stores.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.container import Container, ExpertKey
from engine.errors import ContainerError
from engine.kernels import Kernels
from engine.models import load_model
from engine.models.interface import ExpertGroup, Model
from engine.offline.accuracy.passages import greedy, rouge_2
from engine.offline.tokenizer import Tokenizer
from engine.protocol import Passage
from engine.quantize import FLOATS, Format, Packed, RecordLayout
from engine.sampling import log_probabilities

Assignment = dict[ExpertKey, int]


@dataclass(frozen=True)
class Score:
    nats_per_token: float
    agreement: float  # share of positions whose likeliest token is that of the stored precision
    divergence: float  # mean Kullback-Leibler divergence from the stored precision, nats a token
    rouge_2: float | None = None  # of what the model writes about the prompts, where that was asked for


@dataclass(frozen=True)
class Calibration:
    passages: tuple[Passage, ...]
    targets: tuple[str, ...] = ()  # of each passage, where what the model writes is to be scored in Rouge-2
    most_new: int = 64  # tokens that it may write


class MixedExperts:
    """Holds a container's experts in full precision, each in its assigned format; packed when first used."""

    def __init__(self, container: Container, formats: Sequence[Format]) -> None:
        (stored,) = {record.format for record in container.primary.values()}
        if container.formats[stored].precision not in FLOATS:
            raise ContainerError(
                f"{container.path}: its experts are in {container.formats[stored].label} already; adapt a container in "
                "the checkpoint's own precision (`edgemoe-farm model import` without --precision)"
            )
        self.container = container
        self.formats = (container.formats[stored], *formats)
        self.layouts = tuple(RecordLayout.of(f, container.layouts[stored].matrices) for f in self.formats)
        self.assignment: Assignment = dict.fromkeys(container.primary, 0)
        self._kernels = Kernels()
        self._packed: dict[tuple[ExpertKey, int], dict[str, Packed]] = {}

    def weights(self, key: ExpertKey) -> dict[str, np.ndarray]:
        """Returns float32 (rows, columns) by matrix."""
        return {name: self._kernels.expand(p)[0].T.copy() for name, p in self.packed(key, 0).items()}

    def packed(self, key: ExpertKey, number: int) -> dict[str, Packed]:
        found = self._packed.get((key, number))
        if found is None:
            layout = self.layouts[number]
            record = self.container.read_expert(self.container.primary[key]) if number == 0 else None
            if record is None:
                record = layout.pack(self.weights(key))
            found = self._packed[key, number] = layout.unpack(record)
        return found

    def prefer(self, layer: int, logits: np.ndarray) -> np.ndarray:
        return logits

    def fetch(self, layer: int, chosen: np.ndarray, shares: np.ndarray, hidden: np.ndarray) -> Iterator[ExpertGroup]:
        for expert in np.unique(chosen).tolist():
            yield [(expert, self.packed((layer, expert), self.assignment[layer, expert]))]


@dataclass
class OutputErrors:
    """Holds what other formats would change in the weighted outputs of a layer's experts, on a calibration text."""

    activations: dict[int, int]  # by expert
    errors: dict[tuple[int, int], float]  # (expert, format) -> squared, over the squared residual stream they enter


class _Watching:
    """Runs the experts as stored, and measures the output errors of one layer on the side."""

    def __init__(self, model: Model, experts: MixedExperts, watched: int) -> None:
        self._model, self._experts, self._watched = model, experts, watched
        self.found = OutputErrors({}, {})

    def prefer(self, layer: int, logits: np.ndarray) -> np.ndarray:
        return logits

    def fetch(self, layer: int, chosen: np.ndarray, shares: np.ndarray, hidden: np.ndarray) -> Iterator[ExpertGroup]:
        if layer != self._watched:
            yield from self._experts.fetch(layer, chosen, shares, hidden)
            return
        given = self._model.expert_input(layer, hidden)
        activations, errors = self.found.activations, self.found.errors
        for expert in np.unique(chosen).tolist():
            row, place = np.nonzero(chosen == expert)
            share = shares[row, place, None]
            exact = self._model.expert_output(self._experts.packed((layer, expert), 0), given[row])
            # What follows is normalised: a token of a hundred times the norm is no ten thousand times as important.
            norm = ((hidden[row] + share * exact) ** 2).sum(axis=1)
            activations[expert] = activations.get(expert, 0) + len(row)
            for number in range(1, len(self._experts.formats)):
                output = self._model.expert_output(self._experts.packed((layer, expert), number), given[row])
                error = float(((((output - exact) * share) ** 2).sum(axis=1) / norm).sum())
                errors[expert, number] = errors.get((expert, number), 0.0) + error
            yield [(expert, self._experts.packed((layer, expert), 0))]


class Measuring:
    """Measures one process's share: the model, its passages, and the streams of a base assignment between blocks.

    Assignments are measured as changes to a base: blocks before the first change are not computed again.
    """

    def __init__(self, path: str, calibration: Calibration, formats: Sequence[Format]) -> None:
        container = Container.open(path)
        self.experts = MixedExperts(container, formats)
        self._model = load_model(container, Kernels())
        self._calibration = calibration
        self._tokenizer = Tokenizer.from_container(path) if calibration.targets else None
        self._base: Assignment = {}
        self._streams: list[list[Any]] = []  # by passage, by block: what goes into it
        self._reference: list[np.ndarray] = []  # log-probabilities of the stored precision, (continuation, vocab)
        self._set_base(dict.fromkeys(container.primary, 0))
        for streams, passage in zip(self._streams, calibration.passages, strict=True):
            self._reference.append(self._log_probabilities(streams, passage, self._model.blocks - 1))

    def score(self, base: Assignment, changes: Assignment) -> Score:
        self._set_base(base)
        first = min((self._model.moe_block(layer) for layer, _ in changes), default=self._model.blocks - 1)
        self.experts.assignment = {**base, **changes}
        nats, agreed, divergence, scored = 0.0, 0, 0.0, 0
        for streams, passage, reference in zip(self._streams, self._calibration.passages, self._reference, strict=True):
            found = self._log_probabilities(streams, passage, first)
            given = np.asarray(passage.continuation)
            nats -= float(np.take_along_axis(found, given[:, None], axis=1).sum(dtype=np.float64))
            agreed += int((found.argmax(axis=1) == reference.argmax(axis=1)).sum())
            divergence += float((np.exp(reference) * (reference - found)).sum(dtype=np.float64))
            scored += len(found)
        return Score(nats / scored, agreed / scored, divergence / scored, self._rouge_2())

    def output_errors(self, layer: int) -> OutputErrors:
        self._set_base(dict.fromkeys(self.experts.assignment, 0))
        watching = _Watching(self._model, self.experts, layer)
        block = self._model.moe_block(layer)
        for streams, passage in zip(self._streams, self._calibration.passages, strict=True):
            self._model.block(block, streams[block], self._start(passage), watching)
        return watching.found

    def _start(self, passage: Passage) -> Any:
        return self._model.start(len(passage.prompt), len(passage.continuation))

    def _set_base(self, base: Assignment) -> None:
        if base == self._base:
            return
        self._base = dict(base)
        self.experts.assignment = self._base
        self._streams = []
        for passage in self._calibration.passages:
            state = self._start(passage)
            streams = [self._model.open(passage.prompt, passage.continuation[:-1])]
            for block in range(self._model.blocks - 1):
                streams.append(self._model.block(block, streams[-1], state, self.experts))
            self._streams.append(streams)

    def _log_probabilities(self, streams: list[Any], passage: Passage, first: int) -> np.ndarray:
        """Returns those of the continuation's tokens, (continuation, vocab), computed from block `first` on."""
        state, stream = self._start(passage), streams[first]
        for block in range(first, self._model.blocks):
            stream = self._model.block(block, stream, state, self.experts)
        return log_probabilities(self._model.close(stream)[-len(passage.continuation) :])

    def _rouge_2(self) -> float | None:
        if self._tokenizer is None:
            return None
        written = [
            self._tokenizer.decode(greedy(self._model, passage.prompt, self.experts, self._calibration.most_new))
            for passage in self._calibration.passages
        ]
        return rouge_2(self._calibration.targets, written)


_measuring: Measuring | None = None


def _start(path: str, calibration: Calibration, formats: Sequence[Format]) -> None:
    global _measuring
    _measuring = Measuring(path, calibration, formats)


def score(base: Assignment, changes: Assignment) -> Score:
    """Calls Measuring.score in a process of the pool."""
    assert _measuring is not None
    return _measuring.score(base, changes)


def output_errors(layer: int) -> OutputErrors:
    """Calls Measuring.output_errors in a process of the pool."""
    assert _measuring is not None
    return _measuring.output_errors(layer)


def pool(
    path: str, calibration: Calibration, formats: Sequence[Format], workers: int | None = None
) -> ProcessPoolExecutor:
    """Returns processes that measure, each with the model in its memory and one thread of BLAS."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # read when a process starts numpy: this one has its threads already
    return ProcessPoolExecutor(
        max_workers=workers or os.cpu_count() or 1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(path, calibration, formats),
    )
