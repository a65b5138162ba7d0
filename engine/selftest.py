"""Proves on a device that arithmetic, container reading and every strategy work there. Takes seconds."""

from __future__ import annotations

import os
import tempfile
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np

from engine.container import Container, ContainerWriter
from engine.errors import EngineError, StorageError
from engine.experts.profile import PathCounter, PathProfile
from engine.generate import Engine
from engine.kernels import Kernels, make_kernels
from engine.protocol import READERS, ExpertBudget, Sampling
from engine.quantize import BITS, FLOATS, GROUPS, Format, MatrixShape, RecordLayout
from engine.strategies import STRATEGIES

_MIXTRAL: Dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "expert_size": 40, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 12,
    "experts": 4, "top_k": 2, "rope_theta": 10000.0, "norm_eps": 1e-5, "max_positions": 64, "sliding_window": None,
    "tied_head": False, "bos_id": None, "eos_ids": [],
}  # fmt: skip
_SWITCH: Dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "expert_size": 40, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_sparse_step": 2, "decoder_sparse_step": 1, "heads": 4, "head_dim": 12, "experts": 4, "expert_capacity": 3,
    "router_bias": True, "position_buckets": 8, "position_max_distance": 20, "norm_eps": 1e-6, "tied_head": False,
    "shared_embed": True, "decoder_start_id": 0, "eos_ids": [],
}  # fmt: skip
_PROMPT, _NEW_TOKENS = (1, 17, 5, 80, 33), 8


def selftest(folder: Optional[str], report: Callable[[Dict[str, Any]], None], only: Optional[str] = None) -> bool:
    """Reports each check, or `only` one, as {"check", "ok", "detail"} and returns whether all of them held."""
    checks = {"arithmetic": _check_arithmetic, "strategies": _check_strategies, "damage": _check_damage}
    all_ok = True
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name in checks if only is None else (only,):
            try:
                ok, detail = checks[name](scratch)
            except (EngineError, OSError) as error:
                ok, detail = False, str(error)
            report({"check": name, "ok": ok, "detail": detail})
            all_ok = all_ok and ok
    return all_ok


def all_formats() -> List[Format]:
    quantised = [Format(p, g, s) for p in BITS for g in GROUPS for s in (True, False)]
    return [Format(p) for p in FLOATS] + quantised


def write_random_model(
    path: str, formats: List[Format], *, mixed: bool = False, seed: int = 0, architecture: str = "mixtral"
) -> None:
    """Writes a small model with random weights, strong enough that its experts matter.

    Its experts stand in all formats, or with `mixed` in one each, by turns.
    """
    random = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.2).astype(np.float32)

    config = _MIXTRAL if architecture == "mixtral" else _SWITCH
    tensors = _mixtral_tensors() if architecture == "mixtral" else _switch_tensors()
    hidden, width = config["hidden_size"], config["expert_size"]
    wide = ("gate", "up") if architecture == "mixtral" else ("wi",)
    with ContainerWriter(path, architecture=architecture, config=config, formats=formats) as writer:
        for name, shape in tensors:
            scale, offset = (5, 0) if name == "embed" else (1, 1) if name.endswith("norm") else (1, 0)
            writer.add_tensor(name, weights(*shape) * scale + np.float32(offset))
        for layer in range(config["layers"] if architecture == "mixtral" else 4):
            for expert in range(config["experts"]):
                matrices = {name: weights(width, hidden) for name in wide}
                matrices["down" if architecture == "mixtral" else "wo"] = weights(hidden, width)
                writer.add_expert(layer, expert, matrices, [(layer + expert) % len(formats)] if mixed else None)


def _mixtral_tensors() -> Iterator[Tuple[str, Tuple[int, ...]]]:
    c, hidden = _MIXTRAL, _MIXTRAL["hidden_size"]
    queries, keys = c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
    yield "embed", (c["vocab_size"], hidden)
    for i in range(c["layers"]):
        yield f"layers.{i}.attention_norm", (hidden,)
        yield f"layers.{i}.q", (queries, hidden)
        yield f"layers.{i}.k", (keys, hidden)
        yield f"layers.{i}.v", (keys, hidden)
        yield f"layers.{i}.o", (hidden, queries)
        yield f"layers.{i}.moe_norm", (hidden,)
        yield f"layers.{i}.router", (c["experts"], hidden)
    yield "norm", (hidden,)
    yield "head", (c["vocab_size"], hidden)


def _switch_tensors() -> Iterator[Tuple[str, Tuple[int, ...]]]:
    c, hidden, width = _SWITCH, _SWITCH["hidden_size"], _SWITCH["expert_size"]
    inner = c["heads"] * c["head_dim"]
    yield "embed", (c["vocab_size"], hidden)
    for stack in ("encoder", "decoder"):
        yield f"{stack}.position_bias", (c["position_buckets"], c["heads"])
        for i in range(c[f"{stack}_layers"]):
            for attention in ("attention", "cross")[: 1 if stack == "encoder" else 2]:
                yield f"{stack}.{i}.{attention}_norm", (hidden,)
                for name in ("q", "k", "v"):
                    yield f"{stack}.{i}.{attention}.{name}", (inner, hidden)
                yield f"{stack}.{i}.{attention}.o", (hidden, inner)
            yield f"{stack}.{i}.feed_forward_norm", (hidden,)
            if stack == "decoder" or i % 2 == 1:
                yield f"{stack}.{i}.router", (c["experts"], hidden)
                yield f"{stack}.{i}.router_bias", (c["experts"],)
            else:
                yield f"{stack}.{i}.wi", (width, hidden)
                yield f"{stack}.{i}.wo", (hidden, width)
        yield f"{stack}.norm", (hidden,)
    yield "head", (c["vocab_size"], hidden)


def selftest_profile(container: Container) -> PathProfile:
    """Returns a profile of what the self-test itself generates."""
    engine = Engine(container, STRATEGIES["full-load"])
    try:
        tokens, _ = engine.generate(_PROMPT, _NEW_TOKENS, Sampling())
        first = engine.model.config.first_layer
        seen: List[List[Tuple[int, ...]]] = [[] for _ in range(container.moe_layers)]

        def observe(layer: int, chosen: np.ndarray) -> None:
            seen[layer].extend(map(tuple, chosen.tolist()))

        state = engine.model.start(len(_PROMPT), len(tokens) + 1)
        engine.model.prefill(np.array(_PROMPT), state, engine.supply, observe=observe)
        engine.model.forward(np.array(tokens), state, engine.supply, observe=observe)
    finally:
        engine.close()
    counter = PathCounter(container.moe_layers, container.experts_per_layer, first)
    before = _PROMPT if first == 0 else (_SWITCH["decoder_start_id"],)
    counter.observe(list(zip(*seen[first:])), before + tokens)
    return counter.finish()


def _check_arithmetic(scratch: str) -> Tuple[bool, str]:
    """Compares products with packed weights with float64 products of the same weights, for every format."""
    random = np.random.default_rng(1)
    weight = random.standard_normal((24, 72)).astype(np.float32)
    x = random.standard_normal((9, 72)).astype(np.float32)
    (best, notes), numpy_kernels = make_kernels("auto"), Kernels()
    worst = {"numpy": 0.0, best.backend: 0.0}
    for fmt in all_formats():
        layout = RecordLayout.of(fmt, [MatrixShape("w", *weight.shape)])
        packed = layout.unpack(layout.pack({"w": weight}))["w"]
        restored = numpy_kernels.product(packed, np.eye(72, dtype=np.float32)).T  # (24, 72), as the arithmetic sees it
        steps = {"int8": 0.03, "int4": 0.5, "int3": 1.1, "int2": 3.5, "fp32": 0.0, "fp16": 0.002, "bf16": 0.02}
        if np.abs(restored - weight).max() > steps[fmt.precision]:
            return False, f"{fmt.label}: weights come back off by {np.abs(restored - weight).max():.3g}"
        expected = x.astype(np.float64) @ restored.T.astype(np.float64)
        for kernels in (numpy_kernels, best):
            for rows in (1, len(x)):
                error = np.abs(kernels.product(packed, x[:rows]) - expected[:rows]).max() / np.abs(expected).max()
                worst[kernels.backend] = max(worst[kernels.backend], float(error))
    names = {"numpy": "numpy", "native": f"native {best.variant}"}
    found = ", ".join(f"{names[backend]} {error:.1e}" for backend, error in worst.items())
    detail = "; ".join([f"largest relative error over {len(all_formats())} formats: {found}", *notes])
    return worst["numpy"] < 1e-5 and worst[best.backend] < 1e-4, detail


def _check_strategies(scratch: str) -> Tuple[bool, str]:
    """Checks that every strategy, reader and budget gives the tokens of full-load on the same records."""
    done = 0
    floats, integers = Format("fp32"), [Format(p, 32, symmetric=False) for p in ("int8", "int4", "int2")]
    for formats, mixed, architecture, readers in (
        ([floats, *integers], False, "mixtral", READERS),
        (integers[1:], True, "mixtral", READERS),
        ([floats, *integers], False, "switch_transformers", READERS[:1]),
    ):
        path = os.path.join(scratch, "model.emoe")
        write_random_model(path, formats, mixed=mixed, architecture=architecture)
        container = Container.open(path)
        profile = selftest_profile(container)
        expected: Dict[str, Tuple[int, ...]] = {}
        for strategy in STRATEGIES.values():
            if strategy.relief is not None or (mixed and strategy.precision != "stored"):
                continue
            budgets = [ExpertBudget(experts=n) for n in (1, 3, 16)] if strategy.has_budget else [None]
            for reader in readers:
                for budget in budgets:
                    engine = Engine(container, strategy, expert_budget=budget, profile=profile, reader=reader)
                    try:
                        tokens, _ = engine.generate(_PROMPT, _NEW_TOKENS, Sampling())
                    finally:
                        engine.close()
                    done += 1
                    if expected.setdefault(strategy.precision, tokens) != tokens:
                        return False, (
                            f"{strategy.name} ({reader}, {budget}) gives {tokens}, "
                            f"others {expected[strategy.precision]}"
                        )
    return True, f"{done} combinations of strategy, reader and budget give the same tokens"


def _check_damage(scratch: str) -> Tuple[bool, str]:
    """Checks that one flipped bit in an expert is noticed."""
    path = os.path.join(scratch, "damaged.emoe")
    write_random_model(path, [Format("int8", 32)])
    container = Container.open(path)
    with open(path, "r+b") as file:
        file.seek(container.records[0].offset + 100)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    try:
        Engine(container, STRATEGIES["full-load"]).close()
    except StorageError as error:
        return "damaged" in str(error), "a flipped bit is refused"
    return False, "a flipped bit was not noticed"
