"""Defines what the rest of the engine knows of a model, whatever its architecture.

MoE layers are numbered in the order in which a token meets them; where there is an encoder, its layers come first.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, List, Optional, Protocol, Tuple

import numpy as np

from engine.errors import NumberError, RequestError
from engine.quantize import Packed

ExpertGroup = List[Tuple[int, Dict[str, Packed]]]  # experts of a layer that can be computed now, and their weights
Observer = Callable[[int, np.ndarray], None]  # (MoE layer, what its router chose (tokens, k))


class Experts(Protocol):
    """Gives a MoE layer its experts: see engine.experts.supply.ExpertSupply."""

    def prefer(self, layer: int, logits: np.ndarray) -> np.ndarray: ...

    def fetch(
        self, layer: int, chosen: np.ndarray, shares: np.ndarray, hidden: np.ndarray
    ) -> Iterator[ExpertGroup]: ...


class ModelConfig(Protocol):
    """Defines what the configurations of all architectures have."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def layers(self) -> int: ...  # of all stacks, with experts and without
    @property
    def experts(self) -> int: ...  # in a MoE layer
    @property
    def top_k(self) -> int: ...
    @property
    def first_layer(self) -> int: ...  # the MoE layer with which each decoded token begins: how many the encoder has
    @property
    def has_encoder(self) -> bool: ...
    @property
    def decoder_start_id(self) -> Optional[int]: ...  # what a decoder beside an encoder begins with; None without one
    @property
    def eos_ids(self) -> Tuple[int, ...]: ...

    def state_bytes(self, positions: int) -> int:
        """Returns the bytes of keys and values, in float32, for a sequence of so many positions."""
        ...


class Model(Protocol):
    """Computes with non-experts in memory; an `Experts` brings those routed to. All arithmetic is float32."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def weight_bytes(self) -> int:
        """Returns the bytes of the non-experts in memory."""
        ...

    def start(self, prompt_tokens: int, new_tokens: int = 0) -> Any:
        """Returns a state for one sequence. Raises RequestError for more positions than the model has."""
        ...

    def prefill(
        self, prompt: np.ndarray, state: Any, experts: Experts, *, observe: Optional[Observer] = None
    ) -> np.ndarray:
        """Returns the logits (1, vocab) of the first new token, for a prompt (n,) int, given once and first."""
        ...

    def forward(
        self,
        tokens: np.ndarray,
        state: Any,
        experts: Experts,
        *,
        every_position: bool = False,
        observe: Optional[Observer] = None,
    ) -> np.ndarray:
        """Returns the logits (1, vocab) after the last of the decoder tokens (n,) int, or (n, vocab).

        The state moves on by n.
        """
        ...

    def whole(
        self, prompt: np.ndarray, fed: np.ndarray, experts: Experts, *, observe: Optional[Observer] = None
    ) -> np.ndarray:
        """Returns the logits (n, vocab) of every position of a sequence that is processed together.

        With an encoder, `prompt` goes there and the positions are those of `fed`, which compete for places with an
        expert as in transformers; without one, they are those of `prompt`, and `fed` is empty.
        """
        ...

    def preview_router(self, layer: int, hidden: np.ndarray) -> np.ndarray:
        """Returns the logits (experts,) of the router of MoE layer `layer` for a residual stream (hidden,)."""
        ...

    def expert_input(self, layer: int, x: np.ndarray) -> np.ndarray:
        """Returns what the experts of MoE layer `layer` are given, for the residual stream before them (n, hidden)."""
        ...

    def expert_output(self, matrices: Dict[str, Packed], x: np.ndarray) -> np.ndarray:
        """Returns one expert's output (n, hidden) for its input (n, hidden), before its share weighs it."""
        ...

    # One sequence block by block, for measurements that share what comes before a change. A block is a layer of any
    # stack; a stream is what goes from one to the next, and is never changed.

    @property
    def blocks(self) -> int: ...

    def moe_block(self, layer: int) -> int:
        """Returns the block that holds MoE layer `layer`."""
        ...

    def open(self, prompt: Tuple[int, ...], fed: Tuple[int, ...]) -> Any:
        """Returns the stream into the first block, for a prompt and the given tokens of its continuation."""
        ...

    def block(self, index: int, stream: Any, state: Any, experts: Experts) -> Any: ...

    def residual(self, stream: Any) -> np.ndarray:
        """Returns the residual stream (n, hidden) of what goes from one block to the next."""
        ...

    def close(self, stream: Any) -> np.ndarray:
        """Returns the logits (decoder tokens, vocab) of the stream after the last block."""
        ...


def check_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns the tokens as an array (n,). Raises RequestError for none, or one that the model does not have."""
    tokens = np.asarray(tokens)
    if len(tokens) == 0 or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise RequestError(f"token ids must be between 0 and {vocab_size - 1}, and at least one")
    return tokens


def are_numbers(values: np.ndarray) -> bool:
    """Tells whether all values are numbers whose squares float32 can hold, in one pass.

    A norm sums squares: of a residual stream for which that overflows it makes zeros, and of zeros any answer.
    """
    flat = values.ravel()
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.dot(flat, flat)))


def as_numbers(logits: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """Returns the logits of a residual stream. Raises NumberError if one in either is none, see `are_numbers`.

    The likeliest of tokens whose logits are NaN is token 0, and it comes fast.
    """
    if not (are_numbers(logits) and are_numbers(residual)):
        raise NumberError("the model's arithmetic gave no number")
    return logits
