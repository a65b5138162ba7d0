"""Model architectures, one file each, on shared layers. A router yields expert ids; it knows no strategy."""

from __future__ import annotations

import importlib
from typing import Any, Callable, Dict, Tuple

from engine.container import Container
from engine.errors import ContainerError
from engine.kernels import Kernels
from engine.models.interface import Model, ModelConfig

_Parse = Callable[[Dict[str, Any]], ModelConfig]
_Load = Callable[[Container, Kernels], Model]

ARCHITECTURES = {  # the module, and its classes' names; only the one that is needed is imported
    "mixtral": ("engine.models.mixtral", "Mixtral"),
    "switch_transformers": ("engine.models.switch", "Switch"),
}


def model_config(container: Container) -> ModelConfig:
    """Checked. Raises ContainerError."""
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
    module, name = importlib.import_module(known[0]), known[1]
    return getattr(module, f"{name}Config").parse, getattr(module, name).load
