"""Runs Mixtral: a decoder with grouped-query attention and sparse mixture-of-experts layers (Jiang et al., 2024)."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from engine.container import Container
from engine.dataclass import dataclass
from engine.errors import ContainerError, RequestError
from engine.kernels import Kernels, NativeKernels
from engine.kernels.native import DecoderLayer, TokenMemory
from engine.models.interface import Experts, Observer, as_numbers, check_tokens
from engine.models.layers import KeyValueCache, RotaryEmbedding, causal_attention, rms_norm, route_top_k
from engine.models.loading import check_experts, parse_config, tensor_reader
from engine.quantize import Packed

PREFILL_CHUNK = 512  # tokens that go through a layer together: bounds the working memory of a long prompt


@dataclass(frozen=True)
class MixtralConfig:
    vocab_size: int
    hidden_size: int
    expert_size: int  # inner width of an expert
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int  # in a layer
    top_k: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    sliding_window: Optional[int]
    tied_head: bool
    eos_ids: Tuple[int, ...]

    @classmethod
    def parse(cls, config: Dict[str, Any]) -> MixtralConfig:
        """Returns the configuration in a container's header. Raises ContainerError."""
        parsed = parse_config(
            cls, {key: value for key, value in config.items() if key != "bos_id"},  # of interest to older engines alone
            integers=_RANGES, positives=("rope_theta", "norm_eps"), flags=("tied_head",),
            optional_integers=("sliding_window",),
        )  # fmt: skip
        if parsed.sliding_window is not None and parsed.sliding_window < 1:
            raise ContainerError("configuration: sliding_window is neither null nor positive")
        if parsed.heads % parsed.kv_heads or parsed.head_dim % 2 or parsed.top_k > parsed.experts:
            raise ContainerError("configuration: heads, kv_heads, head_dim, experts and top_k do not go together")
        return parsed

    @property
    def first_layer(self) -> int:
        return 0

    @property
    def has_encoder(self) -> bool:
        return False

    @property
    def decoder_start_id(self) -> None:
        return None

    def state_bytes(self, positions: int) -> int:
        """Returns the bytes of keys and values, in float32, for a sequence of so many positions."""
        return 2 * 4 * self.layers * self.kv_heads * self.head_dim * positions


_RANGES = (
    ("vocab_size", 1, 1 << 24), ("hidden_size", 1, 1 << 18), ("expert_size", 1, 1 << 20), ("layers", 1, 1 << 12),
    ("heads", 1, 1 << 12), ("kv_heads", 1, 1 << 12), ("head_dim", 2, 1 << 12), ("experts", 1, 1 << 14),
    ("top_k", 1, 1 << 10), ("max_positions", 1, 1 << 24),
)  # fmt: skip


@dataclass(frozen=True)
class LayerWeights:
    """Holds the non-experts of one layer; matrices are (output, input), as Kernels.hold gives them."""

    attention_norm: np.ndarray  # (hidden,)
    q: Any  # (heads * head_dim, hidden)
    k: Any  # (kv_heads * head_dim, hidden)
    v: Any  # (kv_heads * head_dim, hidden)
    o: Any  # (hidden, heads * head_dim)
    moe_norm: np.ndarray  # (hidden,)
    router: Any  # (experts, hidden)


class MixtralState:
    """Holds what changes while one sequence is processed."""

    def __init__(self, config: MixtralConfig, positions: int) -> None:
        self.position = 0
        self.positions = positions
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, positions)
        self.caches = [KeyValueCache(config.kv_heads, positions, config.head_dim) for _ in range(config.layers)]


class Mixtral:
    def __init__(
        self,
        config: MixtralConfig,
        embed: Any,  # (vocab, hidden), as the kernels hold it
        layers: List[LayerWeights],
        norm: np.ndarray,  # (hidden,)
        head: Any,  # likewise
        kernels: Kernels,
    ) -> None:
        self.config = config
        self._embed, self._layers, self._norm, self._head = embed, layers, norm, head
        self._kernels = kernels
        self._native: Optional[NativeKernels] = kernels if isinstance(kernels, NativeKernels) else None
        self._decoder_layers = [
            DecoderLayer(
                w.attention_norm, w.moe_norm, (w.q, w.k, w.v, w.o, w.router), heads=config.heads,
                kv_heads=config.kv_heads, head_dim=config.head_dim, window=config.sliding_window, top_k=config.top_k,
                eps=config.norm_eps,
            )
            for w in (layers if self._native else ())
        ]  # fmt: skip
        self._token = TokenMemory(config.hidden_size, config.experts, config.top_k)

    @classmethod
    def load(cls, container: Container, kernels: Kernels) -> Mixtral:
        config = MixtralConfig.parse(container.config)
        hidden, queries, keys = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
        wide, narrow = config.expert_size, hidden
        matrices = [("gate", wide, narrow), ("up", wide, narrow), ("down", narrow, wide)]
        check_experts(container, config.layers, config.experts, matrices)
        read, read_matrix = tensor_reader(container), tensor_reader(container, container.read_matrix)

        def held(name: str, rows: int, columns: int) -> Any:
            return kernels.hold(read_matrix(name, rows, columns))

        embed = held("embed", config.vocab_size, hidden)
        layers = [
            LayerWeights(
                attention_norm=read(f"layers.{i}.attention_norm", hidden),
                q=held(f"layers.{i}.q", queries, hidden),
                k=held(f"layers.{i}.k", keys, hidden),
                v=held(f"layers.{i}.v", keys, hidden),
                o=held(f"layers.{i}.o", hidden, queries),
                moe_norm=read(f"layers.{i}.moe_norm", hidden),
                router=held(f"layers.{i}.router", config.experts, hidden),
            )
            for i in range(config.layers)
        ]
        head = embed if config.tied_head else held("head", config.vocab_size, hidden)
        return cls(config, embed, layers, read("norm", hidden), head, kernels)

    @property
    def weight_bytes(self) -> int:
        """Returns the bytes of the non-experts in memory."""
        own = [self._embed, self._norm, *(getattr(w, f) for w in self._layers for f in LayerWeights.__annotations__)]
        return sum(int(a.nbytes) for a in own) + (0 if self._head is self._embed else self._head.nbytes)

    def whole(
        self, prompt: np.ndarray, fed: np.ndarray, experts: Experts, *, observe: Optional[Observer] = None
    ) -> np.ndarray:
        assert len(fed) == 0, "there is no encoder"
        return self.forward(prompt, self.start(len(prompt)), experts, every_position=True, observe=observe)

    def preview_router(self, layer: int, hidden: np.ndarray) -> np.ndarray:
        """Returns the logits (experts,) of the router of `layer` for the residual stream `hidden` (hidden,)."""
        weights = self._layers[layer]
        return self._normed_linear(weights.moe_norm, weights.router, hidden[None])[1][0]

    def start(self, prompt_tokens: int, new_tokens: int = 0) -> MixtralState:
        """Returns a state for so many tokens together. Raises RequestError if the model knows fewer positions."""
        positions = prompt_tokens + new_tokens
        if positions > self.config.max_positions:
            raise RequestError(
                f"{positions} positions are asked for, prompt and new tokens together, where the model has "
                f"{self.config.max_positions}; shorten the prompt or ask for fewer tokens"
            )
        return MixtralState(self.config, positions)

    def prefill(
        self, prompt: np.ndarray, state: MixtralState, experts: Experts, *, observe: Optional[Observer] = None
    ) -> np.ndarray:
        """Returns the logits (1, vocab) after the prompt's (n,) last token."""
        return self.forward(prompt, state, experts, observe=observe)

    def forward(
        self,
        tokens: np.ndarray,  # (n,) int
        state: MixtralState,
        experts: Experts,
        *,
        every_position: bool = False,
        observe: Optional[Observer] = None,
    ) -> np.ndarray:
        """Returns logits (1, vocab) after the last token, or (n, vocab) for `every_position`; the state moves by n.

        `observe(layer, chosen)` is told what the routers chose, (tokens, k), for profiles and tests.
        """
        tokens = check_tokens(tokens, self.config.vocab_size)
        if state.position + len(tokens) > state.positions:
            raise RequestError(f"the sequence was started with {state.positions} positions, and has no more of them")
        outputs = []
        for first in range(0, len(tokens), PREFILL_CHUNK):
            x = self.embed(tokens[first : first + PREFILL_CHUNK])
            for layer in range(self.config.layers):
                x = self.layer(layer, x, state, experts, observe)
            state.position += len(x)
            if every_position:
                outputs.append(x)
        return self.head(np.concatenate(outputs) if every_position else x[-1:])

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the residual stream (n, hidden) of token ids (n,)."""
        return self._kernels.rows(self._embed, tokens)

    def head(self, x: np.ndarray) -> np.ndarray:
        """Returns the logits (n, vocab) of the residual stream after the last layer (n, hidden)."""
        return as_numbers(self._normed_linear(self._norm, self._head, x)[1], x)

    def expert_input(self, layer: int, x: np.ndarray) -> np.ndarray:
        """Returns what the experts of `layer` are given, for the residual stream before them (n, hidden)."""
        return rms_norm(x, self._layers[layer].moe_norm, self.config.norm_eps)

    @property
    def blocks(self) -> int:
        return self.config.layers

    def moe_block(self, layer: int) -> int:
        return layer

    def open(self, prompt: Tuple[int, ...], fed: Tuple[int, ...]) -> np.ndarray:
        return self.embed(check_tokens(np.array(prompt + fed), self.config.vocab_size))

    def block(self, index: int, stream: np.ndarray, state: MixtralState, experts: Experts) -> np.ndarray:
        return self.layer(index, stream, state, experts)

    def residual(self, stream: np.ndarray) -> np.ndarray:
        return stream

    def close(self, stream: np.ndarray) -> np.ndarray:
        return self.head(stream)

    def expert_output(self, matrices: Dict[str, Packed], x: np.ndarray) -> np.ndarray:
        """Returns one expert's output (n, hidden), before its share weighs it."""
        return self._kernels.swiglu(matrices, x)

    def layer(
        self,
        layer: int,
        x: np.ndarray,
        state: MixtralState,
        experts: Experts,
        observe: Optional[Observer] = None,
    ) -> np.ndarray:
        """Runs one layer on the residual stream (n, hidden) at the state's position, which does not move."""
        if len(x) == 1 and self._native is not None:
            return self._token_layer(self._native, layer, x, state, experts, observe)
        weights, config = self._layers[layer], self.config
        x = self._attend(layer, x, state)
        normed, logits = self._normed_linear(weights.moe_norm, weights.router, x)  # (n, hidden), (n, experts)
        chosen, shares = route_top_k(logits, experts.prefer(layer, logits), config.top_k)  # (n, k) each
        if observe is not None:
            observe(layer, chosen)
        # Each share has a place of its own, summed at the end: the order in which experts arrive changes no bit.
        outputs = np.empty((len(x), config.top_k, config.hidden_size), np.float32)
        for group in experts.fetch(layer, chosen, shares, x):
            for expert, matrices in group:
                row, place = np.nonzero(chosen == expert)
                outputs[row, place] = self.expert_output(matrices, normed[row]) * shares[row, place, None]
        return x + outputs.sum(axis=1)

    def _token_layer(
        self,
        native: NativeKernels,
        layer: int,
        x: np.ndarray,
        state: MixtralState,
        experts: Experts,
        observe: Optional[Observer],
    ) -> np.ndarray:
        """Runs a layer for one token, in two native calls unless experts are late: Python's own time counts here."""
        weights, token = self._decoder_layers[layer], self._token
        token.x[...] = x
        native.begin_layer(weights, token, state.caches[layer], state.rotary, state.position)
        preference = experts.prefer(layer, token.logits)
        if preference is not token.logits:
            token.chosen[...], token.shares[...] = route_top_k(token.logits, preference, self.config.top_k)
        chosen = token.chosen.copy()  # whoever observes may keep it
        if observe is not None:
            observe(layer, chosen)
        place_of = {expert: place for place, expert in enumerate(chosen[0].tolist())}
        left = len(place_of)
        for group in experts.fetch(layer, chosen, token.shares, token.x):
            left -= len(group)
            matrices, places = [m for _, m in group], [place_of[expert] for expert, _ in group]
            native.experts_of_token(weights, token, matrices, places, last=not left)
        return token.x.copy()

    def _attend(self, layer: int, x: np.ndarray, state: MixtralState) -> np.ndarray:
        """Runs the attention block on the residual stream (n, hidden)."""
        weights, config, cache = self._layers[layer], self.config, state.caches[layer]
        n, linear = len(x), self._kernels.linear
        normed = rms_norm(x, weights.attention_norm, config.norm_eps)
        q = linear(weights.q, normed).reshape(n, config.heads, config.head_dim)
        k = linear(weights.k, normed).reshape(n, config.kv_heads, config.head_dim)
        v = linear(weights.v, normed).reshape(n, config.kv_heads, config.head_dim)
        q, k = state.rotary.apply(q, state.position), state.rotary.apply(k, state.position)
        keys, values = cache.extend(state.position, k, v)
        return x + linear(weights.o, causal_attention(q, keys, values, state.position, config.sliding_window))

    def _normed_linear(self, norm: np.ndarray, weight: Any, x: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Returns the RMS norm (n, hidden) of x (n, hidden), and that through a matrix, (n, rows)."""
        if len(x) == 1 and self._native is not None:
            return self._native.normed_linear(norm, self.config.norm_eps, weight, x)
        normed = rms_norm(x, norm, self.config.norm_eps)
        return normed, self._kernels.linear(weight, normed)
