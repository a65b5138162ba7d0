"""The Mixtral layout of a checkpoint: which tensors it has, and what they are called in a container.

Follows transformers' MixtralConfig and MixtralForCausalLM (versions 4 and 5; both write the same tensor names,
version 5 has moved some keys of config.json).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import ContainerError
from engine.models.mixtral import MixtralConfig
from engine.offline.checkpoint import Checkpoint, CheckpointError

ARCHITECTURE = "mixtral"
_LARGEST = 1 << 24  # of any dimension: far above every real model, far below what could exhaust anything here
_DEFAULT_ROPE_THETA = 1e6  # transformers' MixtralConfig.default_theta
_DEFAULT_NORM_EPS = 1e-5

# matrix in the container -> tensor of the checkpoint, in the order in which the arithmetic consumes them
EXPERT_MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class MixtralLayout:
    """The tensors that a configuration implies; `config` is what the container keeps."""

    config: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> MixtralLayout:
        """Raises CheckpointError, naming the key of config.json or the tensor, for what is not such a model."""
        path = checkpoint.folder / "config.json"
        layout = cls(_container_config(_Keys(checkpoint.config, str(path))))
        try:
            MixtralConfig.parse(layout.config)  # what the engine would refuse is not imported
        except ContainerError as error:
            raise CheckpointError(f"{path}: {error}") from None
        expected = layout.shapes()
        head, embed = "lm_head.weight", "model.embed_tokens.weight"
        if layout.config["tied_head"] and head in checkpoint.tensors and embed in checkpoint.tensors:
            # Some writers store the tied head twice. It is left out, provided that it says the same.
            if not np.array_equal(checkpoint.read(head), checkpoint.read(embed)):
                raise CheckpointError(
                    f"{checkpoint.tensors[head].file}: tensor {head} differs from {embed},"
                    " although config.json ties them (tie_word_embeddings)"
                )
            expected = itertools.chain(expected, [(head, checkpoint.tensors[embed].shape)])
        checkpoint.check_shapes(expected)
        return layout

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the checkpoint with its shape."""
        for name, _, shape in self.non_experts():
            yield name, shape
        hidden, width = self.config["hidden_size"], self.config["expert_size"]
        for layer, expert in self.experts():
            for matrix, name in self.expert(layer, expert).items():
                yield name, (hidden, width) if matrix == "down" else (width, hidden)

    def non_experts(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(name in the checkpoint, name in the container, shape)."""
        c = self.config
        hidden, queries, keys = c["hidden_size"], c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
        yield "model.embed_tokens.weight", "embed", (c["vocab_size"], hidden)
        for i in range(c["layers"]):
            theirs, ours = f"model.layers.{i}", f"layers.{i}"
            yield f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm", (hidden,)
            yield f"{theirs}.self_attn.q_proj.weight", f"{ours}.q", (queries, hidden)
            yield f"{theirs}.self_attn.k_proj.weight", f"{ours}.k", (keys, hidden)
            yield f"{theirs}.self_attn.v_proj.weight", f"{ours}.v", (keys, hidden)
            yield f"{theirs}.self_attn.o_proj.weight", f"{ours}.o", (hidden, queries)
            yield f"{theirs}.post_attention_layernorm.weight", f"{ours}.moe_norm", (hidden,)
            yield f"{theirs}.block_sparse_moe.gate.weight", f"{ours}.router", (c["experts"], hidden)
        yield "model.norm.weight", "norm", (hidden,)
        if not c["tied_head"]:
            yield "lm_head.weight", "head", (c["vocab_size"], hidden)

    def experts(self) -> Iterator[tuple[int, int]]:
        """(layer, expert) in the order in which a token meets them."""
        for layer in range(self.config["layers"]):
            for expert in range(self.config["experts"]):
                yield layer, expert

    @staticmethod
    def expert(layer: int, expert: int) -> dict[str, str]:
        """Matrix in the container -> tensor of the checkpoint."""
        prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        return {matrix: f"{prefix}.{name}.weight" for matrix, name in EXPERT_MATRICES.items()}


class _Keys:
    """config.json, with each key checked where it is read."""

    def __init__(self, values: dict[str, Any], path: str) -> None:
        self.values, self.path = values, path

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def natural(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.error(key, "is missing")
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise self.error(key, f"is {value!r:.60} where a number from 1 to {_LARGEST} is expected")
        return value

    def token_id(self, key: str, value: Any, vocab_size: int) -> int:
        if type(value) is not int or not 0 <= value < vocab_size:
            raise self.error(key, f"is {value!r:.60} where a token id below {vocab_size} is expected")
        return value

    def positive(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.error(key, f"is {value!r:.60} where a positive number is expected")
        return float(value)

    def error(self, key: str, complaint: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key} {complaint}")


def _container_config(keys: _Keys) -> dict[str, Any]:
    if keys.get("model_type") != ARCHITECTURE:
        raise keys.error("model_type", f"is {keys.get('model_type')!r:.60}: only 'mixtral' checkpoints can be imported")
    architectures = keys.get("architectures")
    if architectures is not None and architectures != ["MixtralForCausalLM"]:
        raise keys.error("architectures", f"is {architectures!r:.60}: only MixtralForCausalLM can be imported")
    if keys.get("hidden_act") not in (None, "silu"):
        raise keys.error("hidden_act", f"is {keys.get('hidden_act')!r:.60}: only 'silu' is supported")
    if keys.get("quantization_config") is not None:
        raise keys.error("quantization_config", "is set: import the original, not a quantised copy")

    hidden, heads = keys.natural("hidden_size"), keys.natural("num_attention_heads")
    kv_heads = keys.natural("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise keys.error("num_key_value_heads", f"is {kv_heads}, which does not divide num_attention_heads {heads}")
    if keys.get("head_dim") is None and hidden % heads:
        raise keys.error("head_dim", f"is missing, and {heads} heads do not divide hidden_size {hidden}")
    head_dim = keys.natural("head_dim", default=hidden // heads)
    if head_dim % 2:
        raise keys.error("head_dim", f"is {head_dim}: rotary positions need an even one")
    experts = keys.natural("num_local_experts", default=keys.natural("num_experts", default=0) or None)
    top_k = keys.natural("num_experts_per_tok")
    if top_k > experts:
        raise keys.error("num_experts_per_tok", f"is {top_k}, more than the {experts} experts")
    tied = keys.get("tie_word_embeddings")
    if tied not in (None, True, False):
        raise keys.error("tie_word_embeddings", f"is {tied!r:.60} where true or false is expected")

    vocab_size = keys.natural("vocab_size")
    bos, eos = keys.get("bos_token_id"), keys.get("eos_token_id")
    norm_eps = keys.get("rms_norm_eps")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "expert_size": keys.natural("intermediate_size"),
        "layers": keys.natural("num_hidden_layers"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "experts": experts,
        "top_k": top_k,
        "rope_theta": _rope_theta(keys),
        "norm_eps": keys.positive("rms_norm_eps", _DEFAULT_NORM_EPS if norm_eps is None else norm_eps),
        "max_positions": keys.natural("max_position_embeddings"),
        "sliding_window": None if keys.get("sliding_window") is None else keys.natural("sliding_window"),
        "tied_head": bool(tied),
        "bos_id": None if bos is None else keys.token_id("bos_token_id", bos, vocab_size),
        "eos_ids": [
            keys.token_id("eos_token_id", e, vocab_size)
            for e in (eos if isinstance(eos, list) else [] if eos is None else [eos])
        ],
    }


def _rope_theta(keys: _Keys) -> float:
    """From rope_parameters (transformers 5) or rope_theta (before); positions stretched by rope scaling are refused."""
    theta = keys.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        rope = keys.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise keys.error(key, f"is {rope!r:.60} where an object is expected")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise keys.error(key, f"asks for {kind!r:.60}: only plain rotary positions ('default') are supported")
        if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise keys.error(key, "asks for a partial_rotary_factor: only whole rotary heads are supported")
        theta = rope.get("rope_theta", theta)
    return keys.positive("rope_theta", _DEFAULT_ROPE_THETA if theta is None else theta)
