"""Describes the Mixtral layout of a checkpoint: which tensors it has, and their names in a container.

Follows transformers' MixtralConfig and MixtralForCausalLM (versions 4 and 5; both write the same tensor names,
version 5 has moved some keys of config.json).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from engine.models.mixtral import MixtralConfig
from engine.offline.importing.checkpoint import Checkpoint, CheckpointError, StoredTensor
from engine.offline.importing.layout import ConfigKeys, Layout, TensorName

_DEFAULT_ROPE_THETA = 1e6  # transformers' MixtralConfig.default_theta
_DEFAULT_NORM_EPS = 1e-5

# matrix in the container -> tensor of the checkpoint
EXPERT_MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}


class MixtralLayout(Layout):
    @classmethod
    def read_config(cls, keys: ConfigKeys, checkpoint: Checkpoint) -> dict[str, Any]:
        return _container_config(keys)

    def check(self) -> None:
        MixtralConfig.parse(self.config)

    def respelled(self, checkpoint: Checkpoint) -> Checkpoint:
        """Takes the experts of a layer apart that transformers 5 keeps in two tensors, gate above up."""
        names: dict[str, StoredTensor] = {}
        fused = []
        for layer in range(self.config["layers"]):
            ours = f"model.layers.{layer}.block_sparse_moe"
            for theirs in (f"model.layers.{layer}.mlp", ours):
                router = f"{theirs}.gate.weight"
                if theirs != ours and router in checkpoint.tensors:
                    names[f"{ours}.gate.weight"] = checkpoint.tensors[router]
                    fused.append(router)
                for stored, parts in (("gate_up_proj", {"w1": 0, "w3": 1}), ("down_proj", {"w2": 0})):
                    tensor = checkpoint.tensors.get(f"{theirs}.experts.{stored}")
                    if tensor is None:
                        continue
                    fused.append(tensor.name)
                    expected = (self.config["experts"], *self._fused_shape(stored))
                    if tensor.shape != expected:
                        raise CheckpointError(
                            f"{tensor.file}: tensor {tensor.name} has shape {tensor.shape} where config.json implies "
                            f"{expected}"
                        )
                    rows = tensor.shape[1] // len(parts)
                    for expert, (name, part) in itertools.product(range(tensor.shape[0]), parts.items()):
                        where = (expert, slice(part * rows, (part + 1) * rows))
                        names[f"{ours}.experts.{expert}.{name}.weight"] = dataclasses.replace(
                            tensor, shape=(rows, tensor.shape[2]), part=where
                        )
        return checkpoint.spelled(names, without=fused) if names else checkpoint

    def _fused_shape(self, stored: str) -> tuple[int, int]:
        hidden, width = self.config["hidden_size"], self.config["expert_size"]
        return (2 * width, hidden) if stored == "gate_up_proj" else (hidden, width)

    def implied(self, checkpoint: Checkpoint) -> list[str]:
        """Returns the frequencies of rotary positions, which early releases of transformers stored."""
        found = [name for name in checkpoint.tensors if name.endswith("rotary_emb.inv_freq")]
        half = np.arange(0, self.config["head_dim"], 2) / self.config["head_dim"]
        expected = self.config["rope_theta"] ** -half
        for name in found:
            stored = checkpoint.read_float32(name)
            if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-2, atol=1e-6):  # of bf16
                raise CheckpointError(
                    f"{checkpoint.tensors[name].file}: tensor {name} holds other frequencies than rope_theta "
                    f"{self.config['rope_theta']:g} of config.json gives: one of the two is another model's"
                )
        return found

    def copies(self) -> Iterator[tuple[str, str]]:
        if self.config["tied_head"]:
            yield "lm_head.weight", "model.embed_tokens.weight"

    def non_experts(self) -> Iterator[TensorName]:
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

    def large_matrices(self) -> Iterator[str]:
        # All but the routers: which experts are chosen hangs on their smallest differences.
        yield from ("embed",) if self.config["tied_head"] else ("embed", "head")
        for i in range(self.config["layers"]):
            yield from (f"layers.{i}.{name}" for name in "qkvo")

    def matrices(self) -> dict[str, tuple[int, int]]:
        hidden, width = self.config["hidden_size"], self.config["expert_size"]
        return {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}

    def experts(self) -> Iterator[tuple[int, int]]:
        for layer in range(self.config["layers"]):
            for expert in range(self.config["experts"]):
                yield layer, expert

    def expert(self, layer: int, expert: int) -> dict[str, str]:
        prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        return {matrix: f"{prefix}.{name}.weight" for matrix, name in EXPERT_MATRICES.items()}


def _container_config(keys: ConfigKeys) -> dict[str, Any]:
    keys.refuse_other_architectures("MixtralForCausalLM")
    if keys.get("hidden_act") not in (None, "silu"):
        raise keys.error("hidden_act", f"is {keys.get('hidden_act')!r:.60}: only 'silu' is supported")

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
    vocab_size = keys.natural("vocab_size")
    bos = keys.get("bos_token_id")
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
        "tied_head": keys.flag("tie_word_embeddings", default=False),
        "bos_id": None if bos is None else keys.token_id("bos_token_id", bos, vocab_size),
        "eos_ids": keys.eos_ids(vocab_size),
    }


def _rope_theta(keys: ConfigKeys) -> float:
    """Returns theta of rope_parameters (transformers 5) or rope_theta (before); refuses rope scaling."""
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
