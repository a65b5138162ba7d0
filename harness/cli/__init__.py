"""The command line: `edgemoe-farm`. One group, a file for each subject; here every error becomes one line."""

from __future__ import annotations

import importlib
from typing import Any

import click

from device_inventory import InventoryError
from engine.errors import ContainerError, EngineError, RequestError
from harness.cli.options import CONTEXT, EXIT_CODES, printable
from harness.errors import FarmError
from harness.version import RELEASE
from reports.errors import ReportError

# Which file has a command: it is imported when it is called, so that none waits for what another one needs.
_HOMES = {
    "ack": "gate",
    "baseline": "gate",
    "bench": "bench",
    "compare": "compare",
    "demo": "demo",
    "devices": "devices",
    "doctor": "doctor",
    "estimate": "estimate",
    "gate": "gate",
    "model": "model",
    "nightly": "nightly",
    "probe": "devices",
    "report": "results",
    "results": "results",
    "run": "run",
    "serve": "serve",
    "strategies": "strategies",
    "trust": "devices",
}


class _Farm(click.Group):
    """Catches what was raised on purpose, once: a line that names the cause and the remedy, and the exit code."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(_HOMES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _HOMES:
            return None
        command: click.Command = getattr(importlib.import_module(f"harness.cli.{_HOMES[name]}"), name)
        return command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (FarmError, EngineError, InventoryError, ReportError) as error:
            if context.params.get("debug"):
                raise
            message = " ".join(str(error).split())
            click.echo(f"edgemoe-farm: error: {printable(message)}", err=True)
            context.exit(exit_code(error))
        except KeyboardInterrupt:
            click.echo("edgemoe-farm: interrupted", err=True)
            context.exit(130)


def exit_code(error: Exception) -> int:
    """The engine's own exit codes mean other things to a shell on a device: here 2 is what was asked, 1 the rest."""
    if isinstance(error, EngineError):
        return 2 if isinstance(error, (RequestError, ContainerError)) else 1
    return int(getattr(error, "exit_code", 2))


@click.group(cls=_Farm, context_settings=CONTEXT, epilog=EXIT_CODES)
@click.version_option(RELEASE, prog_name="edgemoe-farm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Runs Mixture-of-Experts models on edge devices over SSH, strategy against strategy, and reports what is gained.

    \b
    A first session:
      edgemoe-farm demo                                 everything, on emulated devices of this machine
      edgemoe-farm trust pi5                            once for each device of devices.toml
      edgemoe-farm probe pi5                            what is it?
      edgemoe-farm doctor                               is all fit, and if not, what helps?
      edgemoe-farm model import DIR --to model.emoe     a checkpoint becomes a container
      edgemoe-farm run matrix.toml                      measure
      edgemoe-farm report latest -o page.html           look
    """
