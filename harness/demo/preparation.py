"""Prepares what the demonstration measures: the trained model that ships with the farm, and its matrix."""

from __future__ import annotations

import shutil
from pathlib import Path

from harness.demo.loopback import Emulated
from harness.sweep.matrix import Matrix, parse_matrix

DEVICES = (
    Emulated("pi4b-emulated", 43e6),  # a Raspberry Pi 4B reading from its SD card
    Emulated("jetson-tx2-emulated", 200e6),  # a Jetson TX2 reading from its SSD
)
_SHIPPED = Path(__file__).parent
_KINDS = ("bible", "novel", "sotu")  # of text, for the profile
_PROFILE_CHARACTERS = 40_000  # of each kind: ten thousand tokens, counted in seconds


def import_model(folder: Path) -> Path:
    """Imports the model into `folder`; returns the container."""
    from engine.offline.importing.importer import import_checkpoint

    container = folder / "mix16.emoe"
    origin = {"origin": "trained for edgemoe-farm, see harness/demo/mix16/README.md", "licence": "research use"}
    import_checkpoint(_SHIPPED / "mix16", container, origin=origin)
    return container


def count_paths(container: Path) -> Path:
    """Counts the activation paths of the container on the texts that ship with it; returns the profile."""
    from engine.offline.accuracy.model import counting_model
    from engine.offline.routing.activations import profile_texts
    from engine.offline.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_container(str(container))
    texts = [
        (_SHIPPED / "texts" / f"{kind}.train.txt").read_text(encoding="utf-8")[:_PROFILE_CHARACTERS] for kind in _KINDS
    ]
    profile = container.with_name("mix16.profile.json")
    with counting_model(str(container)) as model:
        profile_texts(model, [tokenizer.encode(text) for text in texts]).save(str(profile))
    return profile


def write_matrix(folder: Path, *, quick: bool, backend: str) -> Matrix:
    """Writes matrix and prompts to `folder`, for later readers, and returns the matrix; `quick` is one block."""
    text = (_SHIPPED / "matrix.toml").read_text(encoding="utf-8").replace('backend = "auto"', f'backend = "{backend}"')
    if quick:
        text = text.replace("blocks = 3", "blocks = 1")
    shutil.copyfile(_SHIPPED / "texts" / "novel.val.txt", folder / "prompts.txt")
    (folder / "matrix.toml").write_text(text, encoding="utf-8")
    return parse_matrix(text, source=str(folder / "matrix.toml"), folder=folder)
