"""Checks the configuration of a stranger's container and reads tensors of known shapes, for every architecture."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Type, TypeVar

from engine.container import Container
from engine.errors import ContainerError

C = TypeVar("C")
Range = Tuple[str, int, int]  # key, least, most


def parse_config(
    kind: Type[C],
    config: Dict[str, Any],
    *,
    integers: Sequence[Range],
    positives: Sequence[str],
    flags: Sequence[str],
    optional_integers: Sequence[str] = (),
) -> C:
    """Returns a dataclass from a container's configuration, every key checked. Raises ContainerError."""
    values = dict(config)
    for name, least, most in integers:
        value: Any = values.get(name)
        if type(value) is not int or not least <= value <= most:
            raise ContainerError(f"configuration: {name} is {str(value)[:40]!r}, not between {least} and {most}")
    for name in positives:
        value = values.get(name)
        if type(value) not in (int, float) or not 0 < value < 1e12:
            raise ContainerError(f"configuration: {name} is {str(value)[:40]!r}, not a positive number")
        values[name] = float(value)
    for name in flags:
        if type(values.get(name)) is not bool:
            raise ContainerError(f"configuration: {name} is neither true nor false")
    for name in optional_integers:
        if values.get(name) is not None and type(values[name]) is not int:
            raise ContainerError(f"configuration: {name} is neither null nor a whole number")
    eos_ids = values.get("eos_ids")
    if not isinstance(eos_ids, list) or not all(type(i) is int for i in eos_ids):
        raise ContainerError("configuration: eos_ids is not a list of token ids")
    values["eos_ids"] = tuple(eos_ids)
    try:
        return kind(**values)
    except TypeError as error:
        raise ContainerError(f"configuration: {error}") from None


def check_experts(container: Container, layers: int, experts: int, matrices: List[Tuple[str, int, int]]) -> None:
    """Raises ContainerError unless the container's experts have the `matrices` (name, rows, columns)."""
    if [(m.name, m.rows, m.columns) for m in container.layouts[0].matrices] != matrices:
        raise ContainerError(f"{container.path}: its experts do not have the shapes of its configuration")
    if (container.moe_layers, container.experts_per_layer) != (layers, experts):
        raise ContainerError(f"{container.path}: it does not hold the experts that its configuration names")


def tensor_reader(container: Container, read_as: Optional[Callable[[str], Any]] = None) -> Callable[..., Any]:
    """Returns read(name, *shape): that tensor in float32, or as `read_as(name)` gives it, a method of the container.

    Raises ContainerError for another shape, or none.
    """

    def read(name: str, *shape: int) -> Any:
        tensor = container.tensors.get(name)
        if tensor is not None and tensor.shape != shape:
            raise ContainerError(f"{container.path}: tensor {name!r} is {tensor.shape} where {shape} is expected")
        return (read_as or container.read_tensor)(name)

    return read
