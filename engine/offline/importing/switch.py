"""Describes the Switch Transformers layout of a checkpoint: which tensors it has, and their names in a container.

Follows transformers' SwitchTransformersConfig and SwitchTransformersForConditionalGeneration (versions 4 and 5).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.models.switch import SwitchConfig, sparse_layers
from engine.offline.importing.checkpoint import Checkpoint
from engine.offline.importing.layout import ConfigKeys, Layout, TensorName, same

EMBED, HEAD = "shared.weight", "lm_head.weight"
STACKS = ("encoder", "decoder")


class SwitchLayout(Layout):
    @classmethod
    def read_config(cls, keys: ConfigKeys, checkpoint: Checkpoint) -> dict[str, Any]:
        config = _container_config(keys)
        embeds = [f"{stack}.embed_tokens.weight" for stack in STACKS]
        # transformers 4 shares one table between the stacks always, transformers 5 only where it ties the head too.
        config["shared_embed"] = config["tied_head"] or not all(
            name in checkpoint.tensors and EMBED in checkpoint.tensors and not same(checkpoint, name, EMBED)
            for name in embeds
        )
        return config

    def check(self) -> None:
        SwitchConfig.parse(self.config)

    def unused(self) -> Iterator[str]:
        if not self.config["shared_embed"]:
            yield EMBED

    def copies(self) -> Iterator[tuple[str, str]]:
        if self.config["tied_head"]:
            yield HEAD, EMBED
        if self.config["shared_embed"]:
            for stack in STACKS:
                yield f"{stack}.embed_tokens.weight", EMBED

    def non_experts(self) -> Iterator[TensorName]:
        c = self.config
        hidden, width, inner = c["hidden_size"], c["expert_size"], c["heads"] * c["head_dim"]
        vocabulary = (c["vocab_size"], hidden)
        if c["shared_embed"]:
            yield EMBED, "embed", vocabulary
        for stack in STACKS:
            if not c["shared_embed"]:
                yield f"{stack}.embed_tokens.weight", f"{stack}.embed", vocabulary
            sparse = sparse_layers(c[f"{stack}_layers"], c[f"{stack}_sparse_step"])
            attentions = {"attention": "SelfAttention"}
            if stack == "decoder":
                attentions["cross"] = "EncDecAttention"
            yield (
                f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                f"{stack}.position_bias",
                (c["position_buckets"], c["heads"]),
            )
            for i in range(c[f"{stack}_layers"]):
                theirs, ours = f"{stack}.block.{i}.layer", f"{stack}.{i}"
                for place, (name, module) in enumerate(attentions.items()):
                    yield f"{theirs}.{place}.layer_norm.weight", f"{ours}.{name}_norm", (hidden,)
                    for matrix in ("q", "k", "v"):
                        yield f"{theirs}.{place}.{module}.{matrix}.weight", f"{ours}.{name}.{matrix}", (inner, hidden)
                    yield f"{theirs}.{place}.{module}.o.weight", f"{ours}.{name}.o", (hidden, inner)
                last = f"{theirs}.{len(attentions)}"
                yield f"{last}.layer_norm.weight", f"{ours}.feed_forward_norm", (hidden,)
                if i not in sparse:
                    yield f"{last}.mlp.wi.weight", f"{ours}.wi", (width, hidden)
                    yield f"{last}.mlp.wo.weight", f"{ours}.wo", (hidden, width)
                    continue
                yield f"{last}.mlp.router.classifier.weight", f"{ours}.router", (c["experts"], hidden)
                if c["router_bias"]:
                    yield f"{last}.mlp.router.classifier.bias", f"{ours}.router_bias", (c["experts"],)
            yield f"{stack}.final_layer_norm.weight", f"{stack}.norm", (hidden,)
        if not c["tied_head"]:
            yield HEAD, "head", vocabulary

    def matrices(self) -> dict[str, tuple[int, int]]:
        hidden, width = self.config["hidden_size"], self.config["expert_size"]
        return {"wi": (width, hidden), "wo": (hidden, width)}

    def experts(self) -> Iterator[tuple[int, int]]:
        for layer in range(len(self._sparse_blocks())):
            for expert in range(self.config["experts"]):
                yield layer, expert

    def expert(self, layer: int, expert: int) -> dict[str, str]:
        prefix = f"{self._sparse_blocks()[layer]}.mlp.experts.expert_{expert}"
        return {matrix: f"{prefix}.{matrix}.weight" for matrix in self.matrices()}

    def _sparse_blocks(self) -> list[str]:
        """Returns the name of the feed-forward part in the checkpoint, by MoE layer."""
        return [
            f"{stack}.block.{i}.layer.{1 if stack == 'encoder' else 2}"
            for stack in STACKS
            for i in sparse_layers(self.config[f"{stack}_layers"], self.config[f"{stack}_sparse_step"])
        ]


def _container_config(keys: ConfigKeys) -> dict[str, Any]:
    keys.refuse_other_architectures("SwitchTransformersForConditionalGeneration")
    for key, only in (("dense_act_fn", "relu"), ("feed_forward_proj", "relu"), ("router_dtype", "float32")):
        if keys.get(key) not in (None, only):
            raise keys.error(key, f"is {keys.get(key)!r:.60}: only {only!r} is supported")

    heads, vocab_size = keys.natural("num_heads"), keys.natural("vocab_size")
    layers = keys.natural("num_layers")
    decoder_layers = keys.natural("num_decoder_layers", default=layers)
    buckets = keys.natural("relative_attention_num_buckets", default=32)
    distance = keys.natural("relative_attention_max_distance", default=128)
    if buckets < 4 or distance <= buckets // 2:
        raise keys.error("relative_attention_num_buckets", f"is {buckets}, which does not go with {distance} positions")
    start = next((k for k in ("decoder_start_token_id", "pad_token_id") if keys.get(k) is not None), None)
    return {
        "vocab_size": vocab_size,
        "hidden_size": keys.natural("d_model"),
        "expert_size": keys.natural("d_ff"),
        "encoder_layers": layers,
        "decoder_layers": decoder_layers,
        "encoder_sparse_step": _sparse_step(keys, "encoder", layers),
        "decoder_sparse_step": _sparse_step(keys, "decoder", decoder_layers),
        "heads": heads,
        "head_dim": keys.natural("d_kv"),
        "experts": keys.natural("num_experts"),
        "expert_capacity": keys.natural("expert_capacity", default=64),
        "router_bias": keys.flag("router_bias", default=False),
        "position_buckets": buckets,
        "position_max_distance": distance,
        "norm_eps": keys.positive("layer_norm_epsilon", keys.get("layer_norm_epsilon") or 1e-6),
        "tied_head": keys.flag("tie_word_embeddings", default=True),
        "decoder_start_id": 0 if start is None else keys.token_id(start, keys.get(start), vocab_size),
        "eos_ids": keys.eos_ids(vocab_size),
    }


def _sparse_step(keys: ConfigKeys, stack: str, layers: int) -> int:
    """Returns the step as transformers does: stated, or the layers over the sparse ones, of which 3 is usual."""
    key = f"{stack}_sparse_step"
    if keys.get(key) is not None:
        return 0 if keys.get(key) == 0 else keys.natural(key)
    key = f"num_sparse_{stack}_layers"
    sparse = 0 if keys.get(key) == 0 else keys.natural(key, default=3)
    return layers if sparse == 0 else layers // sparse
