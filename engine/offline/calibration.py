"""Measures a model whose experts stand in any mixture of formats, on a calibration text, in several processes.

An assignment gives each expert the number of a format; 0 is the precision that the container stores.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from engine.container import Container, ExpertKey
from engine.errors import ContainerError
from engine.kernels import Kernels
from engine.models.mixtral import Mixtral
from engine.quantize import FLOATS, Format, Packed, RecordLayout

Assignment = dict[ExpertKey, int]


@dataclass(frozen=True)
class Score:
    nats_per_token: float
    agreement: float  # share of positions whose likeliest token is that of the stored precision
    divergence: float  # mean Kullback-Leibler divergence from the stored precision, nats a token


class MixedExperts:
    """The experts of a container in full precision, each in the format of an assignment; packed when first used."""

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
        """float32 (rows, columns) by matrix."""
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

    def fetch(
        self, layer: int, chosen: np.ndarray, shares: np.ndarray, hidden: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Packed]]]:
        for expert in np.unique(chosen).tolist():
            yield expert, self.packed((layer, expert), self.assignment[layer, expert])


class _OutputErrors:
    """Beside running the experts as stored, adds up what other formats would change in their outputs."""

    def __init__(self, model: Mixtral, experts: MixedExperts) -> None:
        self._model, self._experts, self._kernels = model, experts, Kernels()
        self.errors: dict[tuple[int, int], float] = {}  # (expert, format) -> squared error of its weighted outputs

    def prefer(self, layer: int, logits: np.ndarray) -> np.ndarray:
        return logits

    def fetch(
        self, layer: int, chosen: np.ndarray, shares: np.ndarray, hidden: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Packed]]]:
        given = self._model.expert_input(layer, hidden)
        for expert in np.unique(chosen).tolist():
            row, place = np.nonzero(chosen == expert)
            share = shares[row, place, None]
            exact = self._kernels.swiglu(self._experts.packed((layer, expert), 0), given[row])
            for number in range(1, len(self._experts.formats)):
                output = self._kernels.swiglu(self._experts.packed((layer, expert), number), given[row])
                error = float((((output - exact) * share) ** 2).sum())
                self.errors[expert, number] = self.errors.get((expert, number), 0.0) + error
            yield expert, self._experts.packed((layer, expert), 0)


class Measuring:
    """One process's share: the model, its windows of text, and the residual streams of a base assignment.

    Assignments are measured as changes to a base: layers before the first change are not computed again.
    """

    def __init__(self, path: str, windows: Sequence[Sequence[int]], formats: Sequence[Format]) -> None:
        container = Container.open(path)
        self.experts = MixedExperts(container, formats)
        self._model = Mixtral.load(container, Kernels())
        self._windows = [np.asarray(window) for window in windows]
        self._base: Assignment = {}
        self._streams: list[list[np.ndarray]] = []  # by window, by layer: what goes into it
        self._reference: list[np.ndarray] = []  # log-probabilities of the stored precision, (positions - 1, vocab)
        stored: Assignment = dict.fromkeys(container.primary, 0)
        self._set_base(stored)
        for streams, window in zip(self._streams, self._windows, strict=True):
            self._reference.append(self._log_probabilities(streams, window, self._model.config.layers - 1))

    def score(self, base: Assignment, changes: Assignment) -> Score:
        self._set_base(base)
        first = min((layer for layer, _ in changes), default=self._model.config.layers - 1)
        self.experts.assignment = {**base, **changes}
        nats, agreed, divergence, scored = 0.0, 0, 0.0, 0
        for streams, window, reference in zip(self._streams, self._windows, self._reference, strict=True):
            found = self._log_probabilities(streams, window, first)
            nats -= float(np.take_along_axis(found, window[1:, None], axis=1).sum(dtype=np.float64))
            agreed += int((found.argmax(axis=1) == reference.argmax(axis=1)).sum())
            divergence += float((np.exp(reference) * (reference - found)).sum(dtype=np.float64))
            scored += len(found)
        return Score(nats / scored, agreed / scored, divergence / scored)

    def output_errors(self, layer: int) -> dict[tuple[int, int], float]:
        """(expert, format) -> squared error that the format causes in the outputs of that expert of `layer`."""
        stored = dict.fromkeys(self.experts.assignment, 0)
        self._set_base(stored)
        watching = _OutputErrors(self._model, self.experts)
        for streams in self._streams:
            state = self._model.start(len(streams[layer]))
            self._model.layer(layer, streams[layer], state, watching)
        return watching.errors

    def _set_base(self, base: Assignment) -> None:
        if base == self._base:
            return
        self._base = dict(base)
        self.experts.assignment = self._base
        self._streams = []
        for window in self._windows:
            state = self._model.start(len(window))
            streams = [self._model.embed(window)]
            for layer in range(self._model.config.layers - 1):
                streams.append(self._model.layer(layer, streams[-1], state, self.experts))
            self._streams.append(streams)

    def _log_probabilities(self, streams: list[np.ndarray], window: np.ndarray, first: int) -> np.ndarray:
        """Of the tokens after each but the last, (positions - 1, vocab), computed from layer `first` on."""
        state, x = self._model.start(len(window)), streams[first]
        for layer in range(first, self._model.config.layers):
            x = self._model.layer(layer, x, state, self.experts)
        logits = self._model.head(x[:-1])
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits


_measuring: Measuring | None = None


def _start(path: str, windows: Sequence[Sequence[int]], formats: Sequence[Format]) -> None:
    global _measuring
    _measuring = Measuring(path, windows, formats)


def score(base: Assignment, changes: Assignment) -> Score:
    """In a process of the pool; see Measuring.score."""
    assert _measuring is not None
    return _measuring.score(base, changes)


def output_errors(layer: int) -> dict[tuple[int, int], float]:
    """In a process of the pool; see Measuring.output_errors."""
    assert _measuring is not None
    return _measuring.output_errors(layer)


def pool(
    path: str, windows: Sequence[Sequence[int]], formats: Sequence[Format], workers: int | None = None
) -> ProcessPoolExecutor:
    """Processes that measure, each with the model in its memory and one thread of BLAS."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # read when a process starts numpy: this one has its threads already
    return ProcessPoolExecutor(
        max_workers=workers or os.cpu_count() or 1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(path, windows, formats),
    )
