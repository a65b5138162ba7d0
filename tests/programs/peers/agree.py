"""Whether both engines compute the same model: perplexity and greedy tokens."""

from __future__ import annotations

import math
from typing import Any

from engine.protocol import Passage
from tests.programs.peers.engines import Work, on_cores, ours, theirs
from tests.programs.peers.models import Pair, PeerModel
from tests.programs.peers.resident import same_tokens

CONTEXT, GREEDY_TOKENS = 64, 32
MOST_DIFFERENCE = {"int8": 0.015, "int4": 0.3}  # of perplexities; at 4.5 bits each rounds weights in its own way


def agreement(model: PeerModel, pair: Pair, tokens: tuple[int, ...]) -> dict[str, Any]:
    """Predicts those of a text's `tokens` after the first CONTEXT, one pass each as in decoding."""
    passage = Passage(tokens[:CONTEXT], tokens[CONTEXT:])
    work = Work(tokens[:CONTEXT], GREEDY_TOKENS, 1, passage)
    mine = ours(model.container(pair.ours), work, on_cores(1))
    other = theirs(model.gguf(pair.theirs), work, on_cores(1))
    assert mine.nats is not None and other.nats is not None
    count = len(passage.continuation)
    difference = math.expm1((mine.nats - other.nats) / count)
    return {
        "model": model.name,
        "pair": pair.name,
        "tokens": count,
        "ours_perplexity": math.exp(mine.nats / count),
        "theirs_perplexity": math.exp(other.nats / count),
        "difference": difference,
        "agree": abs(difference) <= MOST_DIFFERENCE[pair.ours],
        "same_tokens": same_tokens(mine.tokens, other.tokens),
        "of_greedy_tokens": GREEDY_TOKENS,
    }
