"""Turns text into token ids and back, with the `tokenizers` library, on the controller only: devices get ids."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

from engine.container import Container
from engine.errors import ContainerError, RequestError


class Tokenizer:
    """Wraps a container's tokenizer.json, as its model was trained with it (special tokens by its template)."""

    def __init__(self, tokenizer_json: bytes, source: str) -> None:
        """Loads a tokenizer. Raises ContainerError, naming `source`, for what the library does not read."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except ValueError as error:
            raise ContainerError(f"{source}: its tokenizer cannot be read: {str(error)[:200]}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @classmethod
    def from_container(cls, path: str) -> Tokenizer:
        """Returns the container's tokenizer. Raises RequestError if it holds none."""
        tokenizer = cls.find(path)
        if tokenizer is None:
            raise RequestError(
                f"{path}: it holds no tokenizer: import the model with its tokenizer.json beside config.json,"
                " or give token ids"
            )
        return tokenizer

    @classmethod
    def find(cls, path: str) -> Tokenizer | None:
        """Returns the container's tokenizer; None if it holds none."""
        text = Container.open(path).tokenizer_json()
        return None if text is None else cls(text, path)

    @property
    def largest_id(self) -> int:
        """Returns the largest id of its tokens; -1 if it has none. Ids may have gaps."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a command line with bytes that are not UTF-8
            raise RequestError(f"the text is not Unicode at character {error.start}: write it in UTF-8") from None
        return tuple(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text, without special tokens and without ids that have no token."""
        return str(self._tokenizer.decode(list(ids)))
