"""`estimate`: tells what to expect of each strategy, before anything is measured."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy
from rich.console import Console
from rich.table import Table

from engine.container import Container
from engine.errors import EngineError
from engine.experts.profile import PathProfile
from engine.protocol import ArithmeticTimes, ExpertBudget, StorageRates
from engine.strategies import STRATEGIES, strategy_named
from harness.cli.bar import progress_bar
from harness.cli.options import (
    Budget,
    backend_option,
    inventory_option,
    json_option,
    known_hosts_option,
    load_inventory,
    print_json,
    profile_option,
    read_text,
)
from harness.device.deploy import ENGINE_SOURCE, cache_folder
from harness.device.opening import open_session
from harness.device.probe import Python, read_arithmetic
from harness.errors import UsageError
from harness.sweep.estimator import demand_of, file_bytes
from harness.transport.local import LocalTransport
from reports.text import harmless

if TYPE_CHECKING:
    from engine.offline.routing.estimate import Demand, DeviceRates, Estimate

_TEXT_TOKENS = 1024  # of --text that are traced


@click.command()
@click.argument("container", metavar="CONTAINER", type=click.Path(path_type=Path))
@click.option("--device", "device_name", metavar="NAME", help="Time the arithmetic there.  [default: this machine]")
@click.option("--deploy", is_flag=True, help="With --device: upload CONTAINER where the device lacks it.")
@click.option(
    "--storage-rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MB/S",
    help="Rate of reading experts.  [default: the emulated one, else it is measured]",
)
@click.option(
    "--memory-rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB/S",
    help="Rate at which one core reads memory: estimates the arithmetic of a device that is not here.",
)
@click.option("--trace", "trace_file", type=click.Path(path_type=Path), metavar="TRACE", help="See `model trace`.")
@click.option("--text", type=click.Path(path_type=Path), metavar="PATH", help="UTF-8 text to trace now, instead.")
@profile_option
@click.option("--expert-budget", type=Budget(), help="Size of each expert buffer.  [default: the strategy's own]")
@click.option("--strategy", "names", multiple=True, metavar="NAME", help="May be repeated.  [default: all]")
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=32, show_default=True, help="Prompt tokens before each sequence."
)
@click.option(
    "--tokens",
    "new_tokens",
    type=click.IntRange(1),
    default=48,
    show_default=True,
    help="Tokens to decode after each prompt.",
)
@backend_option
@inventory_option
@known_hosts_option
@json_option
def estimate(
    container: Path,
    device_name: str | None,
    deploy: bool,
    storage_rate: float | None,
    memory_rate: float | None,
    trace_file: Path | None,
    text: Path | None,
    profile: Path | None,
    expert_budget: ExpertBudget | None,
    names: tuple[str, ...],
    prompt_tokens: int,
    new_tokens: int,
    backend: str,
    inventory_path: Path,
    known_hosts: Path,
    as_json: bool,
) -> None:
    """Estimate speed, memory and hit rate of each strategy.

    This is what CONTAINER can be expected to do, before anything is measured. A trace is replayed through the engine's
    own buffer, policies and predictors, on a simulated clock: arithmetic takes what a token was timed to take on the
    device, a read its bytes over the storage's rate. Without trace or text the routing is drawn from the profile,
    without a profile it is uniform. The floor is what no pipeline could beat.

    \b
    Examples:
      edgemoe-farm estimate model.emoe --trace held-out.trace --profile model.profile.json --expert-budget 12MiB
      edgemoe-farm estimate model.emoe --device pi5 --profile model.profile.json
      edgemoe-farm estimate model.emoe --storage-rate 90 --memory-rate 4 --strategy naive-swap --strategy full-load
    """
    from engine.offline.routing.estimate import estimate as estimate_one

    if trace_file is not None and text is not None:
        raise UsageError("give --trace or --text, not both")
    if device_name is not None and memory_rate is not None:
        raise UsageError("--memory-rate says by hand what --device measures: give one of them")
    if deploy and device_name is None:
        raise UsageError("--deploy goes with --device")
    strategies = [strategy_named(name) for name in names] or list(STRATEGIES.values())
    opened = Container.open(str(container))
    known = None if profile is None else PathProfile.load(str(profile))
    demand = demand_of(opened, trace_file, known) if text is None else _traced(opened, text)
    if device_name is not None:
        machine = _remote(
            container, device_name, deploy, backend, inventory_path, known_hosts, storage_too=storage_rate is None
        )
    elif memory_rate is not None:
        machine = _by_hand(opened, memory_rate * 1e9)
    else:
        machine = _local(opened, backend, storage_too=storage_rate is None)
    if storage_rate is not None:
        machine = _with_rate(machine, storage_rate * 1e6)
    rows = [
        estimate_one(
            opened, strategy, machine, demand, profile=known, expert_budget=expert_budget,
            prompt_tokens=prompt_tokens, new_tokens=new_tokens, profile_file_bytes=file_bytes(profile),
        )
        for strategy in strategies
    ]  # fmt: skip
    basis = {"arithmetic": machine.times_from, "storage": machine.storage_from, "routing": demand.source}
    if as_json:
        print_json({
            "estimate": True, "container": str(container), "basis": basis, "times": machine.times,
            "bytes_per_s": machine.storage.bytes_per_s if machine.storage else None,
            "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "strategies": rows,
        })  # fmt: skip
        return
    _show(rows, basis)


def _traced(container: Container, text: Path) -> Demand:
    from engine.offline.routing.estimate import Demand
    from engine.offline.routing.trace import record_trace
    from engine.offline.tokenizer import Tokenizer

    tokens = Tokenizer.from_container(container.path).encode(read_text(text))[:_TEXT_TOKENS]
    with progress_bar("windows") as progress:
        return Demand(record_trace(container, tokens, progress=progress), f"traced on {text}")


# --- machines -------------------------------------------------------------------------------------------------------


def _by_hand(container: Container, memory_bytes_per_s: float) -> DeviceRates:
    from engine.offline.routing.estimate import DeviceRates, times_by_hand

    return DeviceRates(
        times_by_hand(container, memory_bytes_per_s),
        f"by hand, from {memory_bytes_per_s / 1e9:g} GB/s of memory and the interpreter of an x86-64 server",
        None, "say it with --storage-rate", memory_bytes_per_s,
    )  # fmt: skip


def _local(container: Container, backend: str, *, storage_too: bool) -> DeviceRates:
    """Times this machine; a process of its own does the arithmetic, as on a device."""
    from engine.offline.routing.estimate import DeviceRates
    from engine.storage import measure_storage

    python = Python(sys.executable, sys.version.split()[0], numpy.__version__)
    with tempfile.TemporaryDirectory() as folder:
        transport = LocalTransport("this machine", Path(folder))
        path = str(Path(container.path).resolve())
        times = read_arithmetic(transport, python, str(ENGINE_SOURCE.parent), path, backend=backend)
    machine = DeviceRates(times, f"timed on this machine, {_engaged(times)}", None, "say it with --storage-rate")
    if not storage_too:
        return machine
    try:
        return _with_measured(machine, measure_storage(container), "this machine")
    except EngineError as error:
        return replace(machine, storage_from=f"say it with --storage-rate ({error})")


def _remote(
    container: Path,
    name: str,
    deploy: bool,
    backend: str,
    inventory_path: Path,
    known_hosts: Path,
    *,
    storage_too: bool,
) -> DeviceRates:
    from engine.offline.routing.estimate import DeviceRates
    from engine.offline.routing.simulation import Storage

    device = load_inventory(inventory_path)[name]
    session = open_session(device, known_hosts=known_hosts, cache_dir=cache_folder())
    try:
        there = session.put(container) if deploy else session.deployed(container)
        if there is None:
            raise UsageError(
                f"{name} does not have {container} ({container.stat().st_size / 1e6:.0f} MB): upload it with --deploy, "
                "or say rates by hand with --storage-rate and --memory-rate, without --device"
            )
        session.hold(lambda state: click.echo(f"{name}: {state}", err=True))  # beside another's engine it is no time
        times = session.arithmetic(there, backend=backend, threads=0)
        rate = device.emulated_read_bytes_per_s
        found = session.storage(there) if storage_too and rate is None else None
    finally:
        session.close()
    machine = DeviceRates(times, f"timed on {name}, {_engaged(times)}", None, "say it with --storage-rate")
    if rate is not None:
        return replace(machine, storage=Storage(rate), storage_from=f"{rate / 1e6:g} MB/s, emulated on {name}")
    return machine if found is None else _with_measured(machine, found, name)


def _with_measured(machine: DeviceRates, found: StorageRates, name: str) -> DeviceRates:
    from engine.offline.routing.simulation import Storage

    rate = found.bytes_per_s
    if rate is None:
        return machine
    way = f"{found.reader}, {found.lanes} lane{'s' * (found.lanes > 1)}"
    age = f" {found.age_s / 3600:.0f} h ago" if found.age_s >= 3600 else ""
    return replace(
        machine, storage=Storage(rate), storage_from=f"{rate / 1e6:.0f} MB/s by {way}, measured on {name}{age}, cold"
    )


def _with_rate(machine: DeviceRates, bytes_per_s: float) -> DeviceRates:
    from engine.offline.routing.simulation import Storage

    return replace(machine, storage=Storage(bytes_per_s), storage_from=f"{bytes_per_s / 1e6:g} MB/s, said by hand")


def _engaged(times: ArithmeticTimes) -> str:
    return harmless(times.variant or times.backend)


# --- showing --------------------------------------------------------------------------------------------------------


def _show(rows: list[Estimate], basis: dict[str, str]) -> None:
    table = Table(box=None, pad_edge=False, title="estimate, not measured", title_justify="left")
    table.add_column("strategy", no_wrap=True)
    for title in ("tokens/s", "ms a token", "floor ms", "memory MB", "hits", "MB a token"):
        table.add_column(title, justify="right")
    table.add_column("bound by")
    for row in rows:
        if row.token_s is None or row.floor_s is None or row.memory_bytes is None or row.read_bytes is None:
            continue
        table.add_row(
            row.strategy, f"{1 / row.token_s:.1f}", f"{row.token_s * 1e3:.2f}", f"{row.floor_s * 1e3:.2f}",
            f"{row.memory_bytes / 1e6:.0f}", f"{row.hit_rate:.0%}", f"{row.read_bytes / 1e6:.2f}", row.bound,
        )  # fmt: skip
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140).print(table)
    for row in rows:
        if row.needs is not None:
            click.echo(f"{row.strategy}: {row.needs}")
    for what, source in basis.items():
        click.echo(f"{what}: {source}")
