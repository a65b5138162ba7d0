from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.container import Container
from engine.offline.importing.importer import import_checkpoint
from tests.golden.checkpoints import SHIPPED, Recipe, write_checkpoint

Change = Callable[[dict, dict], None]  # of config.json and of the tensors

TINY = Recipe("tiny", seed=99, vocab=40, hidden=16, width=12, layers=2, heads=2, kv_heads=1, experts=3)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny checkpoint, changed."""

    def write(change: Change = lambda config, tensors: None, recipe: Recipe = TINY) -> Path:
        config, tensors = recipe.config, recipe.weights()
        change(config, tensors)
        write_checkpoint(tmp_path / "checkpoint", config, tensors, recipe.shards)
        return tmp_path / "checkpoint"

    return write


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Container:
    """The demonstration model as it is imported by default."""
    return import_checkpoint(SHIPPED, tmp_path_factory.mktemp("shipped") / "mix16.emoe")
