"""Opens a device of the inventory: for a session, for its lease alone, or to prune it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from device_inventory import Device
from harness import agent
from harness.device.bootstrap import WheelCache
from harness.device.deploy import FarmFolder, UploadTurns
from harness.device.kinds import kind_of
from harness.device.lease import WAIT_S, Holder, Lease
from harness.device.probe import find_python
from harness.device.remote import RemoteSession
from harness.doctor.device import Examined, refuse_unfit
from harness.doctor.survey import Pruned, Survey, prune
from harness.errors import PythonMissingError
from harness.transport import Keyring, Transport


def open_session(
    device: Device,
    *,
    known_hosts: Path,
    cache_dir: Path,
    offline: bool = False,
    engine_source: Path | None = None,
    ssh_config: Path | None = None,
    gate: Callable[[str, Survey], None] | None = None,
    holder: Holder | None = None,
    wait_s: float = WAIT_S,
    uploads: UploadTurns | None = None,
) -> RemoteSession:
    """Connects to a device, checks it, deploys the engine and asks for its facts. Raises DeviceError, UsageError.

    `holder` asks for the lease; by default it is this process, for no sweep. `wait_s` is how long others may take to
    give up the lease.
    """
    reach = kind_of(device).open(device, Keyring(known_hosts, ssh_config))
    return RemoteSession(
        reach.connect,
        root=device.root,
        python=device.python,
        wheels=WheelCache(cache_dir / "wheels", offline=offline) if device.bootstrap else None,
        gate=gate or (lambda root, survey: refuse_unfit(Examined(device, root, survey))),
        step_s=device.step_s,
        idle_s=device.idle_s,
        reconnect_s=device.reconnect_s,
        cache_dir=cache_dir,
        engine_source=engine_source,
        holder=holder,
        wait_s=wait_s,
        uploads=uploads,
        clock=reach.clock,
        sleep=reach.sleep,
    )


def prune_device(device: Device, *, known_hosts: Path, days: float, dry: bool) -> Pruned:
    """Removes what nobody used for `days`; the device may have no room for a session. Raises DeviceError."""
    with _without_engine(device, known_hosts) as (transport, root, python):
        return prune(transport, python, root, days=days, dry=dry)


@contextmanager
def open_lease(device: Device, *, known_hosts: Path) -> Iterator[Lease]:
    """Yields the lease of a device, to look at or to take away; deploys nothing. Raises DeviceError, UsageError."""
    with _without_engine(device, known_hosts) as (transport, root, python):
        call = partial(agent.call, transport, python)
        yield Lease(device.name, root, Holder.this_process(), call, step_s=device.step_s)


@contextmanager
def _without_engine(device: Device, known_hosts: Path) -> Iterator[tuple[Transport, str, str]]:
    """Yields a connection, the farm's folder there, and a Python, which may lack numpy."""
    transport = kind_of(device).open(device, Keyring(known_hosts)).connect()
    try:
        try:
            python = find_python(transport, device.python).path
        except PythonMissingError as missing:
            if missing.bare is None:
                raise
            python = missing.bare
        yield transport, FarmFolder.prepare(transport, python, device.root).root, python
    finally:
        transport.close()
