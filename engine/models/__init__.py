"""Runs model architectures, one file each, on shared layers. A router yields expert ids; it knows no strategy."""

from __future__ import annotations

import importlib
from typing import Any, Callable, Dict, Tuple

from engine.container import Container
from engine.errors import ContainerError
from engine.kernels import Kernels
from engine.models.interface import Model, ModelConfig

_Parse = Callable[[Dict[str, Any]], ModelConfig]
_Load = Callable[[Container, Kernels], Model]

# What runs a container, and what imports a checkpoint of it: module and class here, and the same with `Layout` behind
# the class in engine/offline/importing. Only the one that is needed is imported.
ARCHITECTURES = {
    "mixtral": ("mixtral", "Mixtral"),
    "switch_transformers": ("switch", "Switch"),
}


def model_config(container: Container) -> ModelConfig:
    """Returns the container's configuration, checked. Raises ContainerError."""
    return _architecture(container)[0](container.config)


def load_model(container: Container, kernels: Kernels) -> Model:
    """Reads the non-experts into memory. Raises ContainerError."""
    return _architecture(container)[1](container, kernels)


def _architecture(container: Container) -> Tuple[_Parse, _Load]:
    known = ARCHITECTURES.get(container.architecture)
    if known is None:
        raise ContainerError(
            f"{container.path}: architecture {container.architecture[:40]!r} is not one that this engine runs: "
            f"{', '.join(ARCHITECTURES)}"
        )
    module, name = importlib.import_module("engine.models." + known[0]), known[1]
    return getattr(module, f"{name}Config").parse, getattr(module, name).load
