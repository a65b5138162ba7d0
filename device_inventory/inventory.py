"""Devices and the TOML file that declares them."""

from __future__ import annotations

from dataclasses import dataclass


class InventoryError(ValueError):
    """The inventory does not say what it must; the message names file, device and key."""


@dataclass(frozen=True)
class Device:
    """One device that can be reached over SSH."""

    name: str
    host: str  # address, or an alias in ~/.ssh/config
    port: int | None = None  # None: ssh_config's, else 22
    user: str | None = None
    identity_file: str | None = None
    proxy_jump: str | None = None
    root: str = "edgemoe-farm"  # folder on the device, relative to the home folder unless absolute
    python: str | None = None  # None: the first python3 >= 3.8 with numpy that is found
    emulated_read_bytes_per_s: float | None = None  # the engine limits its expert reads to this; labelled `emulated`
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inventory:
    """The devices of a farm, by name."""

    devices: dict[str, Device]
