"""Model architectures, one file each, on shared layers. A router yields expert ids; it knows no strategy."""

from __future__ import annotations

from engine.container import Container
from engine.errors import ContainerError
from engine.kernels import Kernels
from engine.models.mixtral import Mixtral


def load_model(container: Container, kernels: Kernels) -> Mixtral:
    """Reads the non-experts into memory. Raises ContainerError."""
    if container.architecture != "mixtral":
        raise ContainerError(
            f"{container.path}: architecture {container.architecture[:40]!r} is not one that this engine runs: mixtral"
        )
    return Mixtral.load(container, kernels)
