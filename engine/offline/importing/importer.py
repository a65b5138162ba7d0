"""Imports a Hugging Face checkpoint as an expert container."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engine.container import MAGIC, Container, ContainerWriter
from engine.errors import ContainerError
from engine.models import ARCHITECTURES
from engine.offline.importing.checkpoint import BFLOAT16, Checkpoint, CheckpointError
from engine.offline.importing.layout import Layout
from engine.offline.tokenizer import Tokenizer
from engine.quantize import FLOATS, Format

# 32 columns to a scale, with a zero point: of the integer formats the one that loses least at every width.
DEFAULT_GROUP = 32
DEFAULT_SYMMETRIC = False

Progress = Callable[[int, int], None]  # (done, of)


def formats_of(precisions: Sequence[str], group: int | None, symmetric: bool | None) -> tuple[Format, ...]:
    """Returns formats for experts, the first the primary one; group and symmetry (None: default) are for integers."""
    formats = tuple(
        Format(p)
        if p in FLOATS
        else Format(
            p,
            DEFAULT_GROUP if group is None else group,
            DEFAULT_SYMMETRIC if symmetric is None else symmetric,
        )
        for p in precisions
    )
    if len(set(formats)) != len(formats):
        raise CheckpointError(f"{', '.join(precisions)}: a precision stands twice")
    return formats


def is_container(path: Path) -> bool:
    """Tells by its magic whether a file may be replaced by a container."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise ContainerError(f"{path}: cannot be read: {error.strerror}") from None


def import_checkpoint(
    folder: Path,
    to: Path,
    formats: Sequence[Format] = (),
    *,
    int8_non_experts: bool = False,
    origin: dict[str, str] | None = None,
    progress: Progress = lambda done, of: None,
) -> Container:
    """Reads `folder` and writes the container `to`, which appears only when it is whole.

    `formats` are those of the experts, the first the primary one; without any, experts keep the checkpoint's own
    precision. Non-experts keep theirs, or with `int8_non_experts` their large matrices become INT8. Raises
    CheckpointError, naming tensor or key and file, for what cannot be imported, and ContainerError where the container
    cannot be written.
    """
    layout, checkpoint = opened(Checkpoint.open(folder))
    architecture = checkpoint.config["model_type"]
    if to.is_dir():
        raise ContainerError(f"{to}: cannot be written: it is a directory")
    experts = list(layout.experts())
    in_int8 = set(layout.large_matrices()) if int8_non_experts else set()
    if int8_non_experts and not in_int8:
        raise CheckpointError(f"{folder}: the engine computes the non-experts of {architecture} in floats only")
    try:
        with ContainerWriter(
            str(to),
            architecture=architecture,
            config=layout.config,
            formats=formats or (Format(_expert_precision(checkpoint, layout)),),
            tokenizer=_checked_tokenizer(checkpoint, layout.config["vocab_size"]),
            origin={"checkpoint": folder.resolve().name, **(origin or {})},
        ) as writer:
            for theirs, ours, _ in layout.non_experts():
                if ours in in_int8:
                    writer.add_tensor(ours, checkpoint.read_float32(theirs), dtype="int8")
                    continue
                array = checkpoint.read(theirs)
                if array.dtype == BFLOAT16:
                    writer.add_tensor(ours, array.view(np.uint16), dtype="bf16")
                else:
                    writer.add_tensor(ours, array)
            for done, (layer, expert) in enumerate(experts):
                progress(done, len(experts))
                weights = {m: checkpoint.read_float32(name) for m, name in layout.expert(layer, expert).items()}
                try:
                    writer.add_expert(layer, expert, weights)
                except ContainerError as error:
                    raise CheckpointError(f"{folder}: {error}") from None
        progress(len(experts), len(experts))
    except OSError as error:
        raise ContainerError(f"{to}: cannot be written: {error.strerror or error}; nothing was left behind") from None
    return Container.open(str(to))


def layout_of(checkpoint: Checkpoint) -> Layout:
    """Returns the layout for config.json's model_type. Raises as `opened`."""
    return opened(checkpoint)[0]


def opened(checkpoint: Checkpoint) -> tuple[Layout, Checkpoint]:
    """Returns the layout for config.json's model_type, and the checkpoint by the names that it knows.

    Raises CheckpointError, naming key or tensor, for what cannot be imported.
    """
    model_type = checkpoint.config.get("model_type")
    known = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if known is None:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: model_type is {model_type!r:.60}: can be imported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    module = importlib.import_module(f"engine.offline.importing.{known[0]}")
    kind: type[Layout] = getattr(module, f"{known[1]}Layout")
    return kind.opened(checkpoint)


def _expert_precision(checkpoint: Checkpoint, layout: Layout) -> str:
    """Returns the precision of all experts; float32, which holds them all, if they differ."""
    stored = {
        checkpoint.tensors[name].precision
        for layer, expert in layout.experts()
        for name in layout.expert(layer, expert).values()
    }
    return stored.pop() if len(stored) == 1 else "fp32"


def _checked_tokenizer(checkpoint: Checkpoint, vocab_size: int) -> bytes | None:
    text = checkpoint.tokenizer_json()
    if text is None:
        return None
    path = checkpoint.folder / "tokenizer.json"
    try:
        largest = Tokenizer(text, str(path)).largest_id
    except ContainerError as error:
        raise CheckpointError(str(error)) from None
    if largest >= vocab_size:
        raise CheckpointError(
            f"{path}: its largest token id is {largest}, where the model has the ids below {vocab_size}: it is another "
            "model's"
        )
    return text
