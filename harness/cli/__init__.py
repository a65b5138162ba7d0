"""Defines the command line, `edgemoe-farm`, and turns every error into one line."""

from __future__ import annotations

import importlib
import traceback
from typing import Any

import click
from click.exceptions import Exit

from device_inventory import InventoryError
from engine.errors import ContainerError, EngineError, RequestError
from harness.cli import streams
from harness.cli.options import CONTEXT, EXIT_CODES
from harness.errors import FarmError, unforeseen
from harness.version import RELEASE
from reports.errors import ReportError
from reports.text import harmless

# Each has a file of its name here, which is imported when it is called: none waits for what another one needs.
_COMMANDS = (
    "ack",
    "baseline",
    "bench",
    "compare",
    "demo",
    "devices",
    "doctor",
    "estimate",
    "gate",
    "model",
    "nightly",
    "probe",
    "report",
    "results",
    "run",
    "serve",
    "strategies",
    "trust",
)
_FAILED, _INFRASTRUCTURE = 1, 4  # exit codes of a failure of the farm itself
_GATES = ("gate", "nightly")  # their exit code 1 says something else: a regression
_TELL_BY_EXIT_CODE = (*_GATES, "demo", "run")  # and by what they store: what they show may get lost


class _Farm(click.Group):
    """Catches each error that was raised on purpose: prints cause and remedy in one line and sets the exit code.

    An error that nobody foresaw is shown with its traceback.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        streams.prepare()
        return super().main(*args, **extra)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        context.meta["command"] = name
        if name in _TELL_BY_EXIT_CODE:
            streams.stdout_may_fail()
        command: click.Command = getattr(importlib.import_module(f"harness.cli.{name}"), name)
        return command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (FarmError, EngineError, InventoryError, ReportError) as error:
            if context.params.get("debug"):
                raise
            message = " ".join(str(error).split())
            click.echo(f"edgemoe-farm: error: {harmless(message)}", err=True)
            context.exit(_of_command(context, exit_code(error)))
        except KeyboardInterrupt:
            click.echo("edgemoe-farm: interrupted", err=True)
            context.exit(130)
        except (click.ClickException, click.Abort, Exit, BrokenPipeError):
            raise  # click's own
        except Exception as error:
            if context.params.get("debug"):
                raise
            message = unforeseen(error)
            if isinstance(error, OSError) and error.strerror:  # a full disk, a file that may not be read
                message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            else:
                click.echo(harmless(traceback.format_exc(), lines=True, limit=20_000), err=True)
            click.echo(f"edgemoe-farm: error: {harmless(message)}", err=True)
            context.exit(_of_command(context, _FAILED))


def _of_command(context: click.Context, code: int) -> int:
    """Returns the exit code with which the command that was called ends, where an error has `code`."""
    return _INFRASTRUCTURE if context.meta.get("command") in _GATES and code == _FAILED else code


def exit_code(error: Exception) -> int:
    """Returns the farm's exit code of an error; of the engine's errors, 2 for a wrong request and 1 for the rest."""
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
