"""Summarises what a container holds, for people and programs, and verifies every byte of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from engine.container import Container
from engine.errors import ContainerError
from engine.models import model_config
from engine.quantize import holds_numbers


def container_summary(path: str) -> dict[str, Any]:
    """Returns the facts of `model info`: counts of experts and bytes. Raises ContainerError."""
    container = Container.open(path)
    config = model_config(container)
    labels = [f.label for f in container.formats]
    precisions = {(r.layer, r.expert, container.formats[r.format].precision) for r in container.records}
    return {
        "architecture": container.architecture,
        "layers": config.layers,
        "moe_layers": container.moe_layers,
        "experts_per_layer": container.experts_per_layer,
        "top_k": config.top_k,
        "vocab_size": config.vocab_size,
        "bytes_total": container.file_bytes,
        "bytes_experts": container.expert_bytes,
        "bytes_non_experts": container.non_expert_bytes,
        "precisions": dict(Counter(precision for _, _, precision in sorted(precisions))),
        "formats": dict(Counter(labels[record.format] for record in container.records)),
        "primary_formats": dict(Counter(labels[record.format] for record in container.primary.values())),
        "tokenizer": container.tokenizer is not None,
        "origin": dict(container.origin),
        "config": dict(container.config),
    }


def verify(path: str, progress: Callable[[int, int], None] = lambda done, of: None) -> tuple[int, int]:
    """Checks each checksum, and that all floats are numbers; returns (parts checked, bytes of the file).

    Raises ContainerError.
    """
    container = Container.open(path)
    of = len(container.tensors) + len(container.records) + 1
    for done, name in enumerate(container.tensors):
        progress(done, of)
        if not np.isfinite(container.read_tensor(name)).all():
            raise ContainerError(f"{path}: tensor {name} holds NaN or infinity: import the checkpoint again")
    for done, record in enumerate(container.records, len(container.tensors)):
        progress(done, of)
        matrices = container.layouts[record.format].unpack(container.read_expert(record))
        for name, packed in matrices.items():
            if not holds_numbers(packed):
                raise ContainerError(
                    f"{path}: layer {record.layer} expert {record.expert}: {name} holds NaN or infinity: "
                    "import the checkpoint again"
                )
    container.tokenizer_json()
    progress(of, of)
    return of - (container.tokenizer is None), container.file_bytes
