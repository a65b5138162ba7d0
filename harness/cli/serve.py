"""`serve`: shows the pages in a browser, live."""

from __future__ import annotations

import os
import signal
from types import FrameType

import click

from harness.cli.options import json_option, open_results, print_json, results_option
from harness.sweep.presence import is_alive
from harness.web import Access, Server, is_loopback


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 is every network.")
@click.option("--port", type=click.IntRange(0, 65535), default=8321, show_default=True, help="0: any that is free.")
@click.option("--name", "names", multiple=True, metavar="NAME",
              help="A further name by which browsers may call it, such as that of a proxy.")  # fmt: skip
@results_option
@json_option
def serve(host: str, port: int, names: tuple[str, ...], results_place: str, as_json: bool) -> None:
    """Show the results in a browser, as they come in, until Ctrl-C.

    On this machine alone unless --host says otherwise; then whoever asks must bring a token: EDGEMOE_FARM_TOKEN, or one
    that is made and shown. It travels unencrypted: in a network that is not yours, go through SSH instead
    (`ssh -L 8321:localhost:8321 HERE`). The server reads, and changes nothing.

    \b
    Examples:
      edgemoe-farm serve
      edgemoe-farm serve --port 0 --json
      EDGEMOE_FARM_TOKEN=$(cat token) edgemoe-farm serve --host 0.0.0.0 --name farm.example.org
    """
    from reports.pages.site import Site

    access = Access.at(host, names, os.environ.get("EDGEMOE_FARM_TOKEN") or None)
    with open_results(results_place) as database:
        site = Site(database, is_alive)
        with Server(host, port, access, lambda path, still: site.answer(path, still=still)) as server:
            _stop_on_signals(server)
            url = _url(host, server.port) + (f"?token={access.token}" if access.token else "")
            if as_json:
                print_json({"url": url, "host": host, "port": server.port, "token": access.token})
            else:
                click.echo(f"serving at {url} until Ctrl-C")
                if not is_loopback(host):
                    click.echo("token and pages travel unencrypted: let in only a network that you trust", err=True)
            server.serve()


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)  # noqa: S104 - only compared
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"


def _stop_on_signals(server: Server) -> None:
    """Stops the server cleanly at the first signal; a second one ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        server.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell has it for its background jobs
            signal.signal(number, stop)
