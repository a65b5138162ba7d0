"""`model import`: turns a checkpoint into a container."""

from __future__ import annotations

import time
from pathlib import Path

import click

from harness.cli.bar import progress_bar
from harness.errors import UsageError

_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "int3", "int2")


@click.command("import")
@click.argument("checkpoint", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The container to write.")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(_PRECISIONS),
    multiple=True,
    help="Precision of the experts; may be repeated, the first is the one used.  [default: the checkpoint's own]",
)
@click.option(
    "--group",
    type=click.Choice(["0", "32", "64"]),
    help="Columns that share a scale in int formats; 0: one scale per output channel.  [default: 32]",
)
@click.option(
    "--symmetric/--asymmetric",
    "symmetric",
    default=None,
    help="Int formats without or with a zero point, which matters most at two bits.  [default: asymmetric]",
)
@click.option(
    "--non-experts",
    type=click.Choice(["stored", "int8"]),
    default="stored",
    show_default=True,
    help="Precision of embedding, attention and head: the checkpoint's own, or INT8, 32 columns to a scale.",
)
@click.option("--origin", metavar="TEXT", help="Where the model comes from: kept in the container.")
@click.option("--licence", metavar="TEXT", help="Its licence: kept in the container.")
@click.option("--force", is_flag=True, help="Overwrite FILE even if it is not a container.")
def import_model(
    checkpoint: Path,
    to: Path,
    precisions: tuple[str, ...],
    group: str | None,
    symmetric: bool | None,
    non_experts: str,
    origin: str | None,
    licence: str | None,
    force: bool,
) -> None:
    """Turn the Hugging Face checkpoint in DIR into a container.

    A tokenizer.json beside config.json goes along. An
    existing container is replaced, once the new one is whole.

    \b
    Examples:
      edgemoe-farm model import mixtral/ --to mixtral.emoe
      edgemoe-farm model import mixtral/ --to mixtral-int4.emoe --precision int4
      edgemoe-farm model import mixtral/ --to small.emoe --precision int4 --non-experts int8
      edgemoe-farm model import mixtral/ --to both.emoe --precision int8 --precision int2 --group 64
    """
    from engine.offline.importing.importer import formats_of, import_checkpoint, is_container

    if not force and to.is_file() and not is_container(to):
        raise UsageError(f"{to}: is not a container; choose another name, or overwrite it with --force")
    formats = formats_of(precisions, None if group is None else int(group), symmetric)
    known = {"origin": origin, "licence": licence}
    start = time.monotonic()
    with progress_bar("experts") as progress:
        container = import_checkpoint(
            checkpoint, to, formats, int8_non_experts=non_experts == "int8",
            origin={k: v for k, v in known.items() if v is not None}, progress=progress,
        )  # fmt: skip
    labels = ", ".join(f.label for f in container.formats)
    click.echo(
        f"{to}: {len(container.primary)} experts in {labels}, {container.file_bytes / 1e6:.1f} MB,"
        f" in {time.monotonic() - start:.1f} s"
    )
