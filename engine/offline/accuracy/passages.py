"""Cuts text into what models are asked: a prompt, and the continuation to predict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import RequestError
from engine.files import read_bounded
from engine.models.interface import Experts, Model, ModelConfig, Observer
from engine.offline.tokenizer import Tokenizer
from engine.protocol import Passage

DEFAULT_CONTEXT = 256
_MOST_PAIRS_BYTES = 1 << 30
_KEYS = (("input", "target"), ("document", "summary"), ("dialogue", "summary"))  # the latter: XSum's and SAMSum's own


@dataclass(frozen=True)
class TextPair:
    """Holds a text and what is to be written about it, such as a document and its summary."""

    text: str
    target: str


def cut(tokens: Sequence[int], context: int, config: ModelConfig) -> list[Passage]:
    """Returns windows of `context` tokens without overlap, the last one shorter; a single token predicts nothing.

    A window's first token is the prompt of the others; for a model with an encoder, its first half is.
    """
    if context < 2:
        raise RequestError(f"a context of {context} tokens predicts nothing: use 2 or more")
    windows = [tuple(tokens[start : start + context]) for start in range(0, len(tokens), context)]
    return [
        Passage(window[:split], window[split:])
        for window in windows
        if len(window) > 1
        for split in [1 if config.decoder_start_id is None else len(window) // 2]
    ]


def decoder_tokens(passage: Passage, config: ModelConfig) -> tuple[int, ...]:
    """Returns all tokens that pass the decoder, if the continuation's last one does too."""
    if config.decoder_start_id is None:
        return passage.prompt + passage.continuation
    return (config.decoder_start_id, *passage.continuation)


def read_pairs(path: Path) -> list[TextPair]:
    """Reads JSON lines with `input` and `target`, or as XSum and SAMSum name them. Raises RequestError, naming it."""
    try:
        lines = read_bounded(str(path), _MOST_PAIRS_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError):
            raise RequestError(f"{path}: line {number} is not JSON") from None
        found = [
            (value[text], value[target])
            for text, target in _KEYS
            if isinstance(value, dict) and isinstance(value.get(text), str) and isinstance(value.get(target), str)
        ]
        if not found or not all(found[0]):
            raise RequestError(f'{path}: line {number} has no text under "input" and "target"')
        pairs.append(TextPair(*found[0]))
    if not pairs:
        raise RequestError(f"{path}: it holds no pairs: write one JSON object a line")
    return pairs


def passages_of(pairs: Sequence[TextPair], tokenizer: Tokenizer) -> list[Passage]:
    """Returns the passages of texts. Raises RequestError for a text without tokens."""
    passages = []
    for number, pair in enumerate(pairs, 1):
        prompt, continuation = tokenizer.encode(pair.text), tokenizer.encode(pair.target)
        if not (prompt and continuation):
            raise RequestError(f"pair {number} has a text without tokens")
        passages.append(Passage(prompt, continuation))
    return passages


def answers(model: Model, passage: Passage, experts: Experts, observe: Observer | None = None) -> np.ndarray:
    """Returns the logits that predict each token of the continuation, (len(continuation), vocab).

    Raises RequestError for a token id that the model does not have, or more positions than it knows.
    """
    state = model.start(len(passage.prompt), len(passage.continuation))
    rows = [model.prefill(np.asarray(passage.prompt, np.int64), state, experts, observe=observe)]
    if len(passage.continuation) > 1:
        fed = np.asarray(passage.continuation[:-1], np.int64)
        rows.append(model.forward(fed, state, experts, every_position=True, observe=observe))
    return np.concatenate(rows)


def routing(model: Model, passage: Passage, experts: Experts, layers: int) -> np.ndarray:
    """Returns what each decoder token activates, the last too, (tokens, decoder MoE layers, k), each set ascending."""
    seen: list[list[np.ndarray]] = [[] for _ in range(layers)]
    beside_encoder = model.config.decoder_start_id is not None  # then there is a token before the continuation
    state = model.start(len(passage.prompt), len(passage.continuation) + beside_encoder)

    def observe(layer: int, chosen: np.ndarray) -> None:
        seen[layer].append(chosen)

    model.prefill(np.asarray(passage.prompt, np.int64), state, experts, observe=observe)
    model.forward(np.asarray(passage.continuation, np.int64), state, experts, observe=observe)
    by_layer = [np.concatenate(chunks) for chunks in seen[model.config.first_layer :]]
    return np.sort(np.stack(by_layer, axis=1), axis=-1)


def greedy(model: Model, prompt: Sequence[int], experts: Experts, most: int) -> tuple[int, ...]:
    """Returns the likeliest continuation, token by token, up to `most` tokens or the end-of-sequence token."""
    state = model.start(len(prompt), most)
    logits = model.prefill(np.asarray(prompt, np.int64), state, experts)
    tokens = [int(logits[0].argmax())]
    while len(tokens) < most and tokens[-1] not in model.config.eos_ids:
        logits = model.forward(np.array(tokens[-1:]), state, experts)
        tokens.append(int(logits[0].argmax()))
    return tuple(tokens)


def rouge_2(targets: Sequence[str], written: Sequence[str]) -> float:
    """Returns the mean F-measure of shared pairs of words (Lin, 2004), stemmed, by the rouge-score package."""
    from rouge_score.rouge_scorer import RougeScorer  # half a second: only where it is asked for

    scorer = RougeScorer(["rouge2"], use_stemmer=True)
    scores = [scorer.score(target, text)["rouge2"].fmeasure for target, text in zip(targets, written, strict=True)]
    return float(np.mean(scores))
