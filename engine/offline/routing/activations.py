"""Makes a model's activation profile from text: which experts its tokens activate, one after another.

What the routers chose is journaled as it comes, so that a count that was interrupted goes on where it was: a line of
JSON that says of what it is, then for each passage its routing (uint16) and a CRC-32. A torn end is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from engine.container import Container
from engine.errors import RequestError
from engine.experts.profile import PathCounter, PathProfile
from engine.offline.accuracy.model import OfflineModel
from engine.offline.accuracy.passages import DEFAULT_CONTEXT, cut, decoder_tokens
from engine.protocol import Passage


def profile_texts(
    model: OfflineModel,
    texts: Sequence[Sequence[int]],
    context: int = DEFAULT_CONTEXT,
    progress: Callable[[int, int], None] = lambda done, of: None,
    journal: Path | None = None,
) -> PathProfile:
    """Runs the model over token ids, in windows of `context`, each a sequence of its own.

    With a `journal` a count that was broken off goes on; it is removed at the end. Raises RequestError.
    """
    passages = [passage for tokens in texts for passage in cut(tokens, context, model.config)]
    if not passages:
        raise RequestError("the texts have fewer than two tokens: there is no activation path to count")
    container = model.container
    counter = PathCounter(container.moe_layers, container.experts_per_layer, model.first_layer)
    with Journal(journal, _key(container, passages)) as kept:
        for done, passage in enumerate(passages):
            progress(done, len(passages))
            tokens = decoder_tokens(passage, model.config)
            layers = container.moe_layers - model.first_layer
            routing = kept.take((len(tokens), layers, model.config.top_k), container.experts_per_layer)
            if routing is None:
                routing = model.routing(passage)
                kept.put(routing)
            counter.observe([[tuple(chosen) for chosen in token] for token in routing.tolist()], tokens)
        progress(len(passages), len(passages))
    kept.remove()
    return counter.finish()


class Journal:
    """Records the routing of one passage after another; replays what an earlier run left before adding to it.

    Without a path nothing is kept. Raises RequestError where it cannot be written.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._head = path, json.dumps({"edgemoe-profile-journal": 1, "of": key}).encode() + b"\n"
        self._file: BinaryIO | None = None

    def __enter__(self) -> Journal:
        if self._path is not None:
            try:
                self._file = self._path.open("r+b" if self._path.exists() else "w+b")
                if self._file.read(len(self._head)) != self._head:  # of something else, or new
                    self._file.seek(0)
                    self._file.truncate()
                    self._file.write(self._head)
            except OSError as error:
                raise RequestError(f"{self._path}: cannot be written: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def take(self, shape: tuple[int, int, int], experts: int) -> np.ndarray | None:
        """Returns the next passage's routing; None from the first on that is not there whole."""
        if self._file is None:
            return None
        start, size = self._file.tell(), 2 * shape[0] * shape[1] * shape[2]
        data = self._file.read(size + 4)
        if len(data) == size + 4 and zlib.crc32(data[:size]) == int.from_bytes(data[size:], "little"):
            routing = np.frombuffer(data[:size], "<u2").reshape(shape)
            if routing.max() < experts:
                return routing
        self._file.seek(start)
        self._file.truncate()
        return None

    def put(self, routing: np.ndarray) -> None:
        if self._file is None:
            return
        data = routing.astype("<u2").tobytes()
        try:
            self._file.write(data + zlib.crc32(data).to_bytes(4, "little"))
            self._file.flush()
        except OSError as error:
            raise RequestError(f"{self._path}: cannot be written: {error.strerror}") from None

    def remove(self) -> None:
        if self._path is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._path)


def _key(container: Container, passages: Sequence[Passage]) -> str:
    """Returns a key that changes with anything that the routing follows from."""
    checksums = [tensor.crc32 for tensor in container.tensors.values()] + [r.crc32 for r in container.primary.values()]
    content = [container.config, checksums, [[p.prompt, p.continuation] for p in passages]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
