"""Defines the options that several commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from device_inventory import Inventory
from engine import options as engine_options
from engine.codec import to_json
from engine.errors import RequestError
from engine.files import read_bounded
from engine.protocol import BACKENDS, ExpertBudget
from harness.deadlines import parse_duration
from harness.device.kinds import kind_of
from harness.errors import UsageError
from harness.transport.known_hosts import default_path
from reports.results.connection import Patience, Place
from reports.results.database import ResultsDatabase

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

MOST_TEXT_BYTES = 1 << 30
EXIT_CODES = """\b
Exit codes:
  0    all is well
  1    a failure of the farm itself
  2    usage: an argument, a matrix, an inventory or a container is wrong
  3    incomplete: some cells failed or are missing
  4    infrastructure: a device, or for `run` every device, cannot be used
  130  interrupted; `edgemoe-farm run --resume` goes on
"""

GATE_EXIT_CODES = """\b
Exit codes:
  0    no regression
  1    a regression: slower, larger, less accurate, another answer, or no result any more
  2    usage: an argument or a file is wrong
  3    incomplete: a result is missing
  4    infrastructure: no device could be used, another nightly run is at work, or the farm itself failed
  5    inconclusive: suspect runs, too much noise (for nightly: to decide a suspicion), or nothing to compare with
  130  interrupted; the same command goes on
Of several, 1 comes before 3, 3 before 4, 4 before 5.
"""


inventory_option = click.option(
    "--inventory",
    "inventory_path",
    type=click.Path(path_type=Path),
    default="devices.toml",
    show_default=True,
    envvar="EDGEMOE_FARM_INVENTORY",
    show_envvar=True,
    help="The file that declares the devices.",
)

known_hosts_option = click.option(
    "--known-hosts",
    type=click.Path(path_type=Path),
    default=default_path,
    envvar="EDGEMOE_FARM_KNOWN_HOSTS",
    show_envvar=True,
    help="The farm's own host keys.  [default: ~/.config/edgemoe-farm/known_hosts]",
)

results_option = click.option(
    "--results",
    "results_place",
    default="results/farm.db",
    show_default=True,
    envvar="EDGEMOE_FARM_RESULTS",
    show_envvar=True,
    metavar="FILE|URL",
    help="The results database: an SQLite file, or postgresql://user@host/database.",
)

offline_option = click.option(
    "--offline",
    is_flag=True,
    envvar="EDGEMOE_FARM_OFFLINE",
    show_envvar=True,
    help="Fetch nothing: a device without numpy gets what an earlier run has fetched for its like.",
)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Machine-readable output, and nothing else, on stdout."
)


def load_inventory(path: Path) -> Inventory:
    """Reads and checks the inventory. Raises InventoryError, and UsageError for what a transport does not know."""
    inventory = Inventory.load(path)
    for device in inventory.devices.values():
        kind_of(device)
    return inventory


def open_results(place: str, *, create: bool = False, patience: Patience | None = None) -> ResultsDatabase:
    """Opens the results; `create` also makes the folder of a new file, `patience` is for a server that goes away."""
    file = Place.parse(place).file
    if create and file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--results {file}: {error.strerror}: name a place that can be written") from None
    return ResultsDatabase.open(place, create=create, patience=patience)


def print_json(value: Any) -> None:
    click.echo(json.dumps(to_json(value), indent=2))


def read_text(path: Path) -> str:
    try:
        return read_bounded(str(path), MOST_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


def to_terminal() -> bool:
    return sys.stderr.isatty()


PAIRS_HELP = 'JSON lines of texts and what to write about them: {"input": ..., "target": ...}; instead of --text.'


class Budget(click.ParamType[ExpertBudget]):
    name = "BYTES|N-experts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ExpertBudget:
        try:
            return value if isinstance(value, ExpertBudget) else ExpertBudget.parse(value)
        except RequestError as error:
            self.fail(str(error), param, ctx)


class TokenIds(click.ParamType[tuple[int, ...]]):
    """Reads token ids such as 5,6,7."""

    name = "IDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            ids = tuple(int(word) for word in value.split(","))
        except ValueError:
            self.fail(f"{value[:60]!r} is not a list of token ids such as 5,6,7", param, ctx)
        if min(ids) < 0:
            self.fail(f"{min(ids)} is not a token id: they count from 0", param, ctx)
        return ids


class MetricShare(click.ParamType[tuple[str, float]]):
    """Reads `tpot_s=0.05`, `tpot_s=5%`, or `5%` for all metrics, which gives the metric ""."""

    name = "[METRIC=]SHARE"

    def __init__(self, metrics: Collection[str]) -> None:
        self._metrics = metrics

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        metric, _, text = value.rpartition("=")
        if metric and metric not in self._metrics:
            self.fail(f"{value!r}: no metric {metric!r}, write one of {', '.join(self._metrics)}", param, ctx)
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 10:
            self.fail(f"{value!r}: write a share such as 0.05 or 5%, or METRIC=SHARE such as tpot_s=0.05", param, ctx)
        return metric, share


class Duration(click.ParamType[float]):
    name = "DURATION"

    def __init__(self, *, or_none: bool = False) -> None:
        """Accepts 0, too, with `or_none`."""
        self._or_none = or_none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if self._or_none and value in ("0", 0.0):
            return 0.0
        seconds = value if isinstance(value, float) else parse_duration(value)
        return seconds or self.fail(f"{value!r} is no duration: write 90m, 6h, 1h30m or seconds", param, ctx)


class Moment(click.ParamType[str]):
    """Reads a date or an age and gives UTC, ISO 8601."""

    name = "DATE|AGE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        age_s = parse_duration(value)
        try:
            if age_s is not None:
                return (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat(timespec="seconds")
            at = datetime.fromisoformat(value)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is neither a day nor an age: write 2026-11-23, 2026-11-23T22:15 (UTC) or 30d")
        return (at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)).isoformat(timespec="seconds")


wait_option = click.option(
    "--wait",
    "wait_s",
    type=Duration(or_none=True),
    default="1h",
    show_default=True,
    help="How long to wait, in its queue, for a device that another controller uses; 0: not at all.",
)

# --- options of commands on models ------------------------------------------------------------------------------------

container_argument = click.argument("container", metavar="FILE", type=click.Path(path_type=Path))

profile_option = click.option(
    "--profile", type=click.Path(path_type=Path), metavar="PROFILE", help="See `model profile`."
)

text_tokens_option = click.option(
    "--tokens", type=click.IntRange(2), help="Use no more of the text than so many tokens.  [default: all]"
)

context_option = click.option(
    "--context", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a window."
)

backend_option = click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="Kernels of the arithmetic."
)


def generation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a generation, which `python3 -m engine generate` has too."""
    for option in reversed(engine_options.GENERATION):
        command = click.option(
            f"--{option.name}", option.key, type=_click_type(option), default=option.default, metavar=option.metavar,
            is_flag=option.default is False, show_default=option.kind is not bool and option.default is not None,
            help=option.help,
        )(command)  # fmt: skip
    return command


def _click_type(option: engine_options.Option) -> Any:
    if option.choices:
        return click.Choice(option.choices)
    if option.kind is ExpertBudget:
        return Budget()
    if option.kind is int:
        return click.IntRange(option.least, option.most)
    return option.kind
