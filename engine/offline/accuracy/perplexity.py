"""Measures how well a model predicts a text, and how much it agrees with another one on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.errors import RequestError
from engine.models.interface import ModelConfig
from engine.offline.accuracy.passages import DEFAULT_CONTEXT, cut
from engine.protocol import Passage
from engine.sampling import log_probabilities


class LanguageModel(Protocol):
    @property
    def config(self) -> ModelConfig: ...

    def answers(self, passage: Passage) -> np.ndarray:
        """Returns the logits that predict each token of the continuation, (len(continuation), vocab)."""
        ...


@dataclass(frozen=True)
class Perplexity:
    context: int | None  # None: the text was not cut into windows
    tokens: int  # of the text
    scored_tokens: int  # those of prompts, and the first of each window, are not predicted from anything
    text_bytes: int
    nats_per_token: float
    top1_accuracy: float  # share of scored tokens that the model holds likeliest
    top1_agreement: float | None  # share of them on whose likeliest token the reference agrees
    divergence_nats: float | None  # mean Kullback-Leibler divergence from the reference, a token

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Returns a token's nats over a token's mean length in bits a byte: comparable between tokenizers."""
        return self.nats_per_token / math.log(2) * self.tokens / self.text_bytes


def evaluate(
    model: LanguageModel,
    tokens: Sequence[int],
    text_bytes: int,
    context: int = DEFAULT_CONTEXT,
    progress: Callable[[int, int], None] = lambda done, of: None,
    reference: LanguageModel | None = None,
) -> Perplexity:
    """Returns perplexity over windows of `context` tokens. Raises RequestError for fewer than two tokens."""
    passages = cut(tokens, context, model.config)
    if not passages:
        raise RequestError("the text has fewer than two tokens: nothing can be predicted")
    return evaluate_passages(model, passages, len(tokens), text_bytes, context, progress, reference)


def evaluate_passages(
    model: LanguageModel,
    passages: Sequence[Passage],
    tokens: int,
    text_bytes: int,
    context: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    reference: LanguageModel | None = None,
) -> Perplexity:
    """Returns perplexity and agreement. `tokens` and `text_bytes` are the whole text's.

    Raises RequestError for a reference with another vocabulary.
    """
    if reference is not None and reference.config.vocab_size != model.config.vocab_size:
        raise RequestError(
            f"the reference has a vocabulary of {reference.config.vocab_size} tokens, the model one of "
            f"{model.config.vocab_size}: only models with the same tokenizer can agree"
        )
    nats, right, agreed, divergence, scored = 0.0, 0, 0, 0.0, 0
    for done, passage in enumerate(passages):
        progress(done, len(passages))
        found = log_probabilities(model.answers(passage).astype(np.float64))  # (n, vocab)
        given = np.asarray(passage.continuation)
        likeliest = found.argmax(axis=1)
        nats -= float(np.take_along_axis(found, given[:, None], axis=1).sum())
        right += int((likeliest == given).sum())
        scored += len(given)
        if reference is not None:
            expected = log_probabilities(reference.answers(passage).astype(np.float64))
            agreed += int((likeliest == expected.argmax(axis=1)).sum())
            divergence += float((np.exp(expected) * (expected - found)).sum())
    progress(len(passages), len(passages))
    return Perplexity(
        context, tokens, scored, text_bytes, nats / scored, right / scored,
        None if reference is None else agreed / scored, None if reference is None else divergence / scored,
    )  # fmt: skip
