"""How well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.errors import RequestError

DEFAULT_CONTEXT = 256


class LanguageModel(Protocol):
    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """One sequence from its start -> (positions, vocab) float32."""
        ...


@dataclass(frozen=True)
class Perplexity:
    context: int
    tokens: int  # of the text
    scored_tokens: int  # the first of each window has nothing to be predicted from
    text_bytes: int
    nats_per_token: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers: a token's nats over a token's mean length."""
        return self.nats_per_token / math.log(2) * self.tokens / self.text_bytes


def windows(tokens: Sequence[int], context: int) -> list[Sequence[int]]:
    """Without overlap, the last one shorter; one of a single token has nothing to predict and is left out."""
    if context < 2:
        raise RequestError(f"a context of {context} tokens predicts nothing: use 2 or more")
    cut = [tokens[start : start + context] for start in range(0, len(tokens), context)]
    return [window for window in cut if len(window) > 1]


def evaluate(
    model: LanguageModel,
    tokens: Sequence[int],
    text_bytes: int,
    context: int = DEFAULT_CONTEXT,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Perplexity:
    """Perplexity over windows of `context` tokens. Raises RequestError for fewer than two tokens."""
    cut = windows(tokens, context)
    if not cut:
        raise RequestError("the text has fewer than two tokens: nothing can be predicted")
    nats, scored = 0.0, 0
    for done, window in enumerate(cut):
        progress(done, len(cut))
        logits = model.logits(window)[:-1].astype(np.float64)  # (positions - 1, vocab)
        logits -= logits.max(axis=1, keepdims=True)
        given = np.take_along_axis(logits, np.asarray(window[1:])[:, None], axis=1)[:, 0]
        nats += float((np.log(np.exp(logits).sum(axis=1)) - given).sum())
        scored += len(window) - 1
    progress(len(cut), len(cut))
    return Perplexity(context, len(tokens), scored, text_bytes, nats / scored)
