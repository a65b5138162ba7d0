"""The engine beside transformers itself: only where torch is installed, which ci/oracle sees to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch and transformers: run ci/oracle")
transformers = pytest.importorskip("transformers", reason="needs torch and transformers: run ci/oracle")

from engine.generate import Engine  # noqa: E402
from engine.offline.accuracy.model import OfflineModel  # noqa: E402
from engine.offline.accuracy.perplexity import evaluate  # noqa: E402
from engine.offline.importing.importer import import_checkpoint  # noqa: E402
from engine.offline.tokenizer import Tokenizer  # noqa: E402
from engine.protocol import Sampling  # noqa: E402
from engine.quantize import Format  # noqa: E402
from engine.strategies import strategy_named  # noqa: E402
from tests.golden.checkpoints import CONTEXT, HELD_OUT, SHIPPED  # noqa: E402
from tests.programs.golden import load, perplexity  # noqa: E402

SIZES = {  # hidden, width of an expert, heads, key and value heads, head_dim
    "gqa": (64, 96, 4, 2, None),
    "mha": (48, 40, 3, 3, None),
    "odd": (36, 50, 6, 2, 10),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_size", ["1GB", "40KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_what_save_pretrained_writes(size: str, dtype: str, shard_size: str, tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(7)
    hidden, width, heads, kv_heads, head_dim = SIZES[size]
    config = transformers.MixtralConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=120,
        num_hidden_layers=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 20_000.0},
        sliding_window=None,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    written = transformers.MixtralForCausalLM(config).to(getattr(torch, dtype))
    written.save_pretrained(tmp_path / "hf", max_shard_size=shard_size)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (shard_size == "40KB")
    theirs = load(tmp_path / "hf")
    container = import_checkpoint(tmp_path / "hf", tmp_path / "m.emoe", [Format("fp32")])

    prompt = tuple(int(t) for t in np.random.RandomState(5).randint(3, 120, 20))
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt])).logits[0].numpy()
        # Here with transformers' own cache and generation loop; the golden values go without either.
        theirs.generation_config.eos_token_id = None
        greedy = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64)
    np.testing.assert_allclose(OfflineModel(container).logits(prompt), logits, rtol=0, atol=1e-4)
    engine = Engine(container, strategy_named("full-load"))
    try:
        tokens, _ = engine.generate(prompt, 64, Sampling())
    finally:
        engine.close()
    assert list(tokens) == greedy[0, len(prompt) :].tolist()


@pytest.mark.parametrize("path", HELD_OUT, ids=lambda path: path.name)
def test_perplexity_of_the_shipped_model_on_whole_texts(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    hf_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(SHIPPED / "tokenizer.json"))
    theirs = perplexity(load(SHIPPED), hf_tokenizer, text)
    container = import_checkpoint(SHIPPED, tmp_path / "mix16.emoe")
    tokens = Tokenizer.from_container(container.path).encode(text)
    ours = evaluate(OfflineModel(container), tokens, len(text.encode()), CONTEXT)
    assert (ours.tokens, ours.scored_tokens) == (theirs["tokens"], theirs["scored"])
    assert ours.perplexity == pytest.approx(np.exp(theirs["nats_per_token"]), rel=1e-3)


def test_the_shipped_configuration_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    theirs = transformers.MixtralConfig.from_pretrained(SHIPPED)
    ours: dict[str, Any] = import_checkpoint(SHIPPED, tmp_path / "m.emoe").config
    assert ours["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert (ours["norm_eps"], ours["experts"]) == (theirs.rms_norm_eps, theirs.num_local_experts)
    assert json.loads((SHIPPED / "config.json").read_text())["model_type"] == theirs.model_type
