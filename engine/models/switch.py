"""Runs Switch Transformers: a T5 encoder and decoder, some of whose feed-forward layers are mixtures of experts.

Fedus, Zoph and Shazeer, 2022; T5: Raffel et al., 2020. Details follow transformers' SwitchTransformers (version 5),
with which the released checkpoints are run: attention without scaling, one table of position biases for a stack, a
router that passes a token on to its likeliest expert, and an expert that takes no more than `expert_capacity` tokens of
a sequence that is processed together; the tokens beyond pass the layer unchanged. Decoding goes token by token, so that
none is ever beyond.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from engine.container import Container
from engine.dataclass import dataclass
from engine.errors import ContainerError, RequestError
from engine.kernels import Kernels
from engine.models.interface import Experts, Observer, as_numbers, check_tokens
from engine.models.layers import KeyValueCache, attention, rms_norm, softmax
from engine.models.loading import check_experts, parse_config, tensor_reader
from engine.quantize import Packed

QUERY_CHUNK = 256  # positions whose attention scores are in memory together


@dataclass(frozen=True)
class SwitchConfig:
    vocab_size: int
    hidden_size: int
    expert_size: int  # inner width of an expert, and of a dense feed-forward layer
    encoder_layers: int
    decoder_layers: int
    encoder_sparse_step: int
    decoder_sparse_step: int
    heads: int
    head_dim: int
    experts: int  # in a sparse layer
    expert_capacity: int  # tokens of a sequence that an expert takes
    router_bias: bool
    position_buckets: int
    position_max_distance: int
    norm_eps: float
    tied_head: bool
    shared_embed: bool  # one table of embeddings for both stacks
    decoder_start_id: int
    eos_ids: Tuple[int, ...]

    @classmethod
    def parse(cls, config: Dict[str, Any]) -> SwitchConfig:
        """Returns the configuration in a container's header. Raises ContainerError."""
        parsed = parse_config(
            cls, config, integers=_RANGES, positives=("norm_eps",), flags=("router_bias", "tied_head", "shared_embed")
        )  # fmt: skip
        if parsed.decoder_start_id >= parsed.vocab_size:
            raise ContainerError("configuration: decoder_start_id is not in the vocabulary")
        if parsed.position_max_distance <= parsed.position_buckets // 2:
            raise ContainerError("configuration: position_buckets and position_max_distance do not go together")
        if parsed.tied_head and not parsed.shared_embed:
            raise ContainerError("configuration: a tied head needs a shared embedding")
        if not parsed.sparse_decoder_layers:
            raise ContainerError("configuration: no decoder layer has experts")
        return parsed

    @property
    def layers(self) -> int:
        return self.encoder_layers + self.decoder_layers

    @property
    def top_k(self) -> int:
        return 1

    @property
    def first_layer(self) -> int:
        return len(self.sparse_encoder_layers)

    @property
    def has_encoder(self) -> bool:
        return True

    def state_bytes(self, positions: int) -> int:
        """Returns the bytes of keys and values, in float32; a decoder attends to itself and to the prompt."""
        return 2 * 4 * self.decoder_layers * self.heads * self.head_dim * positions

    @property
    def sparse_encoder_layers(self) -> List[int]:
        return sparse_layers(self.encoder_layers, self.encoder_sparse_step)

    @property
    def sparse_decoder_layers(self) -> List[int]:
        return sparse_layers(self.decoder_layers, self.decoder_sparse_step)


_RANGES = (
    ("vocab_size", 1, 1 << 24), ("hidden_size", 1, 1 << 18), ("expert_size", 1, 1 << 20),
    ("encoder_layers", 1, 1 << 12), ("decoder_layers", 1, 1 << 12), ("encoder_sparse_step", 0, 1 << 12),
    ("decoder_sparse_step", 0, 1 << 12), ("heads", 1, 1 << 12), ("head_dim", 1, 1 << 12), ("experts", 1, 1 << 14),
    ("expert_capacity", 1, 1 << 24), ("position_buckets", 4, 1 << 12), ("position_max_distance", 1, 1 << 24),
    ("decoder_start_id", 0, 1 << 24),
)  # fmt: skip


def sparse_layers(layers: int, sparse_step: int) -> List[int]:
    """Returns which layers hold experts: every `sparse_step`-th, beginning with the second; with 0 none."""
    if sparse_step == 0:
        return []
    return [layer for layer in range(layers) if sparse_step == 1 or layer % sparse_step == 1]


@dataclass(frozen=True)
class AttentionWeights:
    """Holds the weights of an attention block; matrices are (output, input)."""

    norm: np.ndarray  # (hidden,)
    q: np.ndarray  # (heads * head_dim, hidden)
    k: np.ndarray  # (heads * head_dim, hidden)
    v: np.ndarray  # (heads * head_dim, hidden)
    o: np.ndarray  # (hidden, heads * head_dim)


@dataclass(frozen=True)
class BlockWeights:
    """Holds one layer of a stack; its feed-forward part is either dense or routed."""

    attention: AttentionWeights
    cross: Optional[AttentionWeights]  # in the decoder, to what the encoder made
    feed_forward_norm: np.ndarray  # (hidden,)
    wi: Optional[np.ndarray]  # (width, hidden)
    wo: Optional[np.ndarray]  # (hidden, width)
    router: Optional[np.ndarray]  # (experts, hidden)
    router_bias: Optional[np.ndarray]  # (experts,)
    moe_layer: Optional[int]


@dataclass(frozen=True)
class Stack:
    embed: np.ndarray  # (vocab, hidden)
    blocks: List[BlockWeights]
    position_bias: np.ndarray  # (buckets, heads)
    norm: np.ndarray  # (hidden,)


class SwitchState:
    """Holds what changes while one sequence is processed.

    With `batched`, decoder tokens that are given together compete for places with an expert, as those of the encoder
    do: what transformers computes for them. Without, they are treated as in decoding, one by one.
    """

    def __init__(self, config: SwitchConfig, positions: int, batched: bool) -> None:
        self.position = 0
        self.positions = positions
        self.batched = batched
        self.caches = [KeyValueCache(config.heads, positions, config.head_dim) for _ in range(config.decoder_layers)]
        self.memory: List[Tuple[np.ndarray, np.ndarray]] = []  # by decoder layer: keys and values of the encoder


class SwitchStream(NamedTuple):
    """Holds what goes from block to block, see engine.models.interface."""

    x: np.ndarray  # (n, hidden)
    decoder_tokens: np.ndarray
    memory: Tuple[Tuple[np.ndarray, np.ndarray], ...]  # empty within the encoder


class Switch:
    def __init__(
        self,
        config: SwitchConfig,
        encoder: Stack,
        decoder: Stack,
        head: np.ndarray,  # (vocab, hidden)
        kernels: Kernels,
    ) -> None:
        self.config = config
        self._encoder, self._decoder, self._head = encoder, decoder, head
        self._kernels = kernels
        self._moe_blocks = [b for stack in (encoder, decoder) for b in stack.blocks if b.moe_layer is not None]

    @classmethod
    def load(cls, container: Container, kernels: Kernels) -> Switch:
        config = SwitchConfig.parse(container.config)
        hidden, width = config.hidden_size, config.expert_size
        sparse = [config.sparse_encoder_layers, config.sparse_decoder_layers]
        check_experts(
            container, sum(map(len, sparse)), config.experts, [("wi", width, hidden), ("wo", hidden, width)]
        )  # fmt: skip
        read = tensor_reader(container)
        shared = read("embed", config.vocab_size, hidden) if config.shared_embed else None
        encoder = _read_stack(read, config, "encoder", config.encoder_layers, sparse[0], 0, shared)
        decoder = _read_stack(read, config, "decoder", config.decoder_layers, sparse[1], len(sparse[0]), shared)
        head = decoder.embed if config.tied_head else read("head", config.vocab_size, hidden)
        return cls(config, encoder, decoder, head, kernels)

    @property
    def weight_bytes(self) -> int:
        """Returns the bytes of the non-experts in memory."""
        tables = {id(table): table for table in (self._encoder.embed, self._decoder.embed, self._head)}
        total = sum(table.nbytes for table in tables.values())
        for stack in (self._encoder, self._decoder):
            total += stack.position_bias.nbytes + stack.norm.nbytes
            for block in stack.blocks:
                parts = [block.feed_forward_norm, block.wi, block.wo, block.router, block.router_bias]
                for weights in (block.attention, block.cross):
                    if weights is not None:
                        parts += [weights.norm, weights.q, weights.k, weights.v, weights.o]
                total += sum(part.nbytes for part in parts if part is not None)
        return int(total)

    def whole(
        self, prompt: np.ndarray, fed: np.ndarray, experts: Experts, *, observe: Optional[Observer] = None
    ) -> np.ndarray:
        state = self.start(len(prompt), len(fed), batched=True)
        self.encode(prompt, state, experts, observe=observe)
        return self.forward(fed, state, experts, every_position=True, observe=observe)

    def preview_router(self, layer: int, hidden: np.ndarray) -> np.ndarray:
        """Returns the logits (experts,) of the router of MoE layer `layer` for a residual stream (hidden,)."""
        return self._route(self._moe_blocks[layer], self.expert_input(layer, hidden[None]))[0]

    def start(self, prompt_tokens: int, new_tokens: int = 0, *, batched: bool = False) -> SwitchState:
        """Returns a state for up to `new_tokens`; T5's positions are relative and have no end."""
        return SwitchState(self.config, new_tokens, batched)

    def prefill(
        self, prompt: np.ndarray, state: SwitchState, experts: Experts, *, observe: Optional[Observer] = None
    ) -> np.ndarray:
        """Runs the encoder on the prompt (n,) and the decoder on its start token; returns logits (1, vocab)."""
        self.encode(prompt, state, experts, observe=observe)
        return self.forward(np.array([self.config.decoder_start_id]), state, experts, observe=observe)

    def encode(
        self, tokens: np.ndarray, state: SwitchState, experts: Experts, *, observe: Optional[Observer] = None
    ) -> np.ndarray:
        """Returns the encoder's output (n, hidden) for tokens (n,); the decoder of this state now attends to it."""
        x = self._encoder.embed[check_tokens(tokens, self.config.vocab_size)]
        for layer in range(self.config.encoder_layers):
            x = self.encoder_layer(layer, x, experts, observe)
        return self.remember(x, state)

    def forward(
        self,
        tokens: np.ndarray,  # (n,) int, of the decoder
        state: SwitchState,
        experts: Experts,
        *,
        every_position: bool = False,
        observe: Optional[Observer] = None,
    ) -> np.ndarray:
        """Returns logits (1, vocab) after the last token, or (n, vocab) for `every_position`; the state moves by n.

        Raises RequestError before `encode`, or for more tokens than the state was made for.
        """
        x = self.embed(check_tokens(tokens, self.config.vocab_size))
        if not state.memory:
            raise RequestError("the decoder was asked before the encoder had a prompt")
        if state.position + len(x) > state.positions:
            raise RequestError(f"more than the {state.positions} decoder tokens that this sequence was started for")
        for layer in range(self.config.decoder_layers):
            x = self.decoder_layer(layer, x, state, experts, observe)
        state.position += len(x)
        return self.head(x if every_position else x[-1:])

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the decoder's residual stream (n, hidden) of token ids (n,)."""
        embedded: np.ndarray = self._decoder.embed[tokens]
        return embedded

    def head(self, x: np.ndarray) -> np.ndarray:
        """Returns logits (n, vocab) of the stream after the decoder (n, hidden). A tied head is scaled, as in T5."""
        normed = rms_norm(x, self._decoder.norm, self.config.norm_eps)
        if self.config.tied_head:
            normed *= np.float32(self.config.hidden_size**-0.5)
        return as_numbers(normed @ self._head.T, x)

    def expert_input(self, layer: int, x: np.ndarray) -> np.ndarray:
        """Returns what the experts of MoE layer `layer` are given, for the residual stream before them (n, hidden)."""
        return rms_norm(x, self._moe_blocks[layer].feed_forward_norm, self.config.norm_eps)

    @property
    def blocks(self) -> int:
        return self.config.layers

    def moe_block(self, layer: int) -> int:
        encoder, decoder = self.config.sparse_encoder_layers, self.config.sparse_decoder_layers
        return (encoder + [self.config.encoder_layers + i for i in decoder])[layer]

    def open(self, prompt: Tuple[int, ...], fed: Tuple[int, ...]) -> SwitchStream:
        x = self._encoder.embed[check_tokens(np.array(prompt), self.config.vocab_size)]
        decoder_tokens = check_tokens(np.array((self.config.decoder_start_id, *fed)), self.config.vocab_size)
        return SwitchStream(x, decoder_tokens, ())

    def block(self, index: int, stream: SwitchStream, state: SwitchState, experts: Experts) -> SwitchStream:
        if index < self.config.encoder_layers:
            x = self.encoder_layer(index, stream.x, experts)
            if index < self.config.encoder_layers - 1:
                return stream._replace(x=x)
            self.remember(x, state)
            return SwitchStream(self.embed(stream.decoder_tokens), stream.decoder_tokens, tuple(state.memory))
        state.memory = list(stream.memory)
        return stream._replace(x=self.decoder_layer(index - self.config.encoder_layers, stream.x, state, experts))

    def residual(self, stream: SwitchStream) -> np.ndarray:
        return stream.x

    def close(self, stream: SwitchStream) -> np.ndarray:
        return self.head(stream.x)

    def expert_output(self, matrices: Dict[str, Packed], x: np.ndarray) -> np.ndarray:
        """Returns one expert's output (n, hidden), before its share weighs it."""
        return self._kernels.relu_ffn(matrices, x)

    def encoder_layer(
        self, layer: int, x: np.ndarray, experts: Experts, observe: Optional[Observer] = None
    ) -> np.ndarray:
        """Runs one layer of the encoder on all of the prompt's residual stream (n, hidden)."""
        block = self._encoder.blocks[layer]
        normed = rms_norm(x, block.attention.norm, self.config.norm_eps)
        q, k, v = (self._heads(normed @ w.T) for w in (block.attention.q, block.attention.k, block.attention.v))
        keys, values = k.transpose(1, 0, 2), v.transpose(1, 0, 2)
        mixed = self._attend(q, keys, values, self._encoder.position_bias, 0, causal=False)
        x = x + mixed @ block.attention.o.T
        return self._feed_forward(block, x, experts, observe, self.config.expert_capacity)

    def remember(self, x: np.ndarray, state: SwitchState) -> np.ndarray:
        """Returns the encoder's output, for the decoder to attend to, from the stream after it (n, hidden)."""
        output = rms_norm(x, self._encoder.norm, self.config.norm_eps)
        state.memory = []
        for block in self._decoder.blocks:
            assert block.cross is not None
            keys, values = self._heads(output @ block.cross.k.T), self._heads(output @ block.cross.v.T)
            state.memory.append((keys.transpose(1, 0, 2), values.transpose(1, 0, 2)))
        return output

    def decoder_layer(
        self, layer: int, x: np.ndarray, state: SwitchState, experts: Experts, observe: Optional[Observer] = None
    ) -> np.ndarray:
        """Runs one layer on the residual stream (n, hidden) at the state's position, which does not move."""
        block, eps = self._decoder.blocks[layer], self.config.norm_eps
        normed = rms_norm(x, block.attention.norm, eps)
        q, k, v = (self._heads(normed @ w.T) for w in (block.attention.q, block.attention.k, block.attention.v))
        keys, values = state.caches[layer].extend(state.position, k, v)
        mixed = self._attend(q, keys, values, self._decoder.position_bias, state.position, causal=True)
        x = x + mixed @ block.attention.o.T

        assert block.cross is not None
        q = self._heads(rms_norm(x, block.cross.norm, eps) @ block.cross.q.T)
        x = x + attention(q, *state.memory[layer]) @ block.cross.o.T
        capacity = self.config.expert_capacity if state.batched else len(x)
        return self._feed_forward(block, x, experts, observe, capacity)

    def _feed_forward(
        self, block: BlockWeights, x: np.ndarray, experts: Experts, observe: Optional[Observer], capacity: int
    ) -> np.ndarray:
        normed = rms_norm(x, block.feed_forward_norm, self.config.norm_eps)
        if block.wi is not None and block.wo is not None:
            return x + np.maximum(normed @ block.wi.T, 0) @ block.wo.T
        assert block.moe_layer is not None
        logits = self._route(block, normed)  # (n, experts)
        probabilities = softmax(logits)
        chosen = experts.prefer(block.moe_layer, logits).argmax(axis=1)[:, None]  # (n, 1)
        shares = np.take_along_axis(probabilities, chosen, axis=1)  # (n, 1)
        if observe is not None:
            observe(block.moe_layer, chosen)
        x = x.copy()
        for group in experts.fetch(block.moe_layer, chosen, shares, x.copy()):
            for expert, matrices in group:
                rows = np.nonzero(chosen[:, 0] == expert)[0][:capacity]
                x[rows] += self.expert_output(matrices, normed[rows]) * shares[rows]
        return x

    def _route(self, block: BlockWeights, normed: np.ndarray) -> np.ndarray:
        """Returns the router's logits (n, experts) for (n, hidden)."""
        assert block.router is not None
        logits: np.ndarray = normed @ block.router.T
        return logits if block.router_bias is None else logits + block.router_bias

    def _heads(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), self.config.heads, self.config.head_dim)

    def _attend(
        self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, table: np.ndarray, start: int, causal: bool
    ) -> np.ndarray:
        """Computes self-attention with position biases out of `table` (buckets, heads), some queries at a time."""
        config, outputs = self.config, []
        memory = np.arange(keys.shape[1])
        for first in range(0, len(queries), QUERY_CHUNK):
            chunk = queries[first : first + QUERY_CHUNK]
            distance = memory - np.arange(start + first, start + first + len(chunk))[:, None]  # (n, seen)
            buckets = relative_buckets(distance, not causal, config.position_buckets, config.position_max_distance)
            bias = table[buckets].transpose(2, 0, 1)  # (heads, n, seen)
            if causal and len(queries) > 1:
                bias[:, distance > 0] = -np.inf
            outputs.append(attention(chunk, keys, values, bias))
        return np.concatenate(outputs)


def relative_buckets(distance: np.ndarray, bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
    """Returns T5's buckets of relative positions (memory minus query): near ones exact, far ones by logarithm.

    In float32 throughout: the borders between buckets fall where transformers has them.
    """
    base = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        base = (distance > 0) * buckets
        distance = np.abs(distance)
    else:
        distance = -np.minimum(distance, 0)
    exact = buckets // 2
    far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    logarithmic = np.minimum(exact + far.astype(np.int64), buckets - 1)
    return base + np.where(distance < exact, distance, logarithmic)


def _read_stack(
    read: Callable[..., np.ndarray],
    config: SwitchConfig,
    name: str,
    layers: int,
    sparse: List[int],
    first_moe: int,
    shared_embed: Optional[np.ndarray],
) -> Stack:
    hidden, width, inner = config.hidden_size, config.expert_size, config.heads * config.head_dim

    def attention_weights(prefix: str) -> AttentionWeights:
        return AttentionWeights(
            norm=read(f"{prefix}_norm", hidden),
            q=read(f"{prefix}.q", inner, hidden),
            k=read(f"{prefix}.k", inner, hidden),
            v=read(f"{prefix}.v", inner, hidden),
            o=read(f"{prefix}.o", hidden, inner),
        )

    blocks = []
    for i in range(layers):
        prefix, routed = f"{name}.{i}", i in sparse
        blocks.append(
            BlockWeights(
                attention=attention_weights(f"{prefix}.attention"),
                cross=attention_weights(f"{prefix}.cross") if name == "decoder" else None,
                feed_forward_norm=read(f"{prefix}.feed_forward_norm", hidden),
                wi=None if routed else read(f"{prefix}.wi", width, hidden),
                wo=None if routed else read(f"{prefix}.wo", hidden, width),
                router=read(f"{prefix}.router", config.experts, hidden) if routed else None,
                router_bias=read(f"{prefix}.router_bias", config.experts) if routed and config.router_bias else None,
                moe_layer=first_moe + sparse.index(i) if routed else None,
            )
        )
    embed = read(f"{name}.embed", config.vocab_size, hidden) if shared_embed is None else shared_embed
    position_bias = read(f"{name}.position_bias", config.position_buckets, config.heads)
    return Stack(embed, blocks, position_bias, read(f"{name}.norm", hidden))
