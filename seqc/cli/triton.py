"""``seqc triton``: a model repository for NVIDIA Triton. Needs onnxruntime and tritonclient, not torch."""

from __future__ import annotations

from pathlib import Path

import click

from seqc.cli.console import State, common_options, print_json


@click.command("triton")
@click.argument("directory", metavar="DIR")
@click.option("-o", "--output", required=True, metavar="REPO", help="The model repository; other models may be in it.")
@click.option("--name", metavar="NAME", help="Of the model; by default that of DIR.")
@click.option(
    "--max-batch",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    metavar="N",
    help="Join up to N requests; 0 serves each by itself.",
)
@click.option(
    "--capacity",
    type=click.IntRange(min=1),
    metavar="N",
    help="Room for N steps of a sequence, where states grow (with --max-batch 0, on the CPU).",
)
@click.option(
    "--sequences",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Streaming: what an instance keeps at a time.",
)
@click.option(
    "--idle",
    type=click.FloatRange(min=0.001),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Streaming: forget a sequence that had no request for so long.",
)
@click.option("--onnx", is_flag=True, help="Serve the ONNX model also where there are engines of it.")
@common_options
@click.pass_obj
def command(
    state: State,
    directory: str,
    output: str,
    name: str | None,
    max_batch: int,
    capacity: int | None,
    sequences: int,
    idle: float,
    onnx: bool,
) -> None:
    """Write the artifact DIR to a Triton model repository; streams keep their states in the server."""
    from seqc.deploy.triton_repository import write_repository
    from seqc.deploy.triton_serving import Serving

    serving = Serving(name or Path(directory).resolve().name, max_batch, capacity, sequences, idle, onnx)
    folder = write_repository(directory, output, serving)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if state.json:
        print_json({"written": str(folder), "files": files})
    else:
        click.echo(f"{folder}: {', '.join(files)}")
