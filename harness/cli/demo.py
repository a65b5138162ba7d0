"""`demo`: the whole job on this machine, from the checkpoint to the report, over real SSH to emulated devices."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import click

import harness.demo
from engine.protocol import BACKENDS
from harness.cli.faults import demonstrate
from harness.cli.options import EXIT_CODES, open_results
from harness.cli.showing import measure_and_show
from harness.demo.loopback import Emulated, LoopbackFarm
from harness.device.trust import trust
from harness.errors import UsageError
from harness.sweep.matrix import parse_matrix
from harness.sweep.planning import new_sweep, plan_matrix
from harness.sweep.presence import at_work
from reports.pages import render

_SHIPPED = Path(harness.demo.__file__).parent
_KINDS = ("bible", "novel", "sotu")  # of text, for the profile
_PROFILE_CHARACTERS = 40_000  # of each kind: ten thousand tokens, counted in seconds
_DEVICES = (
    Emulated("pi4b-emulated", 43e6),  # a Raspberry Pi 4B reading from its SD card
    Emulated("jetson-tx2-emulated", 200e6),  # a Jetson TX2 reading from its SSD
)


@click.command(epilog=EXIT_CODES)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default="results/demo",
    show_default=True,
    metavar="DIR",
    help="Where report, results, container and profile go.",
)
@click.option("--quick", is_flag=True, help="One block instead of three: a first look, without spread.")
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="Kernels of the devices' engines."
)
@click.option("--faults", is_flag=True, help="Show faults on scripted devices instead: half a minute, all made up.")
@click.option("--keep", is_flag=True, help="Keep the devices' folders, keys and matrix, to look at.")
@click.pass_context
def demo(context: click.Context, output: Path, quick: bool, backend: str, faults: bool, keep: bool) -> None:
    """Do the whole job on this machine, with no device and no root: about two minutes.

    Imports the trained model that ships with the farm, counts its activation paths, starts two SSH devices on
    127.0.0.1, trusts them, deploys to them, measures three strategies in interleaved blocks, and renders the report.
    The devices' storage is emulated: the engine limits its expert reads to the rate of the board that they stand for,
    and every record and page says so. The last line printed is the report's path.

    With --faults nothing is measured at all. Scripted devices, which only play their part, meet one kind of fault each:
    a lost link, a hang, a throttled processor, a power cut, slow and full storage, damaged output, too little memory.
    The real controller has to cope, and shows what each fault cost; every record and page says that it is made up.

    \b
    Examples:
      edgemoe-farm demo
      edgemoe-farm demo --faults --output results/faults
    """
    start = time.monotonic()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror}; choose a folder that can be written") from None
    output = output.resolve()
    work = output / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        if faults:
            all_ended = demonstrate(output, work)
            click.echo(f"report: {output / 'report.html'}")
            context.exit(0 if all_ended else 1)
        container = _import_model(output)
        _say(start, f"imported {container}")
        profile = _profile(container)
        _say(start, f"counted activation paths: {profile}")
        code = _measure(start, output, work, quick, backend)
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)
    _say(start, "done")
    click.echo(f"report: {output / 'report.html'}")
    context.exit(code)


def _import_model(output: Path) -> Path:
    from engine.offline.importing.importer import import_checkpoint

    container = output / "mix16.emoe"
    origin = {"origin": "trained for edgemoe-farm, see harness/demo/mix16/README.md", "licence": "research use"}
    import_checkpoint(_SHIPPED / "mix16", container, origin=origin)
    return container


def _profile(container: Path) -> Path:
    from engine.offline.accuracy.model import counting_model
    from engine.offline.routing.activations import profile_texts
    from engine.offline.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_container(str(container))
    texts = [
        (_SHIPPED / "texts" / f"{kind}.train.txt").read_text(encoding="utf-8")[:_PROFILE_CHARACTERS] for kind in _KINDS
    ]
    profile = container.with_name("mix16.profile.json")
    with counting_model(str(container)) as model:
        profile_texts(model, [tokenizer.encode(text) for text in texts]).save(str(profile))
    return profile


def _measure(start: float, output: Path, work: Path, quick: bool, backend: str) -> int:
    text = (_SHIPPED / "matrix.toml").read_text(encoding="utf-8").replace('backend = "auto"', f'backend = "{backend}"')
    if quick:
        text = text.replace("blocks = 3", "blocks = 1")
    shutil.copyfile(_SHIPPED / "texts" / "novel.val.txt", output / "prompts.txt")
    (output / "matrix.toml").write_text(text, encoding="utf-8")
    matrix = parse_matrix(text, source=str(output / "matrix.toml"), folder=output)
    known_hosts = work / "known_hosts"
    with (
        LoopbackFarm(work / "devices", list(_DEVICES)) as inventory,
        open_results(str(output / "results.db"), create=True) as database,
    ):
        for device in inventory.devices.values():
            # No person is asked: the server is ours, started a moment ago on this machine.
            for trusted in trust(device, known_hosts, lambda key: True):
                _say(start, f"trusted {device.name}, {device.host} port {device.port}, {trusted.key.fingerprint}")
        plan = plan_matrix(matrix, inventory)
        sweep = new_sweep(plan, database)
        _say(start, f"measuring {len(plan.measurements)} runs on {len(inventory.devices)} devices")
        with at_work(database, sweep.id) as presence:
            code = measure_and_show(sweep, plan, database, presence, known_hosts=known_hosts, cache=work / "cache")
        render(database, [sweep.id], output / "report.html")
    return code


def _say(start: float, what: str) -> None:
    click.echo(f"[{time.monotonic() - start:5.1f} s] {what}", err=True)
