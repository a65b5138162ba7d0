"""Describes how a checkpoint becomes a container: what each architecture has to say, and config.json's keys."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from engine.errors import ContainerError
from engine.offline.importing.checkpoint import Checkpoint, CheckpointError

LARGEST = 1 << 24  # of any dimension: far above every real model, far below what could exhaust anything here

L = TypeVar("L", bound="Layout")
TensorName = tuple[str, str, tuple[int, ...]]  # in the checkpoint, in the container, shape


@dataclass(frozen=True)
class Layout(ABC):
    """Describes the tensors that a configuration implies; `config` is what the container keeps."""

    config: dict[str, Any]

    @classmethod
    def of(cls: type[L], checkpoint: Checkpoint) -> L:
        """Returns the layout. Raises CheckpointError, naming the key or tensor, for what is not such a model."""
        return cls.opened(checkpoint)[0]

    @classmethod
    def opened(cls: type[L], checkpoint: Checkpoint) -> tuple[L, Checkpoint]:
        """Returns the layout, and the checkpoint with every tensor under the name that the layout knows it by."""
        path = checkpoint.folder / "config.json"
        layout = cls(cls.read_config(ConfigKeys(checkpoint.config, str(path)), checkpoint))
        try:
            layout.check()  # what the engine would refuse is not imported
        except ContainerError as error:
            raise CheckpointError(f"{path}: {error}") from None
        checkpoint = layout.respelled(checkpoint)
        spare = []
        for copy, original in layout.copies():
            if original not in checkpoint.tensors and copy in checkpoint.tensors:
                checkpoint = checkpoint.spelled({original: checkpoint.tensors[copy]}, without=[copy])
            if copy not in checkpoint.tensors or original not in checkpoint.tensors:
                continue
            if not same(checkpoint, copy, original):
                raise CheckpointError(
                    f"{checkpoint.tensors[copy].file}: tensor {copy} differs from {original},"
                    " although config.json ties them (tie_word_embeddings)"
                )
            spare.append(copy)
        spare += [name for name in layout.unused() if name in checkpoint.tensors]
        spare += layout.implied(checkpoint)
        checkpoint.check_shapes(
            itertools.chain(layout.shapes(), ((name, checkpoint.tensors[name].shape) for name in spare))
        )
        return layout, checkpoint

    def respelled(self, checkpoint: Checkpoint) -> Checkpoint:
        """Returns the checkpoint with the names of another release of transformers as well."""
        return checkpoint

    def implied(self, checkpoint: Checkpoint) -> list[str]:
        """Returns stored tensors that say what config.json says. Raises CheckpointError where one says otherwise."""
        return []

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Returns every tensor that the checkpoint must have, with its shape."""
        for name, _, shape in self.non_experts():
            yield name, shape
        matrices = self.matrices()
        for layer, expert in self.experts():
            for matrix, name in self.expert(layer, expert).items():
                yield name, matrices[matrix]

    @classmethod
    @abstractmethod
    def read_config(cls, keys: ConfigKeys, checkpoint: Checkpoint) -> dict[str, Any]:
        """Returns the container's configuration. Raises CheckpointError, naming the key."""

    @abstractmethod
    def check(self) -> None:
        """Runs the engine's own check of the configuration. Raises ContainerError."""

    def large_matrices(self) -> Iterator[str]:
        """Returns non-experts that can be kept in INT8, by container name: read whole for every token."""
        yield from ()

    def unused(self) -> Iterator[str]:
        """Returns tensors that are stored and never used, not by transformers either."""
        yield from ()

    @abstractmethod
    def copies(self) -> Iterator[tuple[str, str]]:
        """Returns (copy, original): some writers store a tied tensor again. An equal copy is left out."""

    @abstractmethod
    def non_experts(self) -> Iterator[TensorName]: ...

    @abstractmethod
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Returns an expert's matrices, by container name, in the order in which the arithmetic consumes them."""

    @abstractmethod
    def experts(self) -> Iterator[tuple[int, int]]:
        """Yields (MoE layer, expert) in the order in which a token meets them."""

    @abstractmethod
    def expert(self, layer: int, expert: int) -> dict[str, str]:
        """Returns the checkpoint's tensor for each matrix in the container."""


def same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    return bool(np.array_equal(checkpoint.read(one), checkpoint.read(other)))


class ConfigKeys:
    """Reads config.json and checks each key as it is read."""

    def __init__(self, values: dict[str, Any], path: str) -> None:
        self.values, self.path = values, path

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def natural(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.error(key, "is missing")
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise self.error(key, f"is {value!r:.60} where a number from 1 to {LARGEST} is expected")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.get(key)
        if value not in (None, True, False):
            raise self.error(key, f"is {value!r:.60} where true or false is expected")
        return default if value is None else bool(value)

    def token_id(self, key: str, value: Any, vocab_size: int) -> int:
        if type(value) is not int or not 0 <= value < vocab_size:
            raise self.error(key, f"is {value!r:.60} where a token id below {vocab_size} is expected")
        return value

    def eos_ids(self, vocab_size: int) -> list[int]:
        eos = self.get("eos_token_id")
        return [
            self.token_id("eos_token_id", e, vocab_size)
            for e in (eos if isinstance(eos, list) else [] if eos is None else [eos])
        ]

    def positive(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.error(key, f"is {value!r:.60} where a positive number is expected")
        return float(value)

    def refuse_other_architectures(self, only: str) -> None:
        architectures = self.get("architectures")
        if architectures is not None and architectures != [only]:
            raise self.error("architectures", f"is {architectures!r:.60}: only {only} can be imported")
        if self.get("quantization_config") is not None:
            raise self.error("quantization_config", "is set: import the original, not a quantised copy")

    def error(self, key: str, complaint: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key} {complaint}")
