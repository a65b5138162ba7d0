"""Memory as the operating system counts it, under real limits: control groups, as engine.device.limits makes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.codec import to_json
from engine.container import Container
from engine.device.limits import MemoryLimit, best_method
from engine.offline.importing.importer import import_checkpoint
from engine.protocol import ExpertBudget, RunRequest, Totals, decode_event
from engine.quantize import Format
from engine.selftest import selftest_profile
from tests.golden.checkpoints import SHIPPED
from tests.golden.switch import SwitchRecipe

MIB = 1 << 20
PROMPT = (5, 6, 7, 8, 9, 10, 11, 12)


@dataclass(frozen=True)
class Ended:
    killed: bool
    totals: Totals | None
    tokens: tuple[int, ...]


class Limited:
    """Engines under a memory limit, each in a control group of its own, where the page cache that it fills counts."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes

    def run(self, request: RunRequest, folder: Path) -> Ended:
        path = folder / "request.json"
        path.write_text(json.dumps(to_json(request)))
        limit = MemoryLimit(self.limit_bytes, f"edgemoe-farm-test-{os.getpid()}-{time.monotonic_ns()}")
        result = subprocess.run(
            limit.command([sys.executable, "-m", "engine", "run", "--request", str(path)]), preexec_fn=limit.enter,
            capture_output=True, text=True, timeout=200, check=False, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        peak, _ = limit.peak()
        kills = limit.kills()
        limit.close()
        assert peak is not None
        assert peak <= self.limit_bytes
        if result.returncode == -9:
            assert kills == 1
            return Ended(True, None, ())
        assert result.returncode == 0, result.stderr
        events = [decode_event(line) for line in result.stdout.splitlines()]
        return Ended(False, events[-1][1]["totals"], events[2][1]["sample"].tokens)


@pytest.fixture
def limited() -> type[Limited]:
    if not best_method().startswith("cgroup"):
        pytest.skip("no memory control group can be made here: it needs root, or delegation by systemd")
    return Limited


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Container:
    """The shipped model with its experts in FP32: 96 MiB of them, so that buffers stand out."""
    return import_checkpoint(SHIPPED, tmp_path_factory.mktemp("limits") / "mix16.emoe", [Format("fp32")])


@pytest.fixture(scope="module")
def profile(wide: Container) -> str:
    path = wide.path + ".profile.json"
    selftest_profile(wide).save(path)
    return path


def request(container: Container, strategy: str, **changes: Any) -> RunRequest:
    usual: dict[str, Any] = {"prompts": (PROMPT,), "max_new_tokens": 40}
    return RunRequest("r", container.path, strategy, **{**usual, **changes})


def test_a_buffer_runs_where_all_experts_do_not_fit(
    wide: Container, profile: str, limited: Any, tmp_path: Path
) -> None:
    """And its answer is that of all experts in memory."""
    whole = limited(1 << 30).run(request(wide, "full-load"), tmp_path)
    limit = limited(100 * MIB)
    assert limit.run(request(wide, "full-load"), tmp_path).killed
    for name in ("edgemoe", "edgemoe-lookahead", "edgemoe-dequantised", "edgemoe-adaptive"):
        asked = request(wide, name, profile=profile, expert_budget=ExpertBudget(bytes=24 * MIB))
        ended = limit.run(asked, tmp_path)
        assert not ended.killed, name
        assert ended.tokens == whole.tokens


@pytest.mark.parametrize("strategy", ["edgemoe", "edgemoe-buffer", "edgemoe-adaptive", "edgemoe-dequantised"])
def test_the_peak_is_that_of_no_buffer_and_the_budget(
    wide: Container, profile: str, limited: Any, tmp_path: Path, strategy: str
) -> None:
    limit = limited(1 << 30)
    # Which holds the non-experts in FP32, where native kernels leave them as they are.
    backend = "numpy" if strategy == "edgemoe-dequantised" else "auto"
    none = limit.run(request(wide, "naive-swap", backend=backend), tmp_path).totals
    for budget in (8 * MIB, 40 * MIB):
        asked = request(wide, strategy, profile=profile, expert_budget=ExpertBudget(bytes=budget), backend=backend)
        peak = limit.run(asked, tmp_path).totals.peak_resident_bytes
        # Over naive-swap, which holds an expert of 0.75 MiB at a time: the budget, the profile, a thread and its stack.
        assert peak - none.peak_resident_bytes < budget + 8 * MIB
    assert peak - none.peak_resident_bytes > 20 * MIB  # or nothing was buffered, and nothing shown


@pytest.mark.heavy
def test_switch_base_8_runs_in_a_gigabyte(limited: Any, tmp_path: Path) -> None:
    """A checkpoint of exactly its shapes, with random weights: 619 million parameters, 2.5 GB in FP32."""
    recipe = SwitchRecipe(
        "switch-base-8", seed=1, vocab=32128, hidden=768, width=3072, layers=(12, 12), heads=12, head_dim=64, experts=8,
        dtype="bfloat16", shards=4, spread=0.04,
    )  # fmt: skip
    container = import_checkpoint(recipe.write(tmp_path / "hf"), tmp_path / "base-8.emoe", [Format("int4", 32)])
    profile = tmp_path / "profile.json"
    selftest_profile(container).save(str(profile))
    limit = limited(1_000_000_000)
    whole = limited(4 << 30).run(request(container, "full-load", max_new_tokens=16), tmp_path)
    for strategy in ("naive-swap", "edgemoe", "edgemoe-combined"):
        budget = None if strategy == "naive-swap" else ExpertBudget(experts=10)
        asked = request(container, strategy, max_new_tokens=16, profile=str(profile), expert_budget=budget)
        ended = limit.run(asked, tmp_path)
        assert not ended.killed
        assert ended.tokens == whole.tokens
        assert ended.totals.peak_resident_bytes < 1_000_000_000
        print(f"{strategy}: peak resident set {ended.totals.peak_resident_bytes / 1e6:.0f} MB")
