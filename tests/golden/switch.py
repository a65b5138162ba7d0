"""Small random Switch Transformers checkpoints in the Hugging Face layout; see tests.golden.checkpoints."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.checkpoints import stored, write_checkpoint


@dataclass(frozen=True)
class SwitchRecipe:
    """What a checkpoint is like; layers and sparse steps as (encoder, decoder)."""

    name: str
    seed: int
    vocab: int = 160
    hidden: int = 48
    width: int = 64
    layers: tuple[int, int] = (4, 4)
    sparse_steps: tuple[int, int] = (2, 2)
    heads: int = 4
    head_dim: int = 12
    experts: int = 6
    capacity: int = 64
    router_bias: bool = False
    buckets: int = 32
    max_distance: int = 128
    tied: bool = True
    dtype: str = "float32"
    shards: int = 1
    spread: float = 0.2
    embed_spread: float = 0.3
    prompt_length: int = 40
    decoder_length: int = 20

    @property
    def config(self) -> dict[str, Any]:
        sparse = [
            sum(step == 1 or layer % step == 1 for layer in range(layers))
            for layers, step in zip(self.layers, self.sparse_steps, strict=True)
        ]
        return {
            "architectures": ["SwitchTransformersForConditionalGeneration"],
            "model_type": "switch_transformers",
            "is_encoder_decoder": True,
            "vocab_size": self.vocab,
            "d_model": self.hidden,
            "d_ff": self.width,
            "d_kv": self.head_dim,
            "num_heads": self.heads,
            "num_layers": self.layers[0],
            "num_decoder_layers": self.layers[1],
            "num_sparse_encoder_layers": sparse[0],
            "num_sparse_decoder_layers": sparse[1],
            "encoder_sparse_step": self.sparse_steps[0],
            "decoder_sparse_step": self.sparse_steps[1],
            "num_experts": self.experts,
            "expert_capacity": self.capacity,
            "router_bias": self.router_bias,
            "router_dtype": "float32",
            "relative_attention_num_buckets": self.buckets,
            "relative_attention_max_distance": self.max_distance,
            "layer_norm_epsilon": 1e-6,
            "dense_act_fn": "relu",
            "tie_word_embeddings": self.tied,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": self.dtype,
        }

    def _tokens(self, seed: int, length: int) -> tuple[int, ...]:
        random = np.random.RandomState(self.seed + seed)
        return tuple(int(token) for token in random.randint(2, self.vocab, length))

    @property
    def prompt(self) -> tuple[int, ...]:
        return self._tokens(1_000_000, self.prompt_length)

    @property
    def decoder_tokens(self) -> tuple[int, ...]:
        return (0, *self._tokens(2_000_000, self.decoder_length - 1))

    def weights(self) -> dict[str, np.ndarray]:
        random = np.random.RandomState(self.seed)
        inner = self.heads * self.head_dim

        def matrix(rows: int, columns: int, spread: float = self.spread) -> np.ndarray:
            return stored(random.standard_normal((rows, columns)) * spread, self.dtype)

        def norm() -> np.ndarray:
            return stored(1 + 0.2 * random.standard_normal(self.hidden), self.dtype)

        # Narrow embeddings: else a tied head finds the token that came in, and greedy decoding repeats it.
        tensors = {"shared.weight": matrix(self.vocab, self.hidden, self.embed_spread)}
        for stack, layers, step in zip(("encoder", "decoder"), self.layers, self.sparse_steps, strict=True):
            attentions = ["SelfAttention"] if stack == "encoder" else ["SelfAttention", "EncDecAttention"]
            tensors[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = matrix(
                self.buckets, self.heads, 1.0
            )
            for i in range(layers):
                for place, module in enumerate(attentions):
                    prefix = f"{stack}.block.{i}.layer.{place}"
                    tensors[f"{prefix}.layer_norm.weight"] = norm()
                    for name in ("q", "k", "v"):
                        tensors[f"{prefix}.{module}.{name}.weight"] = matrix(inner, self.hidden)
                    tensors[f"{prefix}.{module}.o.weight"] = matrix(self.hidden, inner)
                prefix = f"{stack}.block.{i}.layer.{len(attentions)}"
                tensors[f"{prefix}.layer_norm.weight"] = norm()
                if not (step == 1 or i % step == 1):
                    tensors[f"{prefix}.mlp.wi.weight"] = matrix(self.width, self.hidden)
                    tensors[f"{prefix}.mlp.wo.weight"] = matrix(self.hidden, self.width)
                    continue
                tensors[f"{prefix}.mlp.router.classifier.weight"] = matrix(self.experts, self.hidden, 0.4)
                if self.router_bias:
                    tensors[f"{prefix}.mlp.router.classifier.bias"] = matrix(1, self.experts, 1.0)[0]
                for expert in range(self.experts):
                    name = f"{prefix}.mlp.experts.expert_{expert}"
                    tensors[f"{name}.wi.weight"] = matrix(self.width, self.hidden, 2 * self.spread)
                    tensors[f"{name}.wo.weight"] = matrix(self.hidden, self.width, 2 * self.spread)
            tensors[f"{stack}.final_layer_norm.weight"] = norm()
        if not self.tied:
            # As transformers 5 writes it: three tables of embeddings, of which the shared one is never used.
            tensors["lm_head.weight"] = matrix(self.vocab, self.hidden)
            for stack in ("encoder", "decoder"):
                tensors[f"{stack}.embed_tokens.weight"] = matrix(self.vocab, self.hidden, self.embed_spread)
        return tensors

    def write(self, folder: Path) -> Path:
        """The checkpoint, in `folder`."""
        write_checkpoint(folder, self.config, self.weights(), self.shards)
        return folder

    def sha256(self) -> str:
        """Returns the hash of the configuration and all weights: the golden values belong to exactly these."""
        digest = hashlib.sha256(json.dumps([self.config, self.prompt, self.decoder_tokens], sort_keys=True).encode())
        for name, tensor in sorted(self.weights().items()):
            digest.update(name.encode())
            digest.update(tensor.tobytes())
        return digest.hexdigest()


SWITCH_RECIPES = (
    SwitchRecipe("switch-every-second", seed=151),
    SwitchRecipe("switch-every-layer-bf16", seed=152, layers=(3, 2), sparse_steps=(1, 1), heads=5, head_dim=6,
                 hidden=32, experts=5, dtype="bfloat16", shards=3),
    SwitchRecipe("switch-over-capacity", seed=133, capacity=3, experts=3, prompt_length=50, decoder_length=30),
    SwitchRecipe("switch-untied-with-bias", seed=104, tied=False, router_bias=True, experts=9, sparse_steps=(3, 2)),
    SwitchRecipe("switch-near-positions", seed=155, layers=(2, 6), sparse_steps=(2, 4), buckets=8, max_distance=20,
                 prompt_length=90, experts=16, decoder_length=40),
    SwitchRecipe("switch-long-prompt", seed=156, layers=(2, 2), prompt_length=300, capacity=40, dtype="float16",
                 experts=8),
)  # fmt: skip
