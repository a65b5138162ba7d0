"""Measures what lossy strategies lose on a container; it depends on container, budget and text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.errors import RequestError
from engine.offline.accuracy.decoding import DecodingModel
from engine.offline.accuracy.model import OfflineModel
from engine.offline.accuracy.passages import DEFAULT_CONTEXT
from engine.offline.accuracy.perplexity import evaluate
from engine.protocol import ExpertBudget
from engine.strategies import STRATEGIES


@dataclass(frozen=True)
class MeasuredLoss:
    """Holds what a lossy strategy loses on a text against the same container without loss; None if it cannot run."""

    perplexity: float | None
    perplexity_rise: float | None  # relative
    scored_tokens: int
    unfit: str = ""  # why it cannot run


def measured_losses(
    container: str,
    tokens: Sequence[int],
    text_bytes: int,
    *,
    expert_budget: ExpertBudget | None = None,
    profile: str | None = None,
    context: int = DEFAULT_CONTEXT,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, MeasuredLoss]:
    """Returns the loss of every lossy strategy, by name. Raises RequestError for fewer than two tokens."""
    exact = evaluate(OfflineModel.open(container), tokens, text_bytes, context)
    lossy = [strategy for strategy in STRATEGIES.values() if not strategy.lossless]
    losses = {}
    for nth, strategy in enumerate(lossy):
        budget = expert_budget if strategy.has_budget else None
        try:
            model = DecodingModel(container, strategy.name, expert_budget=budget, profile=profile)
        except RequestError as error:
            losses[strategy.name] = MeasuredLoss(None, None, 0, str(error))
            continue
        with model:
            found = evaluate(
                model, tokens, text_bytes, context,
                lambda done, of, before=nth: progress(before * of + done, len(lossy) * of),  # type: ignore[misc]
            )  # fmt: skip
        rise = found.perplexity / exact.perplexity - 1
        losses[strategy.name] = MeasuredLoss(found.perplexity, rise, found.scored_tokens)
    return losses
