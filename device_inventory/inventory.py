"""Reads the TOML file that declares devices: data without behaviour.

    version = 1

    [defaults]                  # optional: values for every device that does not say otherwise
    user = "pi"

    [devices.kitchen-pi]
    host = "192.168.1.20"

See example.toml beside this file for each kind of device. A device that is not reached over SSH names its transport,
whose own keys stand in a table of that name:

    [devices.phone]
    transport = "adb"
    adb.serial = "R58M123"

History of VERSION: 1 first.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
_SIZE = re.compile(r"none|[0-9]+(\.[0-9]+)? ?([KMG]i?B|B)?")
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class InventoryError(ValueError):
    """Says what the inventory lacks or has wrong; the message names file, device and key."""


@dataclass(frozen=True)
class Device:
    """Declares one device. `host` to `proxy_jump` are SSH's; other transports check their own `options`."""

    name: str
    host: str = ""  # address, or an alias in ~/.ssh/config
    port: int | None = None  # None: ssh_config's, else 22
    user: str | None = None
    identity_file: str | None = None  # `~` is the controller's home; offered to the jump hosts too
    proxy_jump: str | None = None  # [user@]host[:port], several separated by commas, nearest first
    root: str = "edgemoe-farm"  # folder on the device, relative to the home folder unless absolute
    python: str | None = None  # None: the first python3 >= 3.8 with numpy that is found
    emulated_read_bytes_per_s: float | None = None  # the engine limits its expert reads to this; labelled `emulated`
    memory_limit: str | None = None  # of the engine, as "512MiB"; "none" where a matrix has one; None: the matrix's
    scripted: str | None = None  # folder on the controller that stands for the device: a script answers, nothing runs
    transport: str = "ssh"  # a kind that the harness knows
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict, hash=False)  # the transport's own
    tags: tuple[str, ...] = ()
    bootstrap: bool = True  # where no Python there has numpy, the farm may put one into its own folder
    connect_s: float = 15.0  # what harness/deadlines.py says of these four
    step_s: float = 60.0
    idle_s: float = 30.0
    reconnect_s: float = 120.0

    def __post_init__(self) -> None:
        _require(SAFE_NAME.fullmatch(self.name), "name", "may hold letters, digits, '.', '_' and '-', at most 64")
        _require(SAFE_NAME.fullmatch(self.transport), "transport", "must be the name of a transport, such as ssh")
        _require(
            _is_word(self.host) or (not self.host and self.transport != "ssh"),
            "host",
            "must be an address or an ssh_config alias, without spaces",
        )
        _require(self.port is None or 1 <= self.port <= 65535, "port", "must be between 1 and 65535")
        _require(self.user is None or _is_word(self.user), "user", "must be a user name, without spaces")
        _require(self.identity_file is None or _is_line(self.identity_file), "identity_file", "must be a path")
        jumps = () if self.proxy_jump is None else self.proxy_jump.split(",")
        _require(all(_is_word(jump) for jump in jumps), "proxy_jump", "must be [user@]host[:port], separated by commas")
        _require(
            _is_line(self.root) and not self.root.startswith(("-", "~")) and self.root.strip("/. ") != "",
            "root",
            "must be a folder of its own on the device, absolute or relative to the home folder (no '~')",
        )
        _require(self.python is None or _is_line(self.python), "python", "must be a command or path on the device")
        _require(self.scripted is None or _is_line(self.scripted), "scripted", "must be a folder on the controller")
        _require(
            (self.transport == "scripted") is (self.scripted is not None),
            "scripted",
            'and transport = "scripted" go together',
        )
        _require(
            all(isinstance(value, (str, int, float)) for value in self.options.values()),
            self.transport,
            "must be a table of texts, numbers, true or false",
        )
        rate = self.emulated_read_bytes_per_s
        _require(rate is None or 1e3 <= rate <= 1e12, "emulated_read_bytes_per_s", "must be between 1e3 and 1e12")
        _require(
            self.memory_limit is None or _SIZE.fullmatch(self.memory_limit),
            "memory_limit",
            'must be a size such as "512MiB", or "none"',
        )
        _require(all(SAFE_NAME.fullmatch(tag) for tag in self.tags), "tags", "must be short words")
        for key, least, most in (
            ("connect_s", 1, 600),
            ("step_s", 5, 3600),
            ("idle_s", 10, 600),
            ("reconnect_s", 0, 86400),
        ):
            _require(least <= getattr(self, key) <= most, key, f"must be between {least} and {most} seconds")


@dataclass(frozen=True)
class Inventory:
    """Holds the devices of a farm by name."""

    devices: dict[str, Device]

    @classmethod
    def load(cls, path: Path) -> Inventory:
        """Reads and checks a TOML file; raises InventoryError."""
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InventoryError(
                f"inventory {path} is not there: copy device_inventory/example.toml, or name another with --inventory"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise InventoryError(f"inventory {path} cannot be read: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise InventoryError(f"inventory {path} is not TOML: {error}") from None
        return cls.parse(document, str(path))

    @classmethod
    def parse(cls, document: Mapping[str, Any], source: str = "inventory") -> Inventory:
        """Checks a parsed TOML document; messages call it `source`. Raises InventoryError."""
        _known_keys(document, ("version", "defaults", "devices"), source)
        if document.get("version") != VERSION or isinstance(document.get("version"), bool):
            raise InventoryError(
                f"{source}: version {document.get('version')!r} is not known: write `version = {VERSION}` at the top"
            )
        defaults = _table(document.get("defaults", {}), f"{source}: defaults")
        _known_keys(defaults, [key for key in _KEYS if key != "host"], f"{source}: defaults")
        declared = _table(document.get("devices", {}), f"{source}: devices")
        if not declared:
            raise InventoryError(f"{source}: no device is declared: add a table such as [devices.kitchen-pi]")
        devices = {}
        for name, table in declared.items():
            devices[name] = _device(name, defaults, _table(table, f"{source}: device {name!r}"), source)
        return cls(devices)

    def __getitem__(self, name: str) -> Device:
        """Returns the device of that name; raises InventoryError that suggests the nearest."""
        if name not in self.devices:
            known = ", ".join(sorted(self.devices))
            raise InventoryError(f"no device is called {name!r}{_suggestion(name, self.devices)} (declared: {known})")
        return self.devices[name]


def _device(name: str, defaults: Mapping[str, Any], table: Mapping[str, Any], source: str) -> Device:
    where = f"{source}: device {name!r}"
    kind = table.get("transport", defaults.get("transport", "scripted" if "scripted" in table else "ssh"))
    has_options = isinstance(kind, str) and kind not in _KEYS and kind in table
    options = _table(table[kind], f"{where}: key {kind!r}") if has_options else {}
    table = {key: value for key, value in table.items() if not has_options or key != kind}
    _known_keys(table, _KEYS, where)
    if "host" not in table and kind == "ssh":
        raise InventoryError(f"{where}: key 'host' is missing: write host = \"address or ssh_config alias\"")
    values = {**defaults, **table, "transport": kind}
    for key, value in values.items():
        kinds = _KEYS[key]
        if not isinstance(value, kinds) or isinstance(value, bool) is not (kinds == (bool,)):
            raise InventoryError(f"{where}: key {key!r} must be {_TYPE_NAMES[kinds[0]]}, not {value!r:.60}")
    if "tags" in values:
        if not all(isinstance(tag, str) for tag in values["tags"]):
            raise InventoryError(f"{where}: key 'tags' must be a list of texts")
        values["tags"] = tuple(values["tags"])
    values = {key: float(value) if _KEYS[key] == _NUMBER else value for key, value in values.items()}
    try:
        return Device(name=name, options=options, **values)
    except InventoryError as error:
        raise InventoryError(f"{where}: {error}") from None


_NUMBER = (float, int)
_KEYS: dict[str, tuple[type, ...]] = {
    "host": (str,),
    "port": (int,),
    "user": (str,),
    "identity_file": (str,),
    "proxy_jump": (str,),
    "root": (str,),
    "python": (str,),
    "emulated_read_bytes_per_s": _NUMBER,
    "memory_limit": (str,),
    "scripted": (str,),
    "transport": (str,),
    "tags": (list,),
    "bootstrap": (bool,),
    "connect_s": _NUMBER,
    "step_s": _NUMBER,
    "idle_s": _NUMBER,
    "reconnect_s": _NUMBER,
}
_TYPE_NAMES = {str: "a text", int: "a whole number", float: "a number", list: "a list", bool: "true or false"}
assert set(_KEYS) == {f.name for f in dataclasses.fields(Device)} - {"name", "options"}


def _known_keys(table: Mapping[str, Any], known: Any, where: str) -> None:
    for key in table:
        if key not in known:
            raise InventoryError(f"{where}: unknown key {key!r}{_suggestion(key, known)} (known: {', '.join(known)})")


def _suggestion(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InventoryError(f"{where} must be a table, not {value!r:.60}")
    return value


def _is_line(text: str) -> bool:
    return bool(text.strip()) and text.isprintable()


def _is_word(text: str) -> bool:
    return _is_line(text) and not text.startswith("-") and not re.search(r"\s", text)


def _require(condition: object, key: str, message: str) -> None:
    if not condition:
        raise InventoryError(f"key {key!r} {message}")
