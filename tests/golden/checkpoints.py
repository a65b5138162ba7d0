"""Small random Mixtral checkpoints in the Hugging Face layout, the same bytes wherever they are made.

Both sides of the comparison read them: transformers, when the golden values are made, and our importer, in the tests.
Weights come from numpy's RandomState, whose stream is frozen for ever. They are wide enough that the experts matter:
with the usual initialiser of 0.02 the logits of a tiny model hardly depend on them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DEMO = Path(__file__).resolve().parents[2] / "harness" / "demo"
SHIPPED = DEMO / "mix16"
HELD_OUT = tuple(sorted((DEMO / "texts").glob("*.val.txt")))
CONTEXT = 256  # tokens of a window

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Returns float64 values as a checkpoint stores them, in the same bytes with any library.

    Releases of ml_dtypes differ in whether bfloat16 is rounded from float64 at once, or from float32.
    """
    rounded = values.astype(np.float32) if dtype == "bfloat16" else values
    return rounded.astype(DTYPES[dtype])


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint is like; field names as in config.json where they are short enough."""

    name: str
    seed: int
    vocab: int = 160
    hidden: int = 64
    width: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None  # None: left out of config.json
    experts: int = 8
    top_k: int = 2
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    sliding_window: int | None = None
    tied: bool = False
    dtype: str = "float32"
    shards: int = 1
    new_keys: bool = False  # config.json as transformers 5 writes it
    spread: float = 0.15  # standard deviation of the weights
    prompt_length: int = 24

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_act": "silu",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": 256,
            "rms_norm_eps": self.norm_eps,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        if self.head_dim is not None:
            config["head_dim"] = self.head_dim
        if self.new_keys:
            rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
            return {**config, "dtype": self.dtype, "rope_parameters": rope}
        return {**config, "torch_dtype": self.dtype, "rope_theta": self.rope_theta, "rope_scaling": None}

    @property
    def prompt(self) -> tuple[int, ...]:
        random = np.random.RandomState(self.seed + 1_000_000)
        return tuple(int(token) for token in random.randint(2, self.vocab, self.prompt_length))

    def weights(self) -> dict[str, np.ndarray]:
        random = np.random.RandomState(self.seed)
        head_dim = self.head_dim or self.hidden // self.heads
        queries, keys = self.heads * head_dim, self.kv_heads * head_dim

        def matrix(rows: int, columns: int) -> np.ndarray:
            return stored(random.standard_normal((rows, columns)) * self.spread, self.dtype)

        def norm() -> np.ndarray:
            return stored(1 + 0.2 * random.standard_normal(self.hidden), self.dtype)

        tensors = {"model.embed_tokens.weight": matrix(self.vocab, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            tensors[f"{prefix}.input_layernorm.weight"] = norm()
            tensors[f"{prefix}.self_attn.q_proj.weight"] = matrix(queries, self.hidden)
            tensors[f"{prefix}.self_attn.k_proj.weight"] = matrix(keys, self.hidden)
            tensors[f"{prefix}.self_attn.v_proj.weight"] = matrix(keys, self.hidden)
            tensors[f"{prefix}.self_attn.o_proj.weight"] = matrix(self.hidden, queries)
            tensors[f"{prefix}.post_attention_layernorm.weight"] = norm()
            tensors[f"{prefix}.block_sparse_moe.gate.weight"] = matrix(self.experts, self.hidden)
            for expert in range(self.experts):
                for name, shape in (
                    ("w1", (self.width, self.hidden)),
                    ("w2", (self.hidden, self.width)),
                    ("w3", (self.width, self.hidden)),
                ):
                    tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = matrix(*shape)
        tensors["model.norm.weight"] = norm()
        if not self.tied:
            tensors["lm_head.weight"] = matrix(self.vocab, self.hidden)
        return tensors

    def write(self, folder: Path) -> Path:
        """The checkpoint, in `folder`."""
        write_checkpoint(folder, self.config, self.weights(), self.shards)
        return folder

    def sha256(self) -> str:
        """Returns the hash of the configuration and all weights: the golden values belong to exactly these."""
        digest = hashlib.sha256(json.dumps([self.config, self.prompt], sort_keys=True).encode())
        for name, tensor in sorted(self.weights().items()):
            digest.update(name.encode())
            digest.update(tensor.tobytes())
        return digest.hexdigest()


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file_name, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def held_out_text(path: Path) -> str:
    """Enough of it for a perplexity, little enough for a test."""
    return path.read_text(encoding="utf-8")[:6000]


RECIPES = (
    Recipe("gqa", seed=1),
    Recipe("mha-odd-sizes", seed=2, hidden=60, width=52, heads=6, kv_heads=6, experts=5, top_k=3, rope_theta=1e6),
    Recipe("tied-bf16", seed=3, vocab=97, tied=True, dtype="bfloat16", new_keys=True, spread=0.2),
    Recipe("sharded-f16", seed=4, hidden=48, width=40, layers=2, dtype="float16", shards=3, top_k=1, rope_theta=500.0),
    Recipe("wide-heads", seed=15, hidden=40, width=72, heads=4, kv_heads=1, head_dim=24, new_keys=True, norm_eps=1e-6),
    Recipe("one-expert", seed=6, hidden=32, width=33, experts=1, top_k=1, layers=2, tied=True, spread=0.2),
    Recipe("all-experts", seed=7, hidden=128, width=64, experts=2, top_k=2, layers=5, vocab=300, spread=0.12),
    Recipe("sliding-window", seed=8, sliding_window=10, layers=2),
)
