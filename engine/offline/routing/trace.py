"""Holds a router trace: which experts a text activated, token by token, and what looking ahead predicted.

The file is a zip of .npy arrays without pickles (numpy reads it as .npz), uncompressed: `meta` (JSON as uint8),
`tokens`, `starts`, `chosen`, `ahead`. History of VERSION: 1 first.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.container import Container
from engine.errors import ContainerError, RequestError
from engine.files import replacing
from engine.kernels import Kernels
from engine.models import load_model
from engine.models.interface import ExpertGroup
from engine.offline.accuracy.model import MappedExperts
from engine.offline.accuracy.passages import DEFAULT_CONTEXT, cut, decoder_tokens, routing

SCHEMA = "edgemoe-trace"
VERSION = 1
MAX_FILE_BYTES = 1 << 30
AHEAD = 8  # of the ranking by the next layer's router, so many are kept

_TYPES = {"meta": "|u1", "tokens": "<i4", "starts": "<i4", "chosen": "<u2", "ahead": "<u2"}


@dataclass(frozen=True, eq=False)
class Trace:
    """Holds choices of `experts` in each of `layers` MoE layers, without those of an encoder, before `first_layer`."""

    container: str  # its name, bytes and number of experts: where the trace is from
    layers: int
    experts: int
    first_layer: int
    tokens: np.ndarray  # (n,) int32, the windows one after another
    starts: np.ndarray  # (windows,) int32: the first token of each window
    chosen: np.ndarray  # (n, decoder layers, k) uint16, the router's order
    ahead: np.ndarray  # (n, decoder layers - 1, a) uint16: [t, i] ranks the layer after the i-th by its own router

    @property
    def top_k(self) -> int:
        return int(self.chosen.shape[2])

    def save(self, path: str) -> None:
        """Writes the trace atomically."""
        meta = {
            "schema": SCHEMA, "version": VERSION, "container": self.container, "layers": self.layers,
            "experts": self.experts, "first_layer": self.first_layer,
        }  # fmt: skip
        arrays = {name: getattr(self, name).astype(kind) for name, kind in _TYPES.items() if name != "meta"}
        try:
            with replacing(path) as file:
                np.savez(file, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
        except OSError as error:
            raise ContainerError(f"{path}: the trace cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, path: str) -> Trace:
        """Reads a trace. Raises ContainerError, which names the file, unless the trace is sound."""
        try:
            if Path(path).stat().st_size > MAX_FILE_BYTES:
                raise ContainerError(f"{path}: larger than a trace can be")
            with zipfile.ZipFile(path) as archive:
                arrays = {name: _read_array(archive, name) for name in _TYPES}
            return cls._parse(arrays)
        except OSError as error:
            raise ContainerError(f"{path}: cannot be opened: {error.strerror}") from None
        except (
            KeyError, TypeError, ValueError, RecursionError, EOFError, NotImplementedError, zipfile.BadZipFile
        ) as error:  # fmt: skip
            raise ContainerError(
                f"{path}: not a sound trace ({type(error).__name__}: {str(error)[:120]}); make it again with "
                "`edgemoe-farm model trace`"
            ) from None

    @classmethod
    def _parse(cls, arrays: dict[str, np.ndarray]) -> Trace:
        meta: Any = json.loads(arrays.pop("meta").tobytes())
        if meta["schema"] != SCHEMA or meta["version"] != VERSION:
            raise ValueError(f"schema {meta['schema']!r} version {meta['version']!r}, not {SCHEMA} {VERSION}")
        numbers = [meta[key] for key in ("layers", "experts", "first_layer")]
        if any(type(number) is not int for number in numbers):
            raise ValueError("layers, experts and first_layer are integers")
        layers, experts, first_layer = numbers
        trace = cls(str(meta["container"])[:200], layers, experts, first_layer, **arrays)
        n, top_k = len(trace.tokens), trace.chosen.shape[-1]
        if not (1 <= layers <= 1 << 12 and 1 <= experts <= 1 << 14 and 0 <= first_layer < layers and n):
            raise ValueError("layers, experts or tokens out of range")
        if (
            trace.tokens.shape != (n,)
            or trace.chosen.shape != (n, layers - first_layer, top_k)
            or not 1 <= top_k <= experts
        ):
            raise ValueError("tokens and chosen do not go together")
        if trace.ahead.shape != (n, layers - first_layer - 1, min(AHEAD, experts)):
            raise ValueError("ahead does not go with chosen")
        if trace.chosen.max() >= experts or (trace.ahead.size and trace.ahead.max() >= experts):
            raise ValueError(f"an expert outside 0 .. {experts - 1}")
        if top_k > 1 and not np.diff(np.sort(trace.chosen, axis=2).astype(np.int32), axis=2).all():
            raise ValueError("an expert is chosen twice for one token")
        starts = trace.starts
        if starts.ndim != 1 or not len(starts) or starts[0] != 0 or starts[-1] >= n or (np.diff(starts) <= 0).any():
            raise ValueError("starts are not those of windows")
        return trace


def record_trace(
    container: Container,
    tokens: Sequence[int],
    context: int = DEFAULT_CONTEXT,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Trace:
    """Runs the model over token ids, in windows of `context`. Raises RequestError for fewer than two tokens."""
    model = load_model(container, Kernels())
    passages = cut(tokens, context, model.config)
    if not passages:
        raise RequestError("the text has fewer than two tokens: there is nothing to trace")
    layers, first_layer = container.moe_layers, model.config.first_layer
    recorder = _Recorder(MappedExperts(container), model.preview_router, layers, first_layer)
    fed = []
    for done, passage in enumerate(passages):
        progress(done, len(passages))
        routing(model, passage, recorder, layers)
        fed.append(np.array(decoder_tokens(passage, model.config), np.int32))
    progress(len(passages), len(passages))
    n = sum(map(len, fed))
    ahead = [np.concatenate(rows) for rows in recorder.ahead[first_layer:-1]]
    return Trace(
        f"{Path(container.path).name}, {container.file_bytes} bytes",
        layers,
        container.experts_per_layer,
        first_layer,
        np.concatenate(fed),
        np.cumsum([0] + [len(tokens) for tokens in fed[:-1]]).astype(np.int32),
        np.stack([np.concatenate(rows) for rows in recorder.chosen[first_layer:]], axis=1),
        np.stack(ahead, axis=1) if ahead else np.empty((n, 0, min(AHEAD, container.experts_per_layer)), np.uint16),
    )


class _Recorder:
    """Gives a model its experts, and records what was asked of them."""

    def __init__(
        self,
        experts: MappedExperts,
        preview_router: Callable[[int, np.ndarray], np.ndarray],
        layers: int,
        first_layer: int,
    ) -> None:
        self._experts, self._preview_router = experts, preview_router
        self._layers, self._first_layer = layers, first_layer
        self.chosen: list[list[np.ndarray]] = [[] for _ in range(layers)]  # by layer: (tokens, k) each
        self.ahead: list[list[np.ndarray]] = [[] for _ in range(layers)]  # by layer: (tokens, a) each

    def prefer(self, layer: int, logits: np.ndarray) -> np.ndarray:
        return logits

    def fetch(self, layer: int, chosen: np.ndarray, shares: np.ndarray, hidden: np.ndarray) -> Iterator[ExpertGroup]:
        self.chosen[layer].append(chosen.astype(np.uint16))
        if self._first_layer <= layer < self._layers - 1:
            logits = np.stack([self._preview_router(layer + 1, row) for row in hidden])  # (tokens, experts)
            self.ahead[layer].append(np.argsort(-logits, axis=1, kind="stable")[:, :AHEAD].astype(np.uint16))
        return self._experts.fetch(layer, chosen, shares, hidden)


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Returns a member of the archive whose header promises no more than its bytes hold."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > MAX_FILE_BYTES:
        raise ValueError(f"{name} is compressed or too large")
    data = archive.read(info)
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{name} is not an array of version 1.0")
    shape, fortran, kind = np.lib.format.read_array_header_1_0(file)
    if kind.str != _TYPES[name] or fortran or min(shape, default=0) < 0:
        raise ValueError(f"{name} has type {kind.str} and shape {str(shape)[:40]}")
    size = 1
    for length in shape:
        size *= length
    if size * kind.itemsize != len(data) - file.tell():
        raise ValueError(f"{name} is not as long as its shape says")
    return np.frombuffer(data, kind, offset=file.tell()).reshape(shape)
