"""Switch Transformers beside transformers itself: only where torch is installed, which ci/oracle sees to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch and transformers: run ci/oracle")
transformers = pytest.importorskip("transformers", reason="needs torch and transformers: run ci/oracle")

from transformers.models.switch_transformers import modeling_switch_transformers as modeling  # noqa: E402

from engine.generate import Engine  # noqa: E402
from engine.models.switch import relative_buckets  # noqa: E402
from engine.offline.accuracy.model import OfflineModel  # noqa: E402
from engine.offline.importing.importer import import_checkpoint  # noqa: E402
from engine.offline.importing.layout import ConfigKeys  # noqa: E402
from engine.offline.importing.switch import SwitchLayout  # noqa: E402
from engine.protocol import Sampling  # noqa: E402
from engine.quantize import Format  # noqa: E402
from engine.strategies import strategy_named  # noqa: E402
from tests.programs.golden import load_switch  # noqa: E402

RELEASED = {  # by name: d_model, d_ff, d_kv, heads, layers, experts; google/switch-* on Hugging Face
    "base-8": (768, 3072, 64, 12, 12, 8),
    "base-16": (768, 3072, 64, 12, 12, 16),
    "base-32": (768, 3072, 64, 12, 12, 32),
    "base-64": (768, 3072, 64, 12, 12, 64),
    "base-128": (768, 3072, 64, 12, 12, 128),
    "base-256": (768, 3072, 64, 12, 12, 256),
    "large-128": (1024, 2816, 64, 16, 24, 128),
}

# As many in both stacks: transformers' own generation fails where they differ; the golden values have such a model.
EVERY_LAYER = dict.fromkeys(
    ("num_layers", "num_decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers"), 3
)


def released(name: str) -> Any:
    d_model, d_ff, d_kv, heads, layers, experts = RELEASED[name]
    return transformers.SwitchTransformersConfig(
        vocab_size=32128, d_model=d_model, d_ff=d_ff, d_kv=d_kv, num_heads=heads, num_layers=layers,
        num_decoder_layers=layers, num_sparse_encoder_layers=layers // 2, num_sparse_decoder_layers=layers // 2,
        num_experts=experts, expert_capacity=64,
    )  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_the_names_and_shapes_of_the_released_models(name: str, tmp_path: Path) -> None:
    """Returns the shapes that transformers builds from their configurations, on the meta device: no memory."""
    config = released(name)
    with torch.device("meta"):
        model = modeling.SwitchTransformersForConditionalGeneration(config)
    with torch.no_grad():
        expected = {key: tuple(value.shape) for key, value in saved_names(model, tmp_path).items()}
    keys = ConfigKeys({**config.to_dict(), "architectures": ["SwitchTransformersForConditionalGeneration"]}, "c.json")
    layout = SwitchLayout(SwitchLayout.read_config(keys, EmptyCheckpoint()))
    layout.check()
    ours = dict(layout.shapes())
    copies = {copy for copy, _ in layout.copies()}
    assert expected.keys() - copies == ours.keys()
    assert ours == {key: shape for key, shape in expected.items() if key in ours}


class EmptyCheckpoint:
    """One that stores no table of embeddings twice."""

    tensors: ClassVar[dict[str, Any]] = {}


def saved_names(model: Any, folder: Path) -> dict[str, Any]:
    """The tensors as save_pretrained names them: experts one by one, whatever holds them in memory."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 holds them as it saves them
        return dict(model.state_dict())
    return dict(revert_weight_conversion(model, model.state_dict()))


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [{}, EVERY_LAYER, {"num_experts": 9, "d_kv": 5, "num_heads": 7}],
    ids=["every-second", "every-layer", "odd"],
)
def test_what_save_pretrained_writes(changes: dict[str, int], dtype: str, shard_size: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    usual = {
        "vocab_size": 120, "d_model": 32, "d_ff": 40, "d_kv": 8, "num_heads": 4, "num_layers": 4,
        "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_experts": 4,
        "decoder_start_token_id": 0, "initializer_factor": 1.0,
    }  # fmt: skip
    config = transformers.SwitchTransformersConfig(**{**usual, **changes})
    written = modeling.SwitchTransformersForConditionalGeneration(config).to(getattr(torch, dtype))
    written.save_pretrained(tmp_path / "hf", max_shard_size=shard_size)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (shard_size == "40KB")
    theirs = load_switch(tmp_path / "hf")
    container = import_checkpoint(tmp_path / "hf", tmp_path / "m.emoe", [Format("fp32")])

    random = np.random.RandomState(5)
    prompt = tuple(int(t) for t in random.randint(2, 120, 20))
    fed = (0, *(int(t) for t in random.randint(2, 120, 11)))
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([fed])).logits[0].numpy()
        # Here with transformers' own cache and generation loop; the golden values go without the latter.
        theirs.generation_config.eos_token_id = None
        greedy = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=48)
    scale = max(1.0, float(np.abs(logits).max()))
    np.testing.assert_allclose(OfflineModel(container).logits(prompt, fed), logits, rtol=0, atol=1e-4 * scale)
    engine = Engine(container, strategy_named("full-load"))
    try:
        tokens, _ = engine.generate(prompt, 48, Sampling())
    finally:
        engine.close()
    assert list(tokens) == greedy[0, 1:].tolist()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (64, 512)])
def test_the_buckets_of_relative_positions(bidirectional: bool, buckets: int, distance: int) -> None:
    between = np.arange(-700, 701)
    theirs = modeling.SwitchTransformersAttention._relative_position_bucket(
        torch.tensor(between), bidirectional=bidirectional, num_buckets=buckets, max_distance=distance
    )
    assert relative_buckets(between, bidirectional, buckets, distance).tolist() == theirs.tolist()
