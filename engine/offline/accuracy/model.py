"""Runs a container's model on the controller: logits and routing of every position, with all experts at hand.

The arithmetic is the engine's own; only the supply of experts is simpler, because nothing is measured here.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from engine.container import Container
from engine.errors import ContainerError, RequestError
from engine.files import replacing
from engine.kernels import Kernels, make_kernels
from engine.models import load_model
from engine.models.interface import ExpertGroup, ModelConfig, Observer
from engine.offline.accuracy.passages import answers, greedy, routing
from engine.protocol import Passage


class MappedExperts:
    """Maps a container's experts, which the page cache holds. Each record is checked at its first use."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._bytes: np.ndarray = np.memmap(container.path, np.uint8, "r")
        self._checked: set[int] = set()  # offsets

    def prefer(self, layer: int, logits: np.ndarray) -> np.ndarray:
        return logits

    def fetch(self, layer: int, chosen: np.ndarray, shares: np.ndarray, hidden: np.ndarray) -> Iterator[ExpertGroup]:
        """Yields experts, see engine.experts.supply.ExpertSupply.fetch. Raises ContainerError for a damaged record."""
        for expert in np.unique(chosen).tolist():
            record = self._container.primary[layer, expert]
            data = self._bytes[record.offset : record.offset + record.bytes]
            if record.offset not in self._checked:
                if zlib.crc32(data.data) != record.crc32:
                    raise ContainerError(
                        f"{self._container.path}: layer {layer} expert {expert} is damaged (checksum); copy it again"
                    )
                self._checked.add(record.offset)
            yield [(expert, self._container.layouts[record.format].unpack(data))]


class OfflineModel:
    def __init__(self, container: Container, kernels: Kernels | None = None) -> None:
        """Reads the non-experts. `kernels`: numpy's unless others are given. Raises ContainerError."""
        self.container = container
        self._model = load_model(container, kernels or Kernels())
        self._experts = MappedExperts(container)

    @classmethod
    def open(cls, path: str, kernels: Kernels | None = None) -> OfflineModel:
        return cls(Container.open(path), kernels)

    @property
    def config(self) -> ModelConfig:
        return self._model.config

    @property
    def has_encoder(self) -> bool:
        return self.config.has_encoder

    def logits(
        self, tokens: Sequence[int], decoder_tokens: Sequence[int] | None = None, *, observe: Observer | None = None
    ) -> np.ndarray:
        """Returns the logits (positions, vocab) float32 of one sequence from its start.

        A model with an encoder reads `tokens` there and answers for the positions of `decoder_tokens`, which compete
        for places with an expert as in transformers. `observe(layer, chosen)` is told what the routers chose,
        (tokens, k). Raises RequestError for a token id that the model does not have, for more positions than it knows,
        and where decoder tokens are missing or meant for another model.
        """
        self._check(tokens)
        prompt = np.asarray(tokens, np.int64)
        if self.has_encoder and decoder_tokens is None:
            raise RequestError(f"{self.container.path}: this model has a decoder of its own: give its tokens too")
        if not self.has_encoder and decoder_tokens is not None:
            raise RequestError(f"{self.container.path}: this model has no encoder; leave the decoder tokens out")
        if decoder_tokens is not None:
            self._check(decoder_tokens)
        fed = np.asarray(() if decoder_tokens is None else decoder_tokens, np.int64)
        return self._model.whole(prompt, fed, self._experts, observe=observe)

    def _check(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if not 0 <= token < self.config.vocab_size:
                raise RequestError(
                    f"token id {token} is not in the vocabulary of {self.container.path}: 0 to"
                    f" {self.config.vocab_size - 1}"
                )
        if not tokens:
            raise RequestError("no token is given: at least one is needed")

    @property
    def first_layer(self) -> int:
        """Returns the decoder's first MoE layer."""
        return self.config.first_layer

    def answers(self, passage: Passage) -> np.ndarray:
        """Returns the logits that predict each token of the continuation, (len(continuation), vocab)."""
        return answers(self._model, passage, self._experts)

    def routing(self, passage: Passage) -> np.ndarray:
        """Returns what each decoder token activates, (tokens, decoder MoE layers, k), each set ascending."""
        return routing(self._model, passage, self._experts, self.container.moe_layers)

    def generate(self, prompt: Sequence[int], most: int) -> tuple[int, ...]:
        """Returns the likeliest continuation, up to `most` tokens or the end-of-sequence token."""
        return greedy(self._model, prompt, self._experts, most)


def save_logits(path: Path, logits: np.ndarray) -> None:
    """Writes .npy, under its name only once it is whole. Raises RequestError if it cannot be written."""
    try:
        with replacing(str(path)) as file:
            np.save(file, logits, allow_pickle=False)
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextmanager
def counting_model(path: str) -> Iterator[OfflineModel]:
    """Returns a model for counting, not for exact comparison: native kernels on all cores, BLAS on one.

    On two, BLAS took four times as long for the models at hand beside any other busy process. Raises ContainerError.
    """
    with threadpool_limits(1), closing(make_kernels("auto", os.cpu_count() or 1)[0]) as kernels:
        yield OfflineModel.open(path, kernels)
