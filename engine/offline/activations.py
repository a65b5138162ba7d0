"""The activation profile of a model, from text: which experts its tokens activate, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.errors import RequestError
from engine.experts.profile import PathCounter, PathProfile
from engine.offline.model import OfflineModel
from engine.offline.perplexity import DEFAULT_CONTEXT, windows


def profile_texts(
    model: OfflineModel,
    texts: Sequence[Sequence[int]],
    context: int = DEFAULT_CONTEXT,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> PathProfile:
    """Runs the model over token ids, in windows of `context`, each a sequence of its own."""
    cut = [window for tokens in texts for window in windows(tokens, context)]
    if not cut:
        raise RequestError("the texts have fewer than two tokens: there is no activation path to count")
    counter = PathCounter(model.container.moe_layers, model.config.experts)
    for done, window in enumerate(cut):
        progress(done, len(cut))
        by_token = model.routing(window).transpose(1, 0, 2)  # (positions, layers, k)
        counter.observe([[tuple(chosen) for chosen in token] for token in by_token.tolist()], window)
    progress(len(cut), len(cut))
    return counter.finish()
