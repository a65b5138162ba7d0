"""A container's model on the controller: every position's logits and routing, with all experts at hand.

The arithmetic is the engine's own; only the supply of experts is simpler, because nothing is measured here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from engine.container import Container
from engine.errors import ContainerError, RequestError
from engine.files import replacing
from engine.kernels import Kernels
from engine.models import load_model
from engine.models.mixtral import MixtralConfig
from engine.quantize import Packed

Observer = Callable[[int, np.ndarray], None]


class MappedExperts:
    """Experts out of a mapping of the container: the page cache holds them. Each record is checked at its first use."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._bytes: np.ndarray = np.memmap(container.path, np.uint8, "r")
        self._checked: set[int] = set()  # offsets

    def prefer(self, layer: int, logits: np.ndarray) -> np.ndarray:
        return logits

    def fetch(
        self, layer: int, chosen: np.ndarray, shares: np.ndarray, hidden: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Packed]]]:
        """See engine.experts.supply.ExpertSupply.fetch. Raises ContainerError for a damaged record."""
        for expert in np.unique(chosen).tolist():
            record = self._container.primary[layer, expert]
            data = self._bytes[record.offset : record.offset + record.bytes]
            if record.offset not in self._checked:
                if zlib.crc32(data.data) != record.crc32:
                    raise ContainerError(
                        f"{self._container.path}: layer {layer} expert {expert} is damaged (checksum); copy it again"
                    )
                self._checked.add(record.offset)
            yield expert, self._container.layouts[record.format].unpack(data)


class OfflineModel:
    def __init__(self, container: Container) -> None:
        """Reads the non-experts. Raises ContainerError."""
        self.container = container
        self._model = load_model(container, Kernels())
        self._experts = MappedExperts(container)

    @classmethod
    def open(cls, path: str) -> OfflineModel:
        return cls(Container.open(path))

    @property
    def config(self) -> MixtralConfig:
        return self._model.config

    def logits(self, tokens: Sequence[int], observe: Observer | None = None) -> np.ndarray:
        """One sequence from its start -> (positions, vocab) float32.

        `observe(layer, chosen)` is told what the routers chose, (tokens, k). Raises RequestError for a token id that
        the model does not have, or more positions than it knows.
        """
        for token in tokens:
            if not 0 <= token < self.config.vocab_size:
                raise RequestError(
                    f"token id {token} is not in the vocabulary of {self.container.path}: 0 to"
                    f" {self.config.vocab_size - 1}"
                )
        if not tokens:
            raise RequestError("no token is given: at least one is needed")
        state = self._model.start(len(tokens))
        return self._model.forward(
            np.asarray(tokens, np.int64), state, self._experts, every_position=True, observe=observe
        )

    def routing(self, tokens: Sequence[int]) -> np.ndarray:
        """Which experts each token activates, (layers, positions, k), each set ascending."""
        seen: list[list[np.ndarray]] = [[] for _ in range(self.config.layers)]
        self.logits(tokens, lambda layer, chosen: seen[layer].append(chosen))
        return np.sort(np.stack([np.concatenate(chunks) for chunks in seen]), axis=-1)


def save_logits(path: Path, logits: np.ndarray) -> None:
    """As .npy, under its name only once it is whole. Raises RequestError where it cannot be written."""
    try:
        with replacing(str(path)) as file:
            np.save(file, logits, allow_pickle=False)
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from None
